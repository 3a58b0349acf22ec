"""Reference update rules of the optimizers, with the variance of their rounding error (SPEC.md, 7)."""

from typing import NamedTuple

import numpy as np

from spec import rounding
from spec.model import ModelSpec
from spec.parameters import Arrays, is_sparse, moment_name, trained_parameters
from spec.reference import Evaluation
from spec.rounding import ROUND, UNDERFLOW, C, Tracked, U


class Updated(NamedTuple):
    """New values of one tensor. `rows` lists the rows that they belong to; None means all of them.

    Every other row keeps its bits. `kinks` counts the elements whose step is undecided by half the learning
    rate or more: an Adagrad's, where the sign of the gradient is.
    """

    rows: np.ndarray | None
    new: Tracked
    kinks: int = 0


def update(spec: ModelSpec, parameters: Arrays, state: Arrays, evaluation: Evaluation) -> dict[str, Updated]:
    """Every trained parameter and all optimizer state after one step, by name.

    `parameters` and `state` are the float32 bits that the backend had before the step. Learning rate and
    eps are rounded to float32 first, as every engine holds them.
    """
    results: dict[str, Updated] = {}
    rate, eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
    for name in trained_parameters(spec):
        if is_sparse(name):
            rows, count, squares, gradient = evaluation.rows[name]
        else:
            rows, gradient = None, evaluation.tensors[f"{name}_grad"]
            count, squares = np.ones(1), gradient.value**2
        w = _rows(parameters[name], rows)
        moment = moment_name(name)
        if spec.optimizer.kind == "sgd":
            results[name] = Updated(rows, _sgd(w, gradient, rate, count, squares))
            continue
        h = _rows(state[moment], rows)
        rowwise = h.ndim < w.ndim
        new_h = _rowwise_moment(h, gradient) if rowwise else _moment(h, gradient)
        new_w = (_rowwise_step if rowwise else _adagrad_step)(w, h, new_h, gradient, rate, eps)
        results[name] = Updated(rows, new_w, int((new_w.reach > rate / 2).sum()))
        results[moment] = Updated(rows, new_h)
    return results


def _rows(array: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return (array if rows is None else array[rows]).astype(np.float64)


def _sgd(w: np.ndarray, g: Tracked, rate: float, count: np.ndarray, squares: np.ndarray) -> Tracked:
    """w - rate g.

    An engine may add a row's occurrences one by one, as Caffe2's ScatterWeightedSum does, and round the row each
    time. Small additions of one sign are all rounded the same way, down to vanishing altogether, so these errors
    add up: each is at most u |w|, and together at most what was to be added (sqrt(n sum v^2) >= sum |v|).
    """
    step = rate * g.value
    new = w - step
    n = count.reshape(-1, *(1,) * (w.ndim - 1))
    one_by_one = np.minimum(n * U * np.maximum(np.abs(w), np.abs(new)), rate * np.sqrt(n * squares))
    local = ROUND * (new**2 + 2 * step**2) + (one_by_one / C) ** 2
    return Tracked(new, rate**2 * g.variance + local)


def _moment(h: np.ndarray, g: Tracked) -> Tracked:
    """h + g^2; the gradient's reach is squared whole, so that it holds around g = 0 too."""
    square = g.value**2
    new = h + square
    deviation = 2 * np.abs(g.value) * np.sqrt(g.variance) + C * g.variance
    return Tracked(new, deviation**2 + ROUND * (2 * square**2 + new**2) + UNDERFLOW**2)


def _adagrad_step(w: np.ndarray, h: np.ndarray, new_h: Tracked, g: Tracked, rate: float, eps: float) -> Tracked:
    """w - rate g / (sqrt(h + g^2) + eps).

    The step grows with g, and from h = 0 it is nearly its sign: its error is read off the step at both ends
    of the gradient's reach, which is right where a derivative at g is not.
    """
    def step(g: np.ndarray) -> np.ndarray:
        return rate * g / (np.sqrt(h + g**2) + eps)

    middle = step(g.value)
    deviation = np.maximum(step(g.value + g.reach) - middle, middle - step(g.value - g.reach)) / C
    new = w - middle
    return Tracked(new, deviation**2 + 8 * ROUND * middle**2 + ROUND * new**2)


def _rowwise_moment(h: np.ndarray, g: Tracked) -> Tracked:
    """h + mean(g^2) over the row, for h [U] and g [U, E]. A row's errors are taken to have one cause: they add."""
    size = g.value.shape[1]
    square = g.value**2
    mean = square.mean(1)
    new = h + mean
    deviation = (2 * np.abs(g.value) * np.sqrt(g.variance) + C * g.variance).mean(1)
    local = rounding.summed(size, (square**2).sum(1), size * mean) / size**2
    return Tracked(new, deviation**2 + local + 2 * ROUND * new**2 + UNDERFLOW**2)


def _rowwise_step(w: np.ndarray, h: np.ndarray, new_h: Tracked, g: Tracked, rate: float, eps: float) -> Tracked:
    """w - rate g / (sqrt(h') + eps), h' the row's new moment. |step| is at most rate sqrt(E), since h' >= g^2 / E."""
    size = g.value.shape[1]
    root = (np.sqrt(new_h.value) + eps)[:, None]
    least = (np.sqrt(np.maximum(new_h.value - new_h.reach, h * (1 - U))) + eps)[:, None]
    most = (np.sqrt(new_h.value + new_h.reach) + eps)[:, None]
    middle = rate * g.value / root
    magnitude = np.abs(g.value)
    furthest = np.minimum(rate * (magnitude + g.reach) / least, rate * np.sqrt(size))
    nearest = rate * np.maximum(magnitude - g.reach, 0) / most
    # Where the sign is undecided the step may come out as far on the other side of zero.
    across = np.where(rounding.near(g, 0), np.abs(middle) + furthest, 0)
    deviation = np.maximum(np.maximum(furthest - np.abs(middle), np.abs(middle) - nearest), across) / C
    new = w - middle
    return Tracked(new, deviation**2 + 8 * ROUND * middle**2 + ROUND * new**2)
