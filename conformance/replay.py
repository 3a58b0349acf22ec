"""Which step of a backend made an error: every step replayed from the backend's own inputs of it (SPEC.md, 10)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from conformance.verdict import TensorVerdict, complete_rows, judge, judge_rows, missing
from spec.graph import steps, update_steps
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.reference import Evaluation
from spec.rounding import Tracked
from spec.tensors import activations, slice_names, trace_names


@dataclass
class Fault:
    """The first step, in the order of computation, that is wrong by itself.

    Attributes:
        tensor: what it computes.
        operator: the backend's own name of what runs there; empty where the backend does not say.
        optimizer, step: None and 1 for the trace; else the training step, whose trace or update it is.
        sources: what the step reads.
        verdict: its tensor's.
        alone: False where no step is wrong by itself: errors that are each allowed add up to one that is not.
    """

    tensor: str
    operator: str
    optimizer: str | None
    step: int
    sources: tuple[str, ...]
    verdict: TensorVerdict
    alone: bool

    def summary(self) -> str:
        name = f"{self.tensor}, made by {self.operator}" if self.operator else self.tensor
        if not self.alone:
            return f"no step is wrong by itself; first beyond its bound: {name}: {self.verdict.summary()}"
        own = self.verdict.own
        detail = own.summary(self.tensor) if own and not self.verdict.problem else self.verdict.summary()
        return f"first at fault: {name}: {detail}"


def judge_trace(spec: ModelSpec, trace: Arrays, expected: Evaluation, replayed: Evaluation | None,
                gradients: bool) -> list[TensorVerdict]:
    """Every tensor of a trace, in the order of `spec.tensors.trace_names`; a slice's indices with its values."""
    verdicts, forward = [], set(activations(spec))
    for name in trace_names(spec, gradients):
        phase = "forward" if name in forward else "backward"
        if name.endswith("_grad_indices"):
            continue
        if name not in trace:
            verdicts.append(missing(name, phase))
        elif name.endswith("_grad_values"):
            parameter = name.removesuffix("_grad_values")
            indices, _ = slice_names(parameter)
            verdicts.append(
                judge_rows(name, trace[indices], trace[name], expected.rows[parameter],
                           replayed and replayed.rows[parameter])
                if indices in trace else missing(indices, phase))
        else:
            verdicts.append(judge(name, phase, trace[name], expected.tensors[name],
                                  replayed and replayed.tensors[name]))
    return verdicts


def own_gradients(expected: Evaluation, trace: Arrays, verdicts: Iterable[TensorVerdict]) -> Evaluation:
    """The backend's own gradients, for a replay of the update.

    They keep the reference's variance: a training step computes its gradients anew, perhaps in another order.
    """
    unfit = {verdict.tensor for verdict in verdicts if verdict.problem}
    tensors, rows = dict(expected.tensors), dict(expected.rows)
    for name in (name for name in tensors if name.endswith("_grad") and name in trace and name not in unfit):
        tensors[name] = Tracked(trace[name].astype(np.float64), tensors[name].variance)
    for parameter, row in rows.items():
        indices, values = slice_names(parameter)
        if {indices, values} <= trace.keys() and unfit.isdisjoint((indices, values)):
            own = complete_rows(row.rows, trace[indices], trace[values])
            rows[parameter] = row._replace(gradient=Tracked(own, row.gradient.variance))
    return replace(expected, tensors=tensors, rows=rows)


def find_faults(spec: ModelSpec, verdicts: Iterable[TensorVerdict], operators: Mapping[str, str],
                optimizer: str | None = None, step: int = 1) -> list[Fault]:
    """In the order of computation; none where all verdicts conform. A tensor without a replay is at fault where it
    does not conform.

    `operators`: see `spec.backend.NamesOperators`.
    """
    verdicts = list(verdicts)
    failing = [verdict for verdict in verdicts if not verdict.conforms]
    if not failing:
        return []
    sources = steps(spec) | update_steps(spec)
    order = {name: place for place, name in enumerate((*steps(spec), *update_steps(spec)))}
    verdicts.sort(key=lambda verdict: order.get(verdict.tensor.replace("_grad_indices", "_grad_values"), len(order)))
    wrong = [verdict for verdict in verdicts if (verdict.own.worst > 1 if verdict.own and not verdict.problem
                                                 else not verdict.conforms)]
    return [Fault(verdict.tensor, operators.get(verdict.tensor, ""), optimizer, step, sources.get(verdict.tensor, ()),
                  verdict, bool(wrong)) for verdict in wrong or failing[:1]]
