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
from spec.rounding import Tracked, exact


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

    `engine` is the trace of the engine under judgement. Where a value is within reach of a kink, and only
    there, the gradient follows the side that the engine itself was on; without it both sides are allowed for.
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
                           engine.get("probability"))
    tensors["loss"] = losses.loss
    if losses.kinks:
        result.kinks["probability"] = losses.kinks
    if gradients:
        if losses.dprobability is not None:
            tensors["probability_grad"] = losses.dprobability
        tensors[f"{logit}_grad"] = losses.dlogit
        _backward(spec, parameters, batch, wide, dense, result, engine)
    return result


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
              result: Evaluation, engine: Arrays) -> None:
    tensors = result.tensors
    doutput = _mlp_backward(spec, "top", tensors["interaction.output"], wide, result, engine)
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
    tensors[f"bottom.{len(spec.bottom.widths) - 1}.activation_grad"] = dvectors[0]
    _mlp_backward(spec, "bottom", dense, wide, result, engine)


def _mlp_backward(spec: ModelSpec, mlp: str, x: Tracked, wide: Arrays, result: Evaluation,
                  engine: Arrays) -> Tracked:
    """From the gradient recorded at the MLP's end to that of its input `x`, which is returned."""
    tensors = result.tensors
    dx = x
    for layer in reversed(range(len(spec.layer_sizes[mlp]))):
        name = f"{mlp}.{layer}"
        z = tensors[f"{name}.preactivation"]
        if f"{name}.activation" in tensors:
            dy = tensors[f"{name}.activation_grad"]
            tensors[f"{name}.preactivation_grad"] = (
                rounding.relu_gradient(z, dy, engine.get(f"{name}.preactivation"))
                if getattr(spec, mlp).activation == "relu"
                else rounding.sigmoid_gradient(z, tensors[f"{name}.activation"], dy))
        source = tensors[f"{mlp}.{layer - 1}.activation"] if layer else x
        dw, db, dx = rounding.fully_connected_gradient(
            source, wide[f"{name}.weight"], tensors[f"{name}.preactivation_grad"])
        tensors[f"{name}.weight_grad"], tensors[f"{name}.bias_grad"] = dw, db
        if layer:
            tensors[f"{mlp}.{layer - 1}.activation_grad"] = dx
    return dx
