"""The mutation score: which seeded faults the suite catches, and whether it names the operator at fault."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from conformance.case import Case, make_case
from conformance.mutants.mutant import Mutant, Mutated
from conformance.run import first_failure
from spec.backend import Backend
from spec.errors import EngineError, InputError
from spec.graph import steps
from spec.model import ModelSpec
from spec.tamper import for_many

STEPS = 2


@dataclass
class Outcome:
    """One mutant, or one control, on one backend.

    Attributes:
        status: "killed" or "survived"; "equivalent" where it makes no difference, for the `reason`; "absent" where
            the backend does nothing of the kind.
        inside: whether the fault was inside the backend, so that all behind it followed from it.
        fault: the tensor that was named first, and `summary` all that was said.
        localised: whether that is the operator that was changed; None where the fault is in no single one.
    """

    spec: str
    backend: str
    mutant: Mutant
    status: str
    reason: str = ""
    inside: bool = False
    fault: str = ""
    summary: str = ""
    localised: bool | None = None


def run_mutants(spec: ModelSpec, mutants: Sequence[Mutant], backends: Iterable[Backend], seed: int = 0,
                batch_size: int | None = None, progress: Callable[[str], None] = lambda message: None
                ) -> Iterator[Outcome]:
    """Every mutant on every backend, each up to its first failure. Raises EngineError where an engine fails.

    Cases of a setting are made once.
    """
    backends = [for_many(backend) for backend in backends]

    @cache
    def case_of(digest: str) -> Case:
        return make_case(made[digest], "random", seed, batch_size, STEPS, ("sgd",))

    made: dict[str, ModelSpec] = {}
    for mutant in mutants:
        try:
            setting = mutant.setting(spec) if mutant.setting else spec
        except (IndexError, InputError):  # too few tables
            for backend in backends:
                yield Outcome(spec.name, backend.name, mutant, "absent", f"'{spec.name}' cannot have such an operator")
            continue
        made[setting.digest] = setting
        for backend in backends:
            progress(f"{spec.name}: {backend.name}: {mutant.name}")
            if not _reaches(mutant, setting, backend):
                yield Outcome(spec.name, backend.name, mutant, "absent", "the backend or the spec has no such step")
                continue
            case = case_of(setting.digest)
            case = replace(case, optimizers=(mutant.optimizer,) if mutant.optimizer else ())
            if mutant.corner:
                case = replace(case, parameters=mutant.corner(case.parameters))
            yield _run(case, mutant, backend)


def _reaches(mutant: Mutant, spec: ModelSpec, backend: Backend) -> bool:
    if mutant.optimizer and not backend.trains:
        return False
    if mutant.step:
        return mutant.at(spec) in steps(spec, backend.trains)
    return backend.trains or (mutant.phase == "data" and not {"loss", "probability_grad"} & set(mutant.named))


def _run(case: Case, mutant: Mutant, backend: Backend) -> Outcome:
    mutated = Mutated(backend, mutant)
    try:
        fault = first_failure(case, mutated)
    except EngineError as error:
        raise EngineError(f"{mutated.name}: {error}") from None
    reason = mutant.equivalent(case) if mutant.equivalent else ""
    outcome = Outcome(case.spec.name, backend.name, mutant, "equivalent" if reason else "survived", reason,
                      bool(mutated.tamper))
    if fault is None:
        return outcome
    outcome.status, outcome.fault, outcome.summary = "killed", fault.tensor, fault.summary()
    if mutant.tensor or mutant.named:
        outcome.localised = mutant.names(case.spec, fault.tensor)
    return outcome


@dataclass
class Score:
    """Counts over outcomes. A mutant counts once for each backend that it was tried on."""

    killed: int
    survived: int
    equivalent: int
    absent: int
    localised: int
    localisable: int

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> "Score":
        outcomes = list(outcomes)
        count = [sum(outcome.status == status for outcome in outcomes)
                 for status in ("killed", "survived", "equivalent", "absent")]
        told = [outcome.localised for outcome in outcomes if outcome.localised is not None]
        return cls(*count, sum(told), len(told))

    @property
    def share(self) -> float:
        """Killed, of those that make a difference."""
        return self.killed / max(self.killed + self.survived, 1)
