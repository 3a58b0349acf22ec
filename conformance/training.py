"""Judging training, step by step, each from the state that the backend itself had before it."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from conformance.case import Case
from conformance.pipeline import pipelined
from conformance.replay import Fault, find_faults, judge_trace, own_gradients
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


class _Step(NamedTuple):
    """What a model made of one training step: parameters and state, `old` before it and `new` after it."""

    number: int
    batch: Batch
    trace: Arrays
    loss: float
    old: tuple[Arrays, Arrays]
    new: tuple[Arrays, Arrays]


class _Judgement(NamedTuple):
    verdicts: list[TensorVerdict]
    faults: list[Fault]
    kinks: dict[str, int]

    @property
    def ends(self) -> bool:
        """What cannot be compared ends the training: the next step would have nothing to be judged from."""
        return any(verdict.problem for verdict in self.verdicts)


def judge_training(case: Case, model: Model, optimizer: str, progress: Callable[[str], None]) -> Section:
    """Train from the initial parameters; each step is judged from the state the backend itself had before it.

    The trace before the step tells on which side of each kink the backend was; the step itself may be another
    program, rounded otherwise. While a step is judged the model takes the next one.
    """
    spec = case.under(optimizer)
    section = Section(optimizer, len(case.batches), spec.optimizer.learning_rate)
    merged: dict[str, TensorVerdict] = {}
    start = model.parameters(), model.optimizer_state()
    section.tensors = _judge_start(spec, case.parameters, start[0] | start[1])
    if section.tensors:
        section.faults = find_faults(spec, section.tensors, operators(model), optimizer)
        return section
    names = operators(model)
    for judgement in pipelined(_train(case.batches, model, start, lambda step: progress(f"{optimizer}, step {step}")),
                               lambda step: _judge(spec, step, names)):
        section.faults += judgement.faults
        for name, count in judgement.kinks.items():
            section.kinks[name] = section.kinks.get(name, 0) + count
        for verdict in judgement.verdicts:
            known = merged.get(verdict.tensor)
            merged[verdict.tensor] = known.merge(verdict) if known else verdict
        if judgement.ends:
            break
    else:
        verdict = _judge_prediction(spec, model.parameters(), case.batches[-1], model)
        section.faults += find_faults(spec, [verdict], {}, optimizer, len(case.batches))
        merged[verdict.tensor] = verdict
    section.tensors = list(merged.values())
    return section


def _train(batches: Sequence[Batch], model: Model, held: tuple[Arrays, Arrays],
           progress: Callable[[int], None]) -> Iterator[_Step]:
    for number, batch in enumerate(batches, start=1):
        progress(number)
        trace = {name: array.copy() if isinstance(array, np.ndarray) else array  # it is judged during the next
                 for name, array in model.trace(batch).items()}
        loss = model.train_step(batch)
        after = model.parameters(), model.optimizer_state()
        yield _Step(number, batch, trace, loss, held, after)
        held = after


def _judge(spec: ModelSpec, step: _Step, names: dict[str, str]) -> _Judgement:
    """`names`: of the operators of the model."""
    (before, state), optimizer = step.old, spec.optimizer.kind
    evaluation = evaluate(spec, before, step.batch, engine=step.trace, same_run=False)
    expected = update(spec, before, state, evaluation)
    verdicts, faults = _judge_step(spec, step, evaluation, expected), []
    if not all(verdict.conforms for verdict in verdicts):
        replayed = evaluate(spec, before, step.batch, engine=step.trace, replay=True)
        traced = judge_trace(spec, step.trace, evaluation, replayed, gradients=True)
        own = update(spec, before, state, own_gradients(evaluation, step.trace, traced))
        verdicts = _judge_step(spec, step, evaluation, expected, own)
        faults = find_faults(spec, [*traced, *verdicts], names, optimizer, step.number)
    kinks = {name: updated.kinks for name, updated in expected.items() if updated.kinks} | evaluation.kinks
    return _Judgement(verdicts, faults, kinks)


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


def _judge_step(spec: ModelSpec, step: _Step, evaluation: Evaluation, expected: dict[str, Updated],
                replayed: dict[str, Updated] | None = None) -> list[TensorVerdict]:
    """The loss that the step returned, parameters and state."""
    old, new = step.old[0] | step.old[1], step.new[0] | step.new[1]
    verdict = judge("loss", "forward", np.asarray(step.loss, np.float32), evaluation.tensors["loss"])
    verdict.step = step.number
    verdicts = [verdict]
    for name, updated in expected.items():
        verdicts.append(judge_update(name, old[name], new[name], updated, step.number, replayed and replayed[name])
                        if name in new and name in old else missing(name, "update"))
    for name in sorted(fixed_parameters(spec)):
        verdict = judge_fixed(name, old[name], new.get(name))
        verdict.step = step.number
        verdicts.append(verdict)
    return verdicts
