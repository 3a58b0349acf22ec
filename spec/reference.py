"""The executable spec: forward and backward of a DLRM in float64 NumPy, with rounding variances.

`evaluate` is the judge that every backend is held against; `spec.update` continues with the optimizer.
"""

from dataclasses import dataclass, field

import numpy as np

from spec import interaction, loss, pooling, rounding
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.pooling import RowGradient
from spec.rounding import C, Tracked, exact


@dataclass
class Evaluation:
    """What one batch makes of one set of parameters.

    Attributes:
        tensors: activations and their gradients, and gradients of dense parameters, by the spec's names.
        rows: gradient of each sparse parameter, by parameter name, duplicates summed.
        kinks: elements within reach of a kink, by the tensor whose value decides, where there are any.
    """

    tensors: dict[str, Tracked] = field(default_factory=dict)
    rows: dict[str, RowGradient] = field(default_factory=dict)
    kinks: dict[str, int] = field(default_factory=dict)


def evaluate(spec: ModelSpec, parameters: Arrays, batch: Batch, gradients: bool = True,
             engine: Arrays | None = None) -> Evaluation:
    """Forward, and backward if asked for, in float64 from float32 parameters and batch.

    `engine` is the trace of the engine under judgement. It decides what rounding leaves open, and only that:
    where a value is within reach of a kink, the gradient follows the side that the engine was on; where a
    saturated probability leaves next to nothing known of the logit's gradient, what lies behind it follows
    from the engine's own. Without `engine` the variances allow for every outcome.
    """
    result = Evaluation()
    tensors, engine = result.tensors, engine or {}
    wide = {name: parameters[name].astype(np.float64) for name in parameters if not name.startswith("tables.")}

    dense = exact(batch.dense)
    vectors = [_mlp(spec, "bottom", dense, wide, result)]
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        tensors[f"{name}.pooled"] = pooling.forward(
            table, parameters[f"{name}.weight"], parameters.get(f"{name}.pooling"),
            batch.indices[number], batch.lengths[number])
        vectors.append(tensors[f"{name}.pooled"])
    tensors.update(interaction.forward(spec, vectors))
    probability = _mlp(spec, "top", tensors["interaction.output"], wide, result)
    tensors["probability"] = probability

    last = len(spec.top.widths) - 1
    logit = f"top.{last}.preactivation"
    losses = loss.evaluate(spec.loss, tensors[logit], probability, batch.label.astype(np.float64),
                           _own(engine, "probability", probability))
    tensors["loss"] = losses.loss
    if losses.kinks:
        result.kinks["probability"] = losses.kinks
    if gradients:
        if losses.dprobability is not None:
            tensors["probability_grad"] = losses.dprobability
        tensors[f"{logit}_grad"] = losses.dlogit
        start = _decided(losses.dlogit, _own(engine, f"{logit}_grad", losses.dlogit))
        _backward(spec, parameters, batch, wide, dense, start, result, engine)
    return result


def _own(engine: Arrays, name: str, expected: Tracked) -> np.ndarray | None:
    """The engine's own tensor, if it is one of the right shape. Where it is not, the judge says so."""
    own = engine.get(name)
    return own if isinstance(own, np.ndarray) and own.shape == expected.value.shape else None


def _decided(dlogit: Tracked, engine: np.ndarray | None) -> Tracked:
    """The engine's own gradient of the logit, for samples whose gradient is uncertain by more than 1 / C of it.

    The error of a logit's gradient is a common factor of everything behind it; as large as this, it would add
    up where the propagation by variance takes errors to be independent.
    """
    if engine is None:
        return dlogit
    open_ = (C * dlogit.reach > np.abs(dlogit.value)) & (np.abs(engine - dlogit.value) <= dlogit.reach)
    return Tracked(np.where(open_, engine, dlogit.value), np.where(open_, 0, dlogit.variance))


def _mlp(spec: ModelSpec, mlp: str, x: Tracked, wide: Arrays, result: Evaluation) -> Tracked:
    """All layers; every activation is recorded but the top's last, which is the probability."""
    layers = len(spec.layer_sizes[mlp])
    for layer in range(layers):
        name = f"{mlp}.{layer}"
        z = rounding.fully_connected(x, wide[f"{name}.weight"], wide[f"{name}.bias"])
        result.tensors[f"{name}.preactivation"] = z
        if mlp == "top" and layer == layers - 1:
            return rounding.sigmoid(z)
        if getattr(spec, mlp).activation == "relu":
            x = rounding.relu(z)
            kinks = int(rounding.near(z, 0).sum())
            if kinks:
                result.kinks[f"{name}.preactivation"] = kinks
        else:
            x = rounding.sigmoid(z)
        result.tensors[f"{name}.activation"] = x
    return x


def _backward(spec: ModelSpec, parameters: Arrays, batch: Batch, wide: Arrays, dense: Tracked,
              dlogit: Tracked, result: Evaluation, engine: Arrays) -> None:
    tensors = result.tensors
    doutput = _mlp_backward(spec, "top", tensors["interaction.output"], wide, result, engine, dlogit)
    tensors["interaction.output_grad"] = doutput
    inner, dvectors = interaction.backward(spec, tensors, doutput)
    tensors.update(inner)
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        tensors[f"{name}.pooled_grad"] = dvectors[number + 1]
        weight, learned = pooling.backward(
            table, parameters[f"{name}.weight"], parameters.get(f"{name}.pooling"),
            batch.indices[number], batch.lengths[number], dvectors[number + 1])
        result.rows[f"{name}.weight"] = weight
        if learned is not None:
            result.rows[f"{name}.pooling"] = learned
    _mlp_backward(spec, "bottom", dense, wide, result, engine, dvectors[0])


def _mlp_backward(spec: ModelSpec, mlp: str, x: Tracked, wide: Arrays, result: Evaluation, engine: Arrays,
                  dy: Tracked) -> Tracked:
    """From the gradient `dy` of the MLP's last recorded tensor to that of its input `x`, which is returned."""
    tensors = result.tensors
    for layer in reversed(range(len(spec.layer_sizes[mlp]))):
        name = f"{mlp}.{layer}"
        if f"{name}.activation" in tensors:
            tensors[f"{name}.activation_grad"] = dy
            z = tensors[f"{name}.preactivation"]
            dy = (rounding.relu_gradient(z, dy, _own(engine, f"{name}.preactivation", z))
                  if getattr(spec, mlp).activation == "relu"
                  else rounding.sigmoid_gradient(z, tensors[f"{name}.activation"], dy))
            tensors[f"{name}.preactivation_grad"] = dy
        source = tensors[f"{mlp}.{layer - 1}.activation"] if layer else x
        dw, db, dy = rounding.fully_connected_gradient(source, wide[f"{name}.weight"], dy)
        tensors[f"{name}.weight_grad"], tensors[f"{name}.bias_grad"] = dw, db
    return dy
