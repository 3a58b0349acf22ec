"""Reference forward and backward of the embedding bags (SPEC.md, 5)."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spec import rounding
from spec.alike import Alike, alike
from spec.rounding import ROUND, UNDERFLOW, Tracked

if TYPE_CHECKING:
    from spec.model import Table


_FEW = 16
"""Terms: so few err no more alike than independently, for all that is granted."""


class RowGradient(NamedTuple):
    """Gradient of the rows that were looked up: `rows` int64 [U] ascending, `count` [U] occurrences of each.

    `squares` is the sum over the occurrences of the square of each one's own gradient.
    """

    rows: np.ndarray
    count: np.ndarray
    squares: np.ndarray
    gradient: Tracked


def segment_sum(terms: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums of consecutive runs of `lengths` rows of terms [K, ...]; an empty run sums to zero."""
    out = np.zeros((len(lengths), *terms.shape[1:]))
    filled = lengths > 0
    if filled.any():
        starts = (np.cumsum(lengths) - lengths)[filled]
        out[filled] = np.add.reduceat(terms, starts, axis=0)
    return out


def forward(table: "Table", weight: np.ndarray, pooling: np.ndarray | None,
            indices: np.ndarray, lengths: np.ndarray) -> Tracked:
    """Pooled rows [B, E] of weight [N, E]; `pooling` [N] holds the row weights where they are used."""
    terms = weight[indices].astype(np.float64)
    if pooling is not None:
        terms *= pooling[indices].astype(np.float64)[:, None]
    n = lengths[:, None].astype(np.float64)
    y = segment_sum(terms, lengths)
    roundings = n if pooling is not None else np.maximum(n - 1, 0)
    squares = segment_sum(terms**2, lengths)
    variance = rounding.summed(roundings, squares, y)
    bag = np.repeat(np.arange(len(lengths)), lengths)
    m = _occurrences(indices * len(lengths) + bag, np.ones(len(indices)))[:, None]
    like = Alike(segment_sum(m > 1, lengths), segment_sum(m * (m > 1), lengths))
    variance += rounding.drift(like, squares, y)
    if table.pooling == "mean":
        scale = 1 / np.maximum(n, 1)
        y, variance = y * scale, variance * scale**2
        variance += np.where(n > 1, 2 * ROUND * y**2, 0)  # the rounded 1/n, and the product
    return Tracked(y, variance)


def _occurrences(group: np.ndarray, times: np.ndarray) -> np.ndarray:
    """float64 [P]: how often terms of each one's group [P] occur, where each occurs `times` [P] times."""
    _, group = np.unique(group, return_inverse=True)
    return np.bincount(group, times)[group]


def backward(table: "Table", weight: np.ndarray, pooling: np.ndarray | None, indices: np.ndarray,
             lengths: np.ndarray, dy: Tracked) -> tuple[RowGradient, RowGradient | None]:
    """(gradient of weight, gradient of the row weights where they are learned) for dy [B, E].

    A row that stands m times in one bag, or in m bags with equal gradients, gets the same term m times, whose error has
    one cause: the variance is m^2 that of the term, not m.
    """
    batch = max(len(lengths), 1)
    bag = np.repeat(np.arange(len(lengths)), lengths)
    pairs, times = np.unique(indices * batch + bag, return_counts=True)  # each (row, bag) once, by row
    row, bag = pairs // batch, pairs % batch
    scale, roundings = np.ones((len(pairs), 1)), np.zeros((len(pairs), 1))
    if table.pooling == "mean":
        scale = 1 / lengths[bag][:, None].astype(np.float64)
        roundings[lengths[bag] > 1] = 2  # the rounded 1/n, and the product
    elif pooling is not None:
        scale, roundings = pooling[row].astype(np.float64)[:, None], np.ones((len(pairs), 1))
    terms = dy[bag]
    value = terms.value * scale
    local = roundings * (ROUND * value**2 + UNDERFLOW**2)
    group = rounding.equal_rows(dy.value, lengths)[bag]
    gradient = _sum_rows(row, times, group, Tracked(value, terms.variance * scale**2 + local))
    learned = None
    if table.pooling == "weighted_learned":
        learned = _learned(row, times, group, terms, weight[row].astype(np.float64))
    return gradient, learned


def _learned(row: np.ndarray, times: np.ndarray, group: np.ndarray, dy: Tracked, weight: np.ndarray) -> RowGradient:
    """The sum of `dy` [P, E] times `weight` [P, E] over elements and lookups. The variance is the larger of both
    orders': elements that cancel in each lookup's dot product do not cancel the errors of sums over lookups."""
    dots = _sum_rows(row, times, group, _dot(dy, weight))
    elements = _sum_rows(row, times, group, Tracked(dy.value * weight, dy.variance * weight**2)).gradient
    squares = (elements.value**2).sum(1)
    variance = elements.variance.sum(1) + rounding.summed(weight.shape[1], squares, dots.gradient.value)
    return dots._replace(gradient=Tracked(dots.gradient.value, np.maximum(dots.gradient.variance, variance)))


def _sum_rows(row: np.ndarray, times: np.ndarray, group: np.ndarray, terms: Tracked) -> RowGradient:
    """Sum terms [P, ...] that each occur `times` [P] times, for each row; `row` [P] ascends. Terms of a row that are of
    the same `group` [P] are equal."""
    rows, start = np.unique(row, return_index=True)
    lengths = np.diff(np.append(start, len(row)))
    count = segment_sum(times, lengths)
    m = _occurrences(row * (group.max(initial=0) + 1) + group, times)
    m, times = (array.reshape(-1, *(1,) * (terms.value.ndim - 1)).astype(np.float64) for array in (m, times))
    total = segment_sum(times * terms.value, lengths)
    squares = segment_sum(times * terms.value**2, lengths)
    additions = (count - 1).reshape(-1, *(1,) * (total.ndim - 1))
    variance = segment_sum(m * times * terms.variance, lengths) + rounding.summed(additions, squares, total)
    many = count > _FEW
    if many.any():
        heavy = np.repeat(many, lengths)
        like = alike(np.repeat(terms.value[heavy].reshape(heavy.sum(), -1), times[heavy].ravel().astype(int), axis=0),
                     count[many].astype(int))
        like = Alike(*(numbers.reshape(total[many].shape) for numbers in like))
        variance[many] += rounding.drift(like, squares[many], total[many])
    return RowGradient(rows, count, squares, Tracked(total, variance))


def coalesce(indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [U] ascending, float64 sums [U, ...]) of a slice that may list a row several times."""
    rows, count = np.unique(indices, return_counts=True)
    order = np.argsort(indices, kind="stable")
    return rows, segment_sum(values[order].astype(np.float64), count)


def _dot(a: Tracked, b: np.ndarray) -> Tracked:
    """Row by row dot products, [K]."""
    terms = a.value * b
    y = terms.sum(1)
    return Tracked(y, (a.variance * b**2).sum(1) + rounding.summed(b.shape[1], (terms**2).sum(1), y))
