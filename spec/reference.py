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
from spec.rounding import C, Tracked, exact, recorded


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
             engine: Arrays | None = None, replay: bool = False, same_run: bool = True) -> Evaluation:
    """Forward, and backward if asked for, in float64 from float32 parameters and batch.

    `engine` is the trace of the engine under judgement. It decides what rounding leaves open, and only that:
    the gradients follow from the engine's own activations, and what lies behind the logit's gradient from its own,
    element by element and only where they conform; where a value is within reach of a kink, the gradient follows the
    side that the engine was on. With `same_run` False another run is judged than the one that `engine` traces: it may
    be rounded otherwise, and the variances stay. Without `engine` they allow for every outcome.

    With `replay` every tensor is computed from the engine's own inputs of it, as they were recorded: the engine's
    error in that one step is left, and the variance that the step alone allows.
    """
    run = _Run(engine or {}, replay)
    wide = {name: parameters[name].astype(np.float64) for name in parameters if not name.startswith("tables.")}

    dense = exact(batch.dense)
    vectors = [_mlp(spec, "bottom", dense, wide, run)]
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        vectors.append(run.tap(f"{name}.pooled", pooling.forward(
            table, parameters[f"{name}.weight"], parameters.get(f"{name}.pooling"),
            batch.indices[number], batch.lengths[number])))
    probability = _mlp(spec, "top", interaction.forward(spec, vectors, run.tap), wide, run)

    last = len(spec.top.widths) - 1
    logit = f"top.{last}.preactivation"
    losses = loss.evaluate(spec.loss, run.used[logit], probability, batch.label.astype(np.float64),
                           run.own("probability", probability), replay)
    run.tap("loss", losses.loss)
    if losses.kinks:
        run.result.kinks["probability"] = losses.kinks
    if gradients:
        dprobability = losses.dprobability
        if dprobability is not None:
            dprobability = run.tap("probability_grad", dprobability)
        dlogit = losses.dlogit(dprobability)
        used = run.tap(f"{logit}_grad", dlogit)
        # What next to nothing is known of, behind a saturated probability, would be a common factor of all the rest.
        start = used if replay else _followed(dlogit, run.own(f"{logit}_grad", dlogit), same_run, most=1 / C)
        if not replay:
            run.used |= {name: _followed(x, run.own(name, x), same_run) for name, x in run.used.items()}
        _backward(spec, parameters, batch, wide, dense, start, run)
    return run.result


class _Run:
    """One evaluation. `result` holds what was computed, `used` what the steps after it went on with."""

    def __init__(self, engine: Arrays, replay: bool) -> None:
        self.engine, self.replay = engine, replay
        self.result, self.used = Evaluation(), {}

    def tap(self, name: str, tensor: Tracked) -> Tracked:
        """See `rounding.Tap`. A replay goes on with the engine's own tensor."""
        own = self.own(name, tensor) if self.replay else None
        self.result.tensors[name] = tensor
        self.used[name] = tensor if own is None else recorded(own)
        return self.used[name]

    def own(self, name: str, expected: Tracked) -> np.ndarray | None:
        """The engine's own tensor, if it is one of the right shape. Where it is not, the judge says so."""
        own = self.engine.get(name)
        return own if isinstance(own, np.ndarray) and own.shape == expected.value.shape else None


def _followed(expected: Tracked, engine: np.ndarray | None, exactly: bool, most: float | None = None) -> Tracked:
    """The engine's own numbers where they conform. `exactly`: just as they were recorded; else as far off as may be,
    but by no more than a share of `most` of each.

    The errors of an activation, or of a logit's gradient, are not independent from sample to sample: where samples
    are alike, so are the errors of the functions in them. In a sum over the batch they would add up, where
    the propagation by variance takes them to cancel.
    """
    if engine is None:
        return expected
    conforms = np.abs(engine - expected.value) <= expected.reach
    variance = expected.variance
    if exactly:
        variance = np.minimum(variance, recorded(engine).variance)
    elif most:
        variance = np.minimum(variance, (most / C * engine.astype(np.float64)) ** 2)
    return Tracked(np.where(conforms, engine, expected.value), np.where(conforms, variance, expected.variance))


def _mlp(spec: ModelSpec, mlp: str, x: Tracked, wide: Arrays, run: _Run) -> Tracked:
    """All layers; the top's last activation is the probability."""
    layers = len(spec.layer_sizes[mlp])
    for layer in range(layers):
        name = f"{mlp}.{layer}"
        z = run.tap(f"{name}.preactivation",
                    rounding.fully_connected(x, wide[f"{name}.weight"], wide[f"{name}.bias"]))
        if mlp == "top" and layer == layers - 1:
            return run.tap("probability", rounding.sigmoid(z))
        if getattr(spec, mlp).activation == "relu":
            x = run.tap(f"{name}.activation", rounding.relu(z))
            kinks = int(rounding.near(z, 0).sum())
            if kinks:
                run.result.kinks[f"{name}.preactivation"] = kinks
        else:
            x = run.tap(f"{name}.activation", rounding.sigmoid(z))
    return x


def _backward(spec: ModelSpec, parameters: Arrays, batch: Batch, wide: Arrays, dense: Tracked,
              dlogit: Tracked, run: _Run) -> None:
    x = run.used["interaction.output"]
    doutput = run.tap("interaction.output_grad", _mlp_backward(spec, "top", x, wide, run, dlogit))
    dvectors = interaction.backward(spec, run.used.get("interaction.features"), doutput, run.tap)
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        weight, learned = pooling.backward(
            table, parameters[f"{name}.weight"], parameters.get(f"{name}.pooling"),
            batch.indices[number], batch.lengths[number], run.tap(f"{name}.pooled_grad", dvectors[number + 1]))
        run.result.rows[f"{name}.weight"] = weight
        if learned is not None:
            run.result.rows[f"{name}.pooling"] = learned
    _mlp_backward(spec, "bottom", dense, wide, run, dvectors[0])


def _mlp_backward(spec: ModelSpec, mlp: str, x: Tracked, wide: Arrays, run: _Run, dy: Tracked) -> Tracked:
    """From the gradient `dy` of the MLP's output, of the top's last preactivation, to that of its input `x`, which
    is returned."""
    for layer in reversed(range(len(spec.layer_sizes[mlp]))):
        name = f"{mlp}.{layer}"
        if f"{name}.activation" in run.used:
            dy = run.tap(f"{name}.activation_grad", dy)
            z = run.used[f"{name}.preactivation"]
            dy = run.tap(f"{name}.preactivation_grad",
                         rounding.relu_gradient(z, dy, run.own(f"{name}.preactivation", z))
                         if getattr(spec, mlp).activation == "relu"
                         else rounding.sigmoid_gradient(None if run.engine else z, run.used[f"{name}.activation"], dy))
        source = run.used[f"{mlp}.{layer - 1}.activation"] if layer else x
        dw, db, dy = rounding.fully_connected_gradient(source, wide[f"{name}.weight"], dy)
        run.tap(f"{name}.weight_grad", dw)
        run.tap(f"{name}.bias_grad", db)
    return dy
