"""Judging one tensor of a backend against the float64 reference (SPEC.md, 10).

Every bundle holds a copy of this file, which must run where there is NumPy and nothing else.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from spec.pooling import RowGradient, coalesce
from spec.rounding import Tracked

if TYPE_CHECKING:
    from spec.update import Updated

RATIO_EDGES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
"""Edges of the histogram of error / bound: elements below the first, between two, above the last."""


@dataclass
class Own:
    """The error of the one step that made a tensor: how far it is from the float64 result of the backend's own
    inputs of that step.

    Attributes:
        worst: greatest own error over the bound that this step alone allows.
        place, value, reference, bound: of that element; `reference` is the replayed step's.
        beyond: how many elements are above that bound.
        error, inherited: of the element that the verdict names: value - replayed, and replayed - reference, what its
            inputs had brought along. They add up to the whole error.
    """

    worst: float
    place: list[int]
    value: float
    reference: float
    bound: float
    beyond: int
    error: float
    inherited: float

    def summary(self, tensor: str) -> str:
        return (f"{tensor}{self.place or ''} = {self.value:.9g}, its own inputs give {self.reference:.9g} "
                f"+- {self.bound:.2g} (own error / bound {self.worst:.3g})")


@dataclass
class TensorVerdict:
    """What was compared for one tensor, and its worst element.

    Attributes:
        phase: "forward", "backward" or "update".
        elements: how many were compared (over all steps).
        worst: greatest error / bound; infinite where the bound is 0 and the error is not.
        place, value, reference, bound, step: of that element.
        tightness: rms of the bound over rms of the reference; 0 where the arithmetic is exact.
        null_ratio: what a null result would score as `worst`: all zeros or, for an update, the tensor left as it
            was. None where the null result is the right one.
        histogram: elements by error / bound, see RATIO_EDGES.
        problem: why the comparison says nothing, whatever it found: the tensor is missing or of another shape or dtype,
            the reference is not finite, too few elements were compared.
        xfail: why it was expected not to conform, where it was and does not (`conformance.xfail`).
        own: the part of the error that this tensor's own step made, where it was replayed.
    """

    tensor: str
    phase: str
    elements: int = 0
    worst: float = 0.0
    place: list[int] = field(default_factory=list)
    value: float = 0.0
    reference: float = 0.0
    bound: float = 0.0
    step: int = 0
    tightness: float = 0.0
    null_ratio: float | None = None
    histogram: list[int] = field(default_factory=lambda: [0] * (len(RATIO_EDGES) + 1))
    problem: str = ""
    xfail: str = ""
    own: Own | None = None

    @property
    def conforms(self) -> bool:
        return not self.problem and self.worst <= 1

    @property
    def fails(self) -> bool:
        """It does not conform, and nobody expected that."""
        return not self.conforms and not self.xfail

    def merge(self, later: "TensorVerdict") -> "TensorVerdict":
        """The same tensor at another step: the worse of the two, over the elements of both."""
        worse = later if (bool(later.problem), later.worst) > (bool(self.problem), self.worst) else self
        ratios = [r for r in (self.null_ratio, later.null_ratio) if r is not None]
        return replace(
            worse, elements=self.elements + later.elements, tightness=max(self.tightness, later.tightness),
            null_ratio=min(ratios, default=None),
            histogram=[a + b for a, b in zip(self.histogram, later.histogram, strict=True)])

    def summary(self) -> str:
        """One line: what is wrong and where, or the worst of what is right."""
        if self.problem:
            return f"{self.tensor}: {self.problem}"
        return (f"{self.tensor}{self.place} = {self.value:.9g}, expected {self.reference:.9g} +- {self.bound:.2g} "
                f"(error / bound {self.worst:.3g}, step {self.step})")


_ABSENT = "the backend did not return it"


def missing(tensor: str, phase: str, problem: str = _ABSENT) -> TensorVerdict:
    return TensorVerdict(tensor, phase, problem=problem)


def ratio(error: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """error / bound, where 0 / 0 is 0 and a NaN error is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(error == 0, 0.0, error / bound)
    return np.where(np.isnan(quotient), np.inf, quotient)


def judge(tensor: str, phase: str, value: np.ndarray, expected: Tracked,
          replayed: Tracked | None = None) -> TensorVerdict:
    """Compare a float32 tensor with the reference, element by element; and with the replay of its own step."""
    problem = unfit(value, expected.value.shape)
    return missing(tensor, phase, problem) if problem else _compare(tensor, phase, value, expected, replayed=replayed)


