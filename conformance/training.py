"""Judging training, step by step, each from the state that the backend itself had before it."""

from collections.abc import Callable

import numpy as np

from conformance.case import Case
from conformance.replay import find_faults, judge_trace, own_gradients
from conformance.result import Section
from conformance.verdict import TensorVerdict, judge, judge_fixed, judge_update, missing, unfit
from spec.backend import Model
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays, fixed_parameters, initial_state, parameter_shapes, state_shapes
from spec.reference import Evaluation, evaluate
from spec.update import Updated, update


def operators(model: Model) -> dict[str, str]:
    """What the model says of what makes each tensor, if it does (`spec.backend.NamesOperators`)."""
    names = getattr(model, "operators", None)  # isinstance would not see through a model that wraps another
    return names() if names else {}


def judge_training(case: Case, model: Model, optimizer: str, progress: Callable[[str], None]) -> Section:
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
    start = parameters | initial_state(spec)
    return unusable(spec, found) or [
        missing(name, "update", "differs from what training begins with, before the first step")
        for name, given in start.items() if not np.array_equal(found[name], given)]


def unusable(spec: ModelSpec, found: Arrays) -> list[TensorVerdict]:
    """Parameters and moments that a model should hold and does not, or as something else."""
    problems = {name: unfit(found.get(name), shape)
                for name, shape in (parameter_shapes(spec) | state_shapes(spec)).items()}
    return [missing(name, "update", problem) for name, problem in problems.items() if problem]


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
        verdict = judge_fixed(name, old[name], new.get(name))
        verdict.step = step
        verdicts.append(verdict)
    return verdicts


def _count_kinks(section: Section, evaluation: Evaluation, expected: dict[str, Updated]) -> None:
    counts = {name: updated.kinks for name, updated in expected.items() if updated.kinks} | evaluation.kinks
    for name, count in counts.items():
        section.kinks[name] = section.kinks.get(name, 0) + count
