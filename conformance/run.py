"""Running a case on a backend and judging everything that it computes."""

import itertools
from collections.abc import Callable, Iterable

import numpy as np

from conformance.case import Case
from conformance.quota import MOST_UNDECIDED, enforce, trace_quota, training_quota
from conformance.repeat import Recorded
from conformance.replay import Fault, find_faults, judge_trace
from conformance.result import BackendResult, CaseResult, PairResult, Section
from conformance.training import judge_training, operators
from conformance.trajectory import PATHS, Ensemble
from conformance.verdict import judge, ratio
from conformance.xfail import ExpectedFailures
from spec.backend import Backend, Model, is_repeatable
from spec.errors import EngineError
from spec.parameters import Arrays
from spec.pooling import coalesce
from spec.reference import Evaluation, evaluate
from spec.rounding import Tracked
from spec.tensors import slice_names

Progress = Callable[[str], None]


def run_case(case: Case, backends: Iterable[Backend], device: str = "cpu",
             progress: Progress = lambda message: None, expected: ExpectedFailures | None = None,
             repeats: bool = False, free: Case | None = None, most_undecided: float = MOST_UNDECIDED) -> CaseResult:
    """Every backend in turn, then every pair of them. `progress` is told what is about to run, once a step.

    With `repeats` a second model of each backend must make the same bits, where the backend promises that. `free`: a
    case with as many batches as training shall go on for without being re-synchronised (`conformance.trajectory`).
    `most_undecided`: see `conformance.quota.enforce`.

    Raises EngineError, naming the backend, where an engine fails or dies: that is no verdict on anything.
    """
    results, traces, ensembles = [], {}, {}
    for backend in backends:
        availability = backend.available()
        if not availability.ok:
            results.append(BackendResult(backend.name, "missing", trains=backend.trains,
                                         reason=availability.reason, remedy=availability.remedy))
            continue
        result = BackendResult(backend.name, "fails", trains=backend.trains)
        results.append(result)
        try:
            trace = _run_backend(case, backend, device, result, progress, repeats, most_undecided)
            if free and backend.trains:
                _run_free(free, backend, device, result, ensembles, progress)
        except EngineError as error:
            raise EngineError(f"{backend.name}: {error}") from None
        result.conclude(case.spec.name, expected or ExpectedFailures())
        known_wrong = {verdict.tensor for verdict in result.sections[0].tensors if verdict.xfail}
        traces[backend.name] = {name: tensor for name, tensor in trace.items() if name not in known_wrong}
    pairs = [_compare_pair(case, (a, traces[a]), (b, traces[b])) for a, b in itertools.combinations(traces, 2)]
    return CaseResult(case, results, pairs, free)


def first_failure(case: Case, backend: Backend, device: str = "cpu") -> Fault | None:
    """As `run_case` judges a backend under the first of the case's optimizers, up to the first thing that fails."""
    optimizer = case.optimizers[0] if case.optimizers and backend.trains else None
    model = backend.create(case.under(optimizer) if optimizer else case.spec, case.parameters, device)
    try:
        trace = model.trace(case.batches[0])
        expected = evaluate(case.spec, case.parameters, case.batches[0], backend.trains, engine=trace)
        faults = _judge_trace(case, model, trace, expected, backend.trains).faults
        if optimizer and not faults:
            faults = judge_training(case, model, optimizer, lambda message: None).faults
        return faults[0] if faults else None
    finally:
        model.close()


def steps_to_run(case: Case, backends: Iterable[Backend], repeats: bool = False, free: Case | None = None) -> int:
    """How often `progress` will be told of a step."""
    running = [backend.trains for backend in backends if backend.available().ok]
    steps = sum(1 + repeats + trains * len(case.optimizers) * len(case.batches) for trains in running)
    return steps + (len(free.optimizers) * (PATHS + sum(running)) if free and any(running) else 0)


def _run_free(case: Case, backend: Backend, device: str, result: BackendResult, ensembles: dict[str, Ensemble],
              progress: Progress) -> None:
    """The ensembles are made once, for all backends."""
    for optimizer in case.optimizers:
        if optimizer not in ensembles:
            ensembles[optimizer] = Ensemble(case, optimizer, progress)
        progress(f"{backend.name}: {optimizer}, {len(case.batches)} steps on its own")
        model = backend.create(case.under(optimizer), case.parameters, device)
        try:
            result.trajectories.append(ensembles[optimizer].judge(model))
        finally:
            model.close()


def _run_backend(case: Case, backend: Backend, device: str, result: BackendResult, progress: Progress,
                 repeats: bool, most_undecided: float) -> Arrays:
    """Fills the result; what of the trace can be compared with another backend's.

    The model that is traced goes on to train under the first optimizer: tracing and predicting change nothing.
    """
    def told(message: str) -> None:
        progress(f"{backend.name}: {message}")

    told("forward and backward" if backend.trains else "forward")
    first, *others = (case.optimizers if backend.trains else ()) or (None,)
    spec = case.under(first) if first else case.spec
    model = backend.create(spec, case.parameters, device)
    recorded = Recorded(model) if repeats else None
    model = recorded or model
    try:
        result.engine = model.engine
        trace = model.trace(case.batches[0])
        expected = evaluate(case.spec, case.parameters, case.batches[0], backend.trains, engine=trace)
        section = _judge_trace(case, model, trace, expected, backend.trains)
        enforce(section, trace_quota(case.spec, case.batches[0], backend.trains), most_undecided)
        result.sections.append(section)
        if first:
            result.sections.append(_trained(case, model, first, told, most_undecided))
    finally:
        model.close()
    if recorded:
        told("the same again")
        model = backend.create(spec, case.parameters, device)
        try:
            result.repeat = recorded.compare(model, is_repeatable(backend))
        finally:
            model.close()
    for optimizer in others:
        model = backend.create(case.under(optimizer), case.parameters, device)
        try:
            result.sections.append(_trained(case, model, optimizer, told, most_undecided))
        finally:
            model.close()
    incomparable = {verdict.tensor for verdict in section.tensors if verdict.problem}
    return {name: tensor for name, tensor in trace.items() if name not in incomparable}


def _trained(case: Case, model: Model, optimizer: str, progress: Progress, most_undecided: float) -> Section:
    section = judge_training(case, model, optimizer, progress)
    enforce(section, training_quota(case.under(optimizer), case.batches), most_undecided)
    return section


def _judge_trace(case: Case, model: Model, trace: Arrays, expected: Evaluation, gradients: bool) -> Section:
    replayed = evaluate(case.spec, case.parameters, case.batches[0], gradients, engine=trace, replay=True)
    verdicts = judge_trace(case.spec, trace, expected, replayed, gradients)
    verdicts.append(judge("predict", "forward", model.predict(case.batches[0]), expected.tensors["probability"]))
    return Section(None, 1, tensors=verdicts, kinks=dict(expected.kinks),
                   faults=find_faults(case.spec, verdicts, operators(model)))


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
