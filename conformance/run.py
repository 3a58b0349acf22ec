"""Running a case on a backend and judging everything that it computes."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from conformance.case import Case
from conformance.replay import Fault, find_faults, judge_trace, own_gradients
from conformance.verdict import TensorVerdict, judge, judge_update, missing, ratio, unfit
from conformance.xfail import ExpectedFailures
from spec.backend import Backend, Model, NamesOperators
from spec.batch import Batch
from spec.errors import EngineError
from spec.model import ModelSpec
from spec.parameters import Arrays, fixed_parameters, initial_state
from spec.pooling import coalesce
from spec.reference import Evaluation, evaluate
from spec.rounding import Tracked
from spec.tensors import slice_names
from spec.update import Updated, update

Progress = Callable[[str], None]


@dataclass
class Section:
    """Verdicts of one comparison: the trace (`optimizer` None), or the training steps under one optimizer.

    `kinks` counts reference elements within reach of a kink, by tensor, over all steps. `faults` are the steps at
    fault, in order; training steps are replayed where something fails, the trace always.
    """

    optimizer: str | None
    steps: int
    learning_rate: float | None = None
    tensors: list[TensorVerdict] = field(default_factory=list)
    kinks: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


@dataclass
class BackendResult:
    """`status`: "conforms", "fails" or "missing" (not installed: see reason and remedy)."""

    backend: str
    status: str
    engine: str = ""
    trains: bool = True
    reason: str = ""
    remedy: str = ""
    sections: list[Section] = field(default_factory=list)

    @property
    def verdicts(self) -> list[TensorVerdict]:
        return [verdict for section in self.sections for verdict in section.tensors]

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
        for section in self.sections:
            expected.mark(preset, self.backend, section.optimizer, section.tensors)
        compared = any(verdict.conforms and verdict.elements for verdict in self.verdicts)
        self.status = "conforms" if compared and not any(verdict.fails for verdict in self.verdicts) else "fails"


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
    case: Case
    backends: list[BackendResult]
    pairs: list[PairResult]

    @property
    def conforms(self) -> bool:
        """At least one backend ran, and nothing that ran failed."""
        ran = [result for result in self.backends if result.status != "missing"]
        return bool(ran) and all(result.status == "conforms" for result in ran) and all(
            pair.conforms for pair in self.pairs)


def run_case(case: Case, backends: Iterable[Backend], device: str = "cpu",
             progress: Progress = lambda message: None, expected: ExpectedFailures | None = None) -> CaseResult:
    """Every backend in turn, then every pair of them. `progress` is told what is about to run, once a step.

    Raises EngineError, naming the backend, where an engine fails or dies: that is no verdict on anything.
    """
    results, traces = [], {}
    for backend in backends:
        availability = backend.available()
        if not availability.ok:
            results.append(BackendResult(backend.name, "missing", trains=backend.trains,
                                         reason=availability.reason, remedy=availability.remedy))
            continue
        result = BackendResult(backend.name, "fails", trains=backend.trains)
        results.append(result)
        try:
            trace = _run_backend(case, backend, device, result, progress)
        except EngineError as error:
            raise EngineError(f"{backend.name}: {error}") from None
        result.conclude(case.spec.name, expected or ExpectedFailures())
        known_wrong = {verdict.tensor for verdict in result.sections[0].tensors if verdict.xfail}
        traces[backend.name] = {name: tensor for name, tensor in trace.items() if name not in known_wrong}
    pairs = [_compare_pair(case, (a, traces[a]), (b, traces[b])) for a, b in itertools.combinations(traces, 2)]
    return CaseResult(case, results, pairs)


def first_failure(case: Case, backend: Backend, device: str = "cpu") -> Fault | None:
    """As `run_case` judges a backend under the first of the case's optimizers, up to the first thing that fails."""
    optimizer = case.optimizers[0] if case.optimizers and backend.trains else None
    model = backend.create(case.under(optimizer) if optimizer else case.spec, case.parameters, device)
    try:
        trace = model.trace(case.batches[0])
        expected = evaluate(case.spec, case.parameters, case.batches[0], backend.trains, engine=trace)
        faults = _judge_trace(case, model, trace, expected, backend.trains).faults
        if optimizer and not faults:
            faults = _judge_training(case, model, optimizer, lambda message: None).faults
        return faults[0] if faults else None
    finally:
        model.close()


