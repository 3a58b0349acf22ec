"""What one backend was held against, counted: whether its verdict means anything."""

from collections.abc import Iterable
from dataclasses import dataclass

from conformance.result import BackendResult
from conformance.verdict import RATIO_EDGES, TensorVerdict

SUSPICIOUS = 1e-3
"""An inexact tensor whose worst error / bound is below this: its bound is wider than the arithmetic needs."""


@dataclass
class Doubt:
    """A tensor whose bound may mean nothing. `where`: "forward", "backward" or an optimizer."""

    where: str
    tensor: str
    worst: float
    elements: int


@dataclass
class Ledger:
    """Over all sections; trajectories are not in it.

    Attributes:
        tensors, elements: that were compared; `required` elements had to be.
        failing: tensors that do not conform, and were not expected to.
        exact, inexact: tensors whose arithmetic leaves no room for error, and the others.
        undecided: elements within reach of a kink.
        histogram: elements by error / bound, see RATIO_EDGES.
        suspicious: tensors nearer to the reference than float32 can be expected to come.
        vacuous: tensors of which a null result would have conformed.
        loosest: greatest rms(bound) / rms(tensor).
        weakest: least score of a null result; None where none was wrong.
    """

    tensors: int
    elements: int
    required: int
    failing: int
    exact: int
    inexact: int
    undecided: int
    histogram: list[int]
    suspicious: list[Doubt]
    vacuous: list[Doubt]
    loosest: float
    weakest: float | None


def ledger(result: BackendResult) -> Ledger:
    found = [(section.optimizer or verdict.phase, verdict) for section in result.sections
             for verdict in section.tensors]
    verdicts = [verdict for _, verdict in found]
    judged = [verdict for verdict in verdicts if not verdict.problem]
    inexact = sum(verdict.tightness > 0 for verdict in judged)
    return Ledger(
        len(verdicts), result.elements, sum(section.required for section in result.sections),
        sum(verdict.fails for verdict in verdicts), len(judged) - inexact, inexact,
        sum(count for section in result.sections for count in section.kinks.values()),
        [sum(verdict.histogram[place] for verdict in verdicts) for place in range(len(RATIO_EDGES) + 1)],
        _doubts((where, verdict) for where, verdict in found
                if verdict.conforms and verdict.tightness > 0 and verdict.worst < SUSPICIOUS),
        _doubts((where, verdict) for where, verdict in found
                if verdict.null_ratio is not None and verdict.null_ratio <= 1),
        max((verdict.tightness for verdict in verdicts), default=0.0),
        min((verdict.null_ratio for verdict in verdicts if verdict.null_ratio is not None), default=None))


def _doubts(found: Iterable[tuple[str, TensorVerdict]]) -> list[Doubt]:
    return [Doubt(where, verdict.tensor, verdict.worst, verdict.elements) for where, verdict in found]
