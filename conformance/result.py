"""What a run found: verdicts by section, backend and case."""

from dataclasses import dataclass, field

from conformance.case import Case
from conformance.repeat import Repeat
from conformance.replay import Fault
from conformance.verdict import TensorVerdict
from conformance.xfail import ExpectedFailures


@dataclass
class Section:
    """Verdicts of one comparison: the trace (`optimizer` None), or the training steps under one optimizer.

    Attributes:
        kinks: elements within reach of a kink, by tensor, over all steps.
        faults: the steps at fault, in order; training steps are replayed where something fails, the trace always.
        required: elements that had to be compared (`conformance.quota`).
    """

    optimizer: str | None
    steps: int
    learning_rate: float | None = None
    tensors: list[TensorVerdict] = field(default_factory=list)
    kinks: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    required: int = 0


@dataclass
class BackendResult:
    """One backend on one case.

    Attributes:
        status: "conforms", "fails" or "missing" (not installed: see reason and remedy).
        repeat: whether a second model made the same bits, where that was tried.
        trajectories: training without re-synchronisation, by optimizer, where that was tried.
    """

    backend: str
    status: str
    engine: str = ""
    trains: bool = True
    reason: str = ""
    remedy: str = ""
    sections: list[Section] = field(default_factory=list)
    repeat: Repeat | None = None
    trajectories: list[Section] = field(default_factory=list)

    @property
    def verdicts(self) -> list[TensorVerdict]:
        """Of all sections, but not of trajectories, whose bounds are of another kind."""
        return [verdict for section in self.sections for verdict in section.tensors]

    @property
    def strays(self) -> list[tuple[str, TensorVerdict]]:
        """(optimizer, verdict) of what fails in training without re-synchronisation."""
        return [(section.optimizer, verdict) for section in self.trajectories for verdict in section.tensors
                if verdict.fails]

    @property
    def elements(self) -> int:
        return sum(verdict.elements for verdict in self.verdicts)

    @property
    def fault(self) -> Fault | None:
        """The first step at fault, where something does not conform that was not expected to fail."""
        known = {verdict.tensor for verdict in self.verdicts if verdict.xfail}
        return next((fault for section in self.sections for fault in section.faults if fault.tensor not in known), None)

    @property
    def worst(self) -> TensorVerdict | None:
        """The first tensor, in the order of computation, that fails; else, of those that conform, the one nearest
        its bound."""
        failing = [verdict for verdict in self.verdicts if verdict.fails]
        if failing:
            return failing[0]
        conforming = [verdict for verdict in self.verdicts if verdict.conforms]
        return max(conforming or self.verdicts, key=lambda verdict: verdict.worst, default=None)

    def conclude(self, preset: str, expected: ExpectedFailures) -> None:
        """Mark what was expected to fail; the status. Something must have been compared, and conform."""
        for section in (*self.sections, *self.trajectories):
            expected.mark(preset, self.backend, section.optimizer, section.tensors)
        compared = any(verdict.conforms and verdict.elements for verdict in self.verdicts)
        wrong = any(verdict.fails for verdict in self.verdicts) or self.strays or (self.repeat and self.repeat.broken)
        self.status = "conforms" if compared and not wrong else "fails"


@dataclass
class PairResult:
    """Two backends on the same trace: greatest |a - b| / (C sqrt(2 variance)), and where."""

    first: str
    second: str
    tensors: int
    elements: int
    worst: float
    tensor: str

    @property
    def conforms(self) -> bool:
        return self.elements > 0 and self.worst <= 1


@dataclass
class CaseResult:
    """`free`: the case of training without re-synchronisation, where that was tried."""

    case: Case
    backends: list[BackendResult]
    pairs: list[PairResult]
    free: Case | None = None

    @property
    def conforms(self) -> bool:
        """At least one backend ran, and nothing that ran failed."""
        ran = [result for result in self.backends if result.status != "missing"]
        return bool(ran) and all(result.status == "conforms" for result in ran) and all(
            pair.conforms for pair in self.pairs)
