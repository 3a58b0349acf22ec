"""Faults of the optimizers, and of what a training step leaves behind."""

import numpy as np

from conformance.mutants import settings
from conformance.mutants.mutant import Mutant, Step
from spec.model import ModelSpec
from spec.parameters import Arrays, is_sparse, trained_parameters

_W, _H = "top.0.weight", "top.0.weight.moment"
_TABLE, _TABLE_H = "tables.0.weight", "tables.0.weight.moment"


def _rate(spec: ModelSpec) -> np.float32:
    return np.float32(spec.optimizer.learning_rate)


def _adagrad(step: Step, name: str, h: np.ndarray, root: np.ndarray | None = None) -> np.ndarray:
    """w - lr g / (sqrt(h) + eps)"""
    root = np.sqrt(h) + np.float32(step.spec.optimizer.eps) if root is None else root
    g = step.gradients[name]
    root = root[:, None] if root.ndim < g.ndim else root
    return np.where(g != 0, step.before[name] - _rate(step.spec) * g / np.where(g != 0, root, 1), step.before[name])


def _eps_inside(step: Step) -> Arrays:
    h = step.after[_H]
    return {_W: _adagrad(step, _W, h, np.sqrt(h + np.float32(step.spec.optimizer.eps)))}


def _moment_not_kept(step: Step) -> Arrays:
    return {_H: step.before[_H]}


def _old_moment(step: Step) -> Arrays:
    """The step divides by the root of the moment before it; the first step by that of its own."""
    return {_W: _adagrad(step, _W, step.before[_H])} if step.before[_H].any() else {}


def _moment_overwritten(step: Step) -> Arrays:
    h = step.gradients[_W] ** 2
    return {_H: h, _W: _adagrad(step, _W, h)}


def _moment_halved(step: Step) -> Arrays:
    return {_H: (step.before[_H] + step.after[_H]) / 2}


def _row_sum(step: Step) -> Arrays:
    h = step.before[_TABLE_H] + (step.gradients[_TABLE] ** 2).sum(1)
    return {_TABLE_H: h, _TABLE: _adagrad(step, _TABLE, h)}


def _square_of_mean(step: Step) -> Arrays:
    h = step.before[_TABLE_H] + step.gradients[_TABLE].mean(1) ** 2
    return {_TABLE_H: h, _TABLE: _adagrad(step, _TABLE, h)}


def _one_after_another(step: Step) -> Arrays:
    """Occurrences of a row apart, as Caffe2's SparseAdagrad applies them."""
    w, h = step.before[_TABLE].copy(), step.before[_TABLE_H].copy()
    for row, g in zip(*step.slices[_TABLE], strict=True):
        for part in (g / 2, g / 2):  # slices may be summed by row already
            h[row] += part**2
            w[row] -= _rate(step.spec) * part / (np.sqrt(h[row]) + np.float32(step.spec.optimizer.eps))
    return {_TABLE: w, _TABLE_H: h}


def _stale(step: Step) -> Arrays:
    return {_W: step.before[_W]}


def _stale_table_row(step: Step) -> Arrays:
    """Of a table one row that was looked up is not written."""
    moved = np.flatnonzero(step.gradients[_TABLE].any(1))
    w = step.after[_TABLE].copy()
    w[moved[-1]] = step.before[_TABLE][moved[-1]]
    return {_TABLE: w}


def _neighbour_row(step: Step) -> Arrays:
    """The update of one row is written to a row that was not looked up."""
    still = np.flatnonzero(~step.gradients[_TABLE].any(1))
    moved = np.flatnonzero(step.gradients[_TABLE].any(1))
    if not still.size:
        return {}
    w = step.after[_TABLE].copy()
    w[still[0]] += w[moved[0]] - step.before[_TABLE][moved[0]]
    return {_TABLE: w}


def _decay(step: Step) -> Arrays:
    """Weight decay of whole tables: rows that were not looked up shrink too."""
    return {_TABLE: step.after[_TABLE] - np.float32(1e-3) * _rate(step.spec) * step.before[_TABLE]}


def _decay_dense(step: Step) -> Arrays:
    return {_W: step.after[_W] - np.float32(1e-2) * _rate(step.spec) * step.before[_W]}


def _twice(step: Step) -> Arrays:
    return {_W: step.after[_W] - _rate(step.spec) * step.gradients[_W]}


def _ascent(step: Step) -> Arrays:
    return {_W: step.before[_W] + _rate(step.spec) * step.gradients[_W]}


def _accumulated(step: Step) -> Arrays:
    """Gradients are not reset between steps."""
    total = step.memory[_W] = step.memory.get(_W, 0) + step.gradients[_W]
    return {_W: step.before[_W] - _rate(step.spec) * total}


def _momentum(step: Step) -> Arrays:
    velocity = step.memory[_W] = np.float32(0.9) * step.memory.get(_W, 0) + step.gradients[_W]
    return {_W: step.before[_W] - _rate(step.spec) * velocity}


def _delayed(step: Step) -> Arrays:
    """The gradient of the step before: a pipeline that is one batch late."""
    late, step.memory[_W] = step.memory.get(_W, step.gradients[_W]), step.gradients[_W]
    return {_W: step.before[_W] - _rate(step.spec) * late}


def _fixed_moves(step: Step) -> Arrays:
    name = "tables.2.pooling"
    return {name: step.before[name] * np.float32(1 - 1e-6)}