def steps_to_run(case: Case, backends: Iterable[Backend]) -> int:
    """How often `progress` will be told of a step."""
    return sum(1 + (len(case.optimizers) * len(case.batches) if backend.trains else 0) for backend in backends
               if backend.available().ok)


def _run_backend(case: Case, backend: Backend, device: str, result: BackendResult, progress: Progress) -> Arrays:
    """Fills the result; what of the trace can be compared with another backend's.

    The model that is traced goes on to train under the first optimizer: tracing and predicting change nothing.
    """
    def told(message: str) -> None:
        progress(f"{backend.name}: {message}")

    told("forward and backward" if backend.trains else "forward")
    first, *others = (case.optimizers if backend.trains else ()) or (None,)
    model = backend.create(case.under(first) if first else case.spec, case.parameters, device)
    try:
        result.engine = model.engine
        trace = model.trace(case.batches[0])
        expected = evaluate(case.spec, case.parameters, case.batches[0], backend.trains, engine=trace)
        section = _judge_trace(case, model, trace, expected, backend.trains)
        result.sections.append(section)
        if first:
            result.sections.append(_judge_training(case, model, first, told))
    finally:
        model.close()
    for optimizer in others:
        model = backend.create(case.under(optimizer), case.parameters, device)
        try:
            result.sections.append(_judge_training(case, model, optimizer, told))
        finally:
            model.close()
    incomparable = {verdict.tensor for verdict in section.tensors if verdict.problem}
    return {name: tensor for name, tensor in trace.items() if name not in incomparable}


def _judge_trace(case: Case, model: Model, trace: Arrays, expected: Evaluation, gradients: bool) -> Section:
    replayed = evaluate(case.spec, case.parameters, case.batches[0], gradients, engine=trace, replay=True)
    verdicts = judge_trace(case.spec, trace, expected, replayed, gradients)
    verdicts.append(judge("predict", "forward", model.predict(case.batches[0]), expected.tensors["probability"]))
    return Section(None, 1, tensors=verdicts, kinks=dict(expected.kinks),
                   faults=find_faults(case.spec, verdicts, operators(model)))


def operators(model: Model) -> dict[str, str]:
    """What the model says of what makes each tensor, if it does."""
    return model.operators() if isinstance(model, NamesOperators) else {}


def _judge_training(case: Case, model: Model, optimizer: str, progress: Progress) -> Section:
    """Train from the initial parameters; each step is judged from the state the backend itself had before it.

    The trace before the step tells on which side of each kink the backend was; the step itself may be another
    program, rounded otherwise. What cannot be compared ends the training: the next step would have nothing to be judged
    from.
    """
    spec = case.under(optimizer)
    section = Section(optimizer, len(case.batches), spec.optimizer.learning_rate)
    merged: dict[str, TensorVerdict] = {}
    before, state = model.parameters(), model.optimizer_state()
    section.tensors = _judge_start(spec, case.parameters, before | state)
    if section.tensors:
        section.faults = find_faults(spec, section.tensors, operators(model), optimizer)
        return section
    for step, batch in enumerate(case.batches, start=1):
        progress(f"{optimizer}, step {step}")
        trace = model.trace(batch)
        evaluation = evaluate(spec, before, batch, engine=trace, same_run=False)
        loss = model.train_step(batch)
        after, new_state = model.parameters(), model.optimizer_state()
        expected = update(spec, before, state, evaluation)
        verdicts = _judge_step(spec, step, evaluation, loss, before | state, after | new_state, expected)
        if not all(verdict.conforms for verdict in verdicts):
            replayed = evaluate(spec, before, batch, engine=trace, replay=True)
            traced = judge_trace(spec, trace, evaluation, replayed, gradients=True)
            own = update(spec, before, state, own_gradients(evaluation, trace, traced))
            verdicts = _judge_step(spec, step, evaluation, loss, before | state, after | new_state, expected, own)
            section.faults += find_faults(spec, [*traced, *verdicts], operators(model), optimizer, step)
        _count_kinks(section, evaluation, expected)
        for verdict in verdicts:
            known = merged.get(verdict.tensor)
            merged[verdict.tensor] = known.merge(verdict) if known else verdict
        if any(verdict.problem for verdict in verdicts):
            break
        before, state = after, new_state
    else:
        verdict = _judge_prediction(spec, before, case.batches[-1], model)
        section.faults += find_faults(spec, [verdict], {}, optimizer, len(case.batches))
        merged[verdict.tensor] = verdict
    section.tensors = list(merged.values())
    return section


