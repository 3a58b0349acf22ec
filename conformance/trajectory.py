"""Training that nobody re-synchronises: many steps of a backend on its own, judged against an ensemble.

Rounding errors feed on themselves from step to step, and no bound that is derived step by step stays useful for long.
So the question is put as in climate modelling: is the backend's path any further from the reference's than the paths
of an ensemble are, whose members are the reference, disturbed as little as float32 can be disturbed?
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from conformance.case import Case
from conformance.result import Section
from conformance.verdict import TensorVerdict, missing, ratio, unfit
from spec.backend import Model
from spec.counter import uniform
from spec.model import ModelSpec
from spec.parameters import Arrays, initial_state
from spec.reference import evaluate
from spec.update import update

MEMBERS = 8

PATHS = 1 + MEMBERS
"""How often the reference is trained for each optimizer."""

REACH = 4.0
"""A path conforms when it ends at most this many times as far from the reference's as the furthest member's does.

A member is moved once where an engine may round more than once: Caffe2 adds the lookups of a row one by one."""


@dataclass
class _Path:
    """`losses` float64 [steps]; `held`: parameters and optimizer state at the end, float32."""

    losses: np.ndarray
    held: Arrays

    def distance(self, other: "_Path", name: str, trained: np.ndarray | None) -> float:
        """Root of the mean square, over all steps' losses or over the `trained` elements of a tensor."""
        mine, others = (path.losses if name == "loss" else path.held[name][trained].astype(np.float64)
                        for path in (self, other))
        with np.errstate(invalid="ignore", over="ignore"):
            return float(np.sqrt(np.mean((mine - others) ** 2)))


class Ensemble:
    """The reference's path under one optimizer, and how far its members stray from it.

    The reference keeps float32 parameters and state and computes each step in float64. In a member every parameter at
    the start, and each element that a step has changed, is moved by one unit in its last place, up or down at random.
    """

    def __init__(self, case: Case, optimizer: str, progress: Callable[[str], None] = lambda message: None) -> None:
        """`progress` is told of each path that is about to be computed."""
        self._case, self._optimizer, self._spec = case, optimizer, case.under(optimizer)
        self._start = case.parameters | initial_state(self._spec)
        progress(f"{optimizer}: the reference's path")
        self._reference = _walk(self._spec, case, None)
        self._trained = {name: trained for name, start in self._start.items()
                         if (trained := self._reference.held[name] != start).any()}
        self._spread = dict.fromkeys(("loss", *self._trained), 0.0)
        for member in range(MEMBERS):
            progress(f"{optimizer}: path {member + 1} of {MEMBERS}")
            path = _walk(self._spec, case, member)
            for name, spread in self._spread.items():
                distance = path.distance(self._reference, name, self._trained.get(name))
                self._spread[name] = float(np.maximum(spread, distance))  # unlike max, NaN where either is

    def judge(self, model: Model) -> Section:
        """Train a new model through all batches. Verdicts of the losses, and of each parameter and moment that the
        reference changes: `value` is the distance, `bound` what it may be."""
        losses = np.array([model.train_step(batch) for batch in self._case.batches], np.float64)
        held = model.parameters() | model.optimizer_state()
        section = Section(self._optimizer, len(self._case.batches), self._spec.optimizer.learning_rate)
        section.tensors = [self._judge(name, _Path(losses, held)) for name in self._spread]
        section.required = sum(verdict.elements for verdict in section.tensors)
        return section

    def _judge(self, name: str, path: _Path) -> TensorVerdict:
        problem = "" if name == "loss" else unfit(path.held.get(name), self._start[name].shape)
        bound = REACH * self._spread[name]
        if not np.isfinite(bound):
            problem = "the ensemble diverges: nothing can be judged by it; use a smaller learning rate, or fewer steps"
        if problem:
            return missing(name, "trajectory", problem)
        trained = self._trained.get(name)
        idle = _Path(np.full_like(path.losses, self._reference.losses[0]), self._start)
        distance, unmoved = (each.distance(self._reference, name, trained) for each in (path, idle))
        return TensorVerdict(name, "trajectory", path.losses.size if trained is None else int(trained.sum()),
                             float(ratio(distance, bound)), value=distance, bound=bound, step=len(path.losses),
                             null_ratio=float(ratio(unmoved, bound)))


def _walk(spec: ModelSpec, case: Case, member: int | None) -> _Path:
    """`member` numbers one that is moved; None is the reference itself."""
    held = {name: array.copy() for name, array in case.parameters.items()}
    if member is not None:
        held = {name: _moved(array, f"{member}.{name}") for name, array in held.items()}
    held |= initial_state(spec)
    losses = []
    for step, batch in enumerate(case.batches):
        evaluation = evaluate(spec, held, batch)
        loss = np.float32(evaluation.tensors["loss"].value)
        losses.append(loss if member is None else _moved(loss, f"{member}.{step}.loss"))
        for name, updated in update(spec, held, held, evaluation).items():
            rows = slice(None) if updated.rows is None else updated.rows
            new, old = updated.new.value.astype(np.float32), held[name][rows]
            if member is not None:
                new = np.where(new != old, _moved(new, f"{member}.{step}.{name}"), old)
            held[name][rows] = new
    return _Path(np.array(losses, np.float64), held)


def _moved(array: np.ndarray, key: str) -> np.ndarray:
    """Every element by one unit in the last place, up or down."""
    up = uniform(0, key, array.shape, -1.0, 1.0) > 0
    return np.nextafter(array, np.where(up, np.float32(np.inf), np.float32(-np.inf)))