def _one_element(step: Step) -> Arrays:
    """Of the largest parameter of the MLPs one element, in the last place but 12."""
    name = max((n for n in trained_parameters(step.spec) if not is_sparse(n)), key=lambda n: step.after[n].size)
    w = step.after[name].copy()
    w.flat[w.size // 2] *= np.float32(1 + 2.0**-11)
    return {name: w}


def _float16_table(step: Step) -> Arrays:
    moved = step.gradients[_TABLE].any(1)
    w = step.after[_TABLE].copy()
    w[moved] = w[moved].astype(np.float16)
    return {_TABLE: w}


def _bfloat16_moment(step: Step) -> Arrays:
    from conformance.mutants.rounded import bfloat16
    return {_H: bfloat16(step.after[_H])}


def _optimizer(**parts: float):
    def changed(spec: ModelSpec) -> ModelSpec:
        return settings.changed(spec, optimizer=spec.optimizer.model_dump() | parts)
    return changed


def _half_rate(spec: ModelSpec) -> ModelSpec:
    return _optimizer(learning_rate=spec.optimizer.learning_rate / 2)(spec)


def _float16_rate(spec: ModelSpec) -> ModelSpec:
    return _optimizer(learning_rate=float(np.float16(spec.optimizer.learning_rate)))(spec)


_UPDATES = ("bottom.*", "top.*", "tables.*")

UPDATES = [
    Mutant("sgd-ascent", "update", "the step is added", _W, update=_ascent, optimizer="sgd"),
    Mutant("sgd-twice", "update", "the step is made twice", _W, update=_twice, optimizer="sgd"),
    Mutant("sgd-half-rate", "update", "half the learning rate", named=_UPDATES, spec=_half_rate, optimizer="sgd"),
    Mutant("sgd-float16-rate", "precision", "the learning rate is rounded to float16", named=_UPDATES,
           spec=_float16_rate, optimizer="sgd"),
    Mutant("sgd-momentum", "update", "momentum of 0.9, which the spec has not", _W, update=_momentum,
           optimizer="sgd"),
    Mutant("sgd-accumulates", "update", "gradients are not reset between steps", _W, update=_accumulated,
           optimizer="sgd"),
    Mutant("sgd-delayed", "update", "the gradient of the step before", _W, update=_delayed, optimizer="sgd"),
    Mutant("sgd-decay", "update", "weight decay of 1%", _W, update=_decay_dense, optimizer="sgd"),
    Mutant("sgd-stale", "update", "one parameter is not updated", _W, update=_stale, optimizer="sgd"),
    Mutant("sgd-stale-row", "update", "one row that was looked up is not written", _TABLE, update=_stale_table_row,
           optimizer="sgd"),
    Mutant("sgd-wrong-row", "update", "one row that was not looked up is written", _TABLE, update=_neighbour_row,
           setting=settings.table(0, rows=500), optimizer="sgd"),
    Mutant("sgd-table-decay", "update", "rows that were not looked up decay", _TABLE, update=_decay, optimizer="sgd",
           setting=settings.table(0, rows=500)),
    Mutant("sgd-float16-table", "precision", "a table is stored in float16", _TABLE, update=_float16_table,
           optimizer="sgd"),
    Mutant("sgd-fixed-moves", "update", "fixed row weights move by 1e-6", "tables.2.pooling",
           setting=settings.FIXED_WEIGHTS, update=_fixed_moves, optimizer="sgd"),
    Mutant("sgd-one-element", "precision", "one element of the largest weight, by 2^-11 of itself",
           named=("*.weight",), update=_one_element, optimizer="sgd"),
    Mutant("adagrad-eps-inside", "update", "eps inside the square root", _W, update=_eps_inside, optimizer="adagrad"),
    Mutant("adagrad-eps", "update", "eps 1e-5, the default of Caffe2's operators", named=_UPDATES,
           spec=_optimizer(eps=1e-5), optimizer="adagrad"),
    Mutant("adagrad-moment-lost", "update", "the moment is not updated", _H, update=_moment_not_kept,
           optimizer="adagrad"),
    Mutant("adagrad-old-moment", "update", "the step divides by the moment before it", _W, update=_old_moment,
           optimizer="adagrad"),
    Mutant("adagrad-moment-overwritten", "update", "h = g^2 in place of h + g^2", _H, update=_moment_overwritten,
           optimizer="adagrad"),
    Mutant("adagrad-half-moment", "update", "h + g^2 / 2", _H, update=_moment_halved, optimizer="adagrad"),
    Mutant("adagrad-occurrences", "update", "repeated rows are applied one after the other", _TABLE_H,
           update=_one_after_another, optimizer="adagrad"),
    Mutant("adagrad-bfloat16-moment", "precision", "the moment is stored in bfloat16", _H, update=_bfloat16_moment,
           optimizer="adagrad"),
    Mutant("rowwise-sum", "update", "the sum of squares over a row in place of the mean", _TABLE_H, update=_row_sum,
           optimizer="rowwise_adagrad"),
    Mutant("rowwise-square-of-mean", "update", "the square of the mean in place of the mean of squares", _TABLE_H,
           update=_square_of_mean, optimizer="rowwise_adagrad"),
    Mutant("rowwise-elementwise", "update", "a moment for each element, its mean shown", _TABLE,
           update=lambda step: {_TABLE: _adagrad(step, _TABLE, step.gradients[_TABLE] ** 2)},
           optimizer="rowwise_adagrad"),
]