def _judge_prediction(spec: ModelSpec, parameters: Arrays, batch: Batch, model: Model) -> TensorVerdict:
    """Of a trained model: predictions go on with what it has learned."""
    expected = evaluate(spec, parameters, batch, gradients=False)
    return judge("predict", "forward", model.predict(batch), expected.tensors["probability"])


def _judge_start(spec: ModelSpec, parameters: Arrays, found: Arrays) -> list[TensorVerdict]:
    """Only what is wrong: a model begins with the parameters that it was given and state of zeros, bit for bit."""
    wrong = []
    for name, given in (parameters | initial_state(spec)).items():
        if name not in found:
            wrong.append(missing(name, "update"))
        elif problem := unfit(found[name], given.shape):
            wrong.append(missing(name, "update", problem))
        elif not np.array_equal(found[name], given):
            wrong.append(missing(name, "update", "differs from what training begins with, before the first step"))
    return wrong


def _judge_step(spec: ModelSpec, step: int, evaluation: Evaluation, loss: float, old: Arrays, new: Arrays,
                expected: dict[str, Updated], replayed: dict[str, Updated] | None = None) -> list[TensorVerdict]:
    """The loss that the step returned, and parameters and state, which were `old` and are `new`."""
    verdict = judge("loss", "forward", np.asarray(loss, np.float32), evaluation.tensors["loss"])
    verdict.step = step
    verdicts = [verdict]
    for name, updated in expected.items():
        verdicts.append(judge_update(name, old[name], new[name], updated, step, replayed and replayed[name])
                        if name in new and name in old else missing(name, "update"))
    for name in sorted(fixed_parameters(spec)):
        same = name in new and np.array_equal(old[name], new[name])
        verdicts.append(TensorVerdict(name, "update", old[name].size, step=step,
                                      problem="" if same else "changed, and is not trained"))
    return verdicts


def _count_kinks(section: Section, evaluation: Evaluation, expected: dict[str, Updated]) -> None:
    counts = {name: updated.kinks for name, updated in expected.items() if updated.kinks} | evaluation.kinks
    for name, count in counts.items():
        section.kinks[name] = section.kinks.get(name, 0) + count


def _compare_pair(case: Case, first: tuple[str, Arrays], second: tuple[str, Arrays]) -> PairResult:
    """Both traces were judged against the reference; here against each other, on the tensors both have."""
    pair = PairResult(first[0], second[0], 0, 0, 0.0, "")
    for name, expected in case.first.tensors.items():
        if name in first[1] and name in second[1]:
            _add_to_pair(pair, name, expected, first[1][name], second[1][name])
    for parameter, expected in case.first.rows.items():
        names = slice_names(parameter)
        if all(name in trace for name in names for trace in (first[1], second[1])):
            a, b = (coalesce(trace[names[0]], trace[names[1]])[1] for trace in (first[1], second[1]))
            _add_to_pair(pair, names[1], expected.gradient, a, b)
    return pair


def _add_to_pair(pair: PairResult, name: str, expected: Tracked, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.size == 0:
        return  # rows that one of them left out have failed already, against the reference
    both = Tracked(expected.value, 2 * expected.variance)
    worst = float(ratio(np.abs(a.astype(np.float64) - b), both.reach).max())
    pair.tensors += 1
    pair.elements += a.size
    if worst >= pair.worst:
        pair.worst, pair.tensor = worst, name
