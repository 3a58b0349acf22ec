"""What must have been compared, from the spec and the batches alone: a run that compared less proves less than it says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from conformance.result import Section
from conformance.verdict import missing
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import parameter_shapes, state_shapes
from spec.shapes import activation_shapes, trace_shapes

MOST_UNDECIDED = 0.01
"""Share of a tensor's elements that may lie within reach of a kink, where either outcome is granted. In the report
of `make run` it is below 1e-4."""

FEW = 4
"""As many elements may in any case: one of a bias of ten is a tenth of it."""


class Quota(NamedTuple):
    """`elements` that must be compared, by tensor; `deciding`: of tensors that may lie within reach of a kink, all."""

    elements: Mapping[str, int]
    deciding: Mapping[str, int]


def trace_quota(spec: ModelSpec, batch: Batch, gradients: bool) -> Quota:
    """One trace, and one prediction. A sparse gradient counts as its values, once for each row."""
    sizes = {name: prod(shape) for name, shape in trace_shapes(spec, batch, gradients).items()
             if not name.endswith("_grad_indices")}
    return Quota(sizes | {"predict": batch.size}, sizes)


def training_quota(spec: ModelSpec, batches: Sequence[Batch]) -> Quota:
    """The loss, every parameter, trained or not, and all state after each step; at the end one prediction."""
    held = {name: prod(shape) * len(batches) for name, shape in (parameter_shapes(spec) | state_shapes(spec)).items()}
    samples = sum(batch.size for batch in batches)
    activations = {name: prod(shape) for name, shape in activation_shapes(spec, samples).items()}
    return Quota({"loss": len(batches), **held, "predict": batches[-1].size}, activations | held)


def enforce(section: Section, quota: Quota, most_undecided: float = MOST_UNDECIDED) -> None:
    """Let each tensor fail of which too little was compared, or a share above `most_undecided` left undecided.

    Those come behind the others: what ended the comparison stays the first failure.
    """
    section.required = sum(quota.elements.values())
    problems = {name: f"{count:,} of {quota.deciding[name]:,} elements are undecided, within reach of a kink"
                for name, count in section.kinks.items() if count > max(FEW, most_undecided * quota.deciding[name])}
    verdicts = {verdict.tensor: verdict for verdict in section.tensors}
    ending = next((f"; it ended at {verdict.tensor}" for verdict in section.tensors if verdict.problem), "")
    for name, needed in quota.elements.items():
        compared = verdicts[name].elements if name in verdicts else 0
        if compared < needed or name not in verdicts:
            problems[name] = f"{compared:,} of {needed:,} elements were compared{ending}"
    failed = [replace(verdict, problem=problems[name]) if (verdict := verdicts.get(name)) else
              missing(name, _phase(name, section.optimizer), problems[name])
              for name in problems if not (name in verdicts and verdicts[name].problem)]
    behind = {verdict.tensor for verdict in failed}
    section.tensors = [verdict for verdict in section.tensors if verdict.tensor not in behind] + failed


def _phase(tensor: str, optimizer: str | None) -> str:
    if optimizer:
        return "forward" if tensor in ("loss", "predict") else "update"
    return "backward" if tensor.endswith(("_grad", "_grad_values")) else "forward"