def judge_rows(tensor: str, indices: np.ndarray, values: np.ndarray, expected: RowGradient,
               replayed: RowGradient | None = None) -> TensorVerdict:
    """Compare a sparse gradient, its duplicates summed first. Rows left out count as zero; rows too many fail."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        problem = f"expected integer indices [K], found {indices.dtype}{list(indices.shape)}"
    else:
        problem = unfit(values, (len(indices), *expected.gradient.value.shape[1:]))
    if problem:
        return missing(tensor, "backward", problem)
    extra = np.setdiff1d(indices, expected.rows)
    if extra.size:
        return missing(tensor, "backward", f"row {int(extra[0])} has a gradient and was not looked up")
    complete = complete_rows(expected.rows, indices, values)
    return _compare(tensor, "backward", complete, expected.gradient, rows=expected.rows,
                    replayed=replayed.gradient if replayed else None)


def complete_rows(expected: np.ndarray, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A sparse gradient as float64 sums of each of the `expected` rows, ascending; zero for those that it lacks."""
    rows, sums = coalesce(indices, values)
    complete = np.zeros((len(expected), *values.shape[1:]))
    complete[np.searchsorted(expected, rows)] = sums
    return complete


def judge_update(tensor: str, before: np.ndarray, after: np.ndarray, expected: "Updated", step: int,
                 replayed: "Updated | None" = None) -> TensorVerdict:
    """Compare a parameter or a moment after a step; rows that the step does not concern must keep their bits."""
    problem = unfit(after, before.shape)
    if problem:
        return missing(tensor, "update", problem)
    rows = slice(None) if expected.rows is None else expected.rows
    verdict = _compare(tensor, "update", after[rows], expected.new, expected.rows, before[rows], step,
                       replayed.new if replayed else None)
    if expected.rows is not None:
        untouched = np.ones(len(before), bool)
        untouched[rows] = False
        changed = untouched & (before.view(np.int32) != after.view(np.int32)).reshape(len(before), -1).any(1)
        others = int(untouched.sum()) * (before.size // max(len(before), 1))
        verdict.elements += others
        verdict.histogram[0] += others
        if changed.any():
            verdict.problem = f"row {int(np.flatnonzero(changed)[0])} changed, and was not looked up"
    return verdict


def judge_fixed(tensor: str, before: np.ndarray, after: object) -> TensorVerdict:
    """A parameter that no optimizer trains keeps its bits."""
    problem = unfit(after, before.shape)
    if not problem and after.tobytes() != before.tobytes():
        problem = "changed, and is not trained"
    verdict = missing(tensor, "update", problem)
    if not problem:
        verdict.elements = verdict.histogram[0] = before.size
    return verdict


def unfit(value: object, shape: tuple[int, ...]) -> str:
    """Why a value cannot be compared with a float32 tensor of this shape; empty where it can. None is no value."""
    if value is None:
        return _ABSENT
    if not isinstance(value, np.ndarray | np.generic):
        return f"expected a NumPy array, found {type(value).__name__}"
    if value.dtype == np.float32 and value.shape == shape:
        return ""
    return f"expected float32{list(shape)}, found {value.dtype}{list(value.shape)}"


def _compare(tensor: str, phase: str, value: np.ndarray, expected: Tracked, rows: np.ndarray | None = None,
             null: np.ndarray | float = 0.0, step: int = 0, replayed: Tracked | None = None) -> TensorVerdict:
    """`rows` names the rows of `value` in messages; `null` is the null result (see TensorVerdict)."""
    if value.size == 0:
        return TensorVerdict(tensor, phase, step=step)
    bound = expected.reach
    unbounded = np.argwhere(~(np.isfinite(bound) & np.isfinite(expected.value)))
    if len(unbounded):
        place = tuple(unbounded[0])
        return missing(tensor, phase, f"nothing can be judged at {_named(place, rows)}, where the reference is "
                                      f"{expected.value[place]:g} +- {bound[place]:g}")
    ratios = ratio(np.abs(value - expected.value), bound)
    place = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
    scale = float(np.sqrt(np.mean(expected.value**2)))
    distance = np.abs(expected.value - null)
    return TensorVerdict(
        tensor, phase, elements=value.size, worst=float(ratios[place]), place=_named(place, rows),
        value=float(value[place]),
        reference=float(expected.value[place]), bound=float(bound[place]), step=step,
        tightness=float(np.sqrt(np.mean(bound**2))) / scale if scale else 0.0,
        null_ratio=float(ratio(distance, bound).max()) if distance.any() else None,
        histogram=np.bincount(np.searchsorted(RATIO_EDGES, ratios.ravel()), minlength=len(RATIO_EDGES) + 1).tolist(),
        own=_own(value, expected, replayed, place, rows) if replayed else None)


def _own(value: np.ndarray, expected: Tracked, replayed: Tracked, place: tuple[np.intp, ...],
         rows: np.ndarray | None) -> Own:
    """A result that its inputs make infinite or NaN is no error of its own step."""
    with np.errstate(invalid="ignore"):
        error = value - replayed.value
        inherited = replayed.value[place] - expected.value[place]
    both = ~np.isfinite(value) & ~np.isfinite(replayed.value)
    ratios = ratio(np.where(both, 0, np.abs(error)), replayed.reach)
    worst = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
    return Own(float(ratios[worst]), _named(worst, rows), float(value[worst]), float(replayed.value[worst]),
               float(replayed.reach[worst]), int((ratios > 1).sum()), float(error[place]), float(inherited))


def _named(place: tuple[np.intp, ...], rows: np.ndarray | None) -> list[int]:
    named = [int(i) for i in place]
    if rows is not None:
        named[0] = int(rows[place[0]])
    return named
