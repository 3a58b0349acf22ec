"""Reference forward and backward of the embedding bags (SPEC.md, 5)."""

from typing import NamedTuple

import numpy as np

from spec import rounding
from spec.model import Table
from spec.rounding import ROUND, Tracked


class RowGradient(NamedTuple):
    """Gradient of the rows that were looked up: `rows` int64 [U] ascending, `count` occurrences of each."""

    rows: np.ndarray
    count: np.ndarray
    gradient: Tracked


def segment_sum(terms: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums of consecutive runs of `lengths` rows of terms [K, ...]; an empty run sums to zero."""
    out = np.zeros((len(lengths), *terms.shape[1:]))
    filled = lengths > 0
    if filled.any():
        starts = (np.cumsum(lengths) - lengths)[filled]
        out[filled] = np.add.reduceat(terms, starts, axis=0)
    return out


def forward(table: Table, weight: np.ndarray, pooling: np.ndarray | None,
            indices: np.ndarray, lengths: np.ndarray) -> Tracked:
    """Pooled rows [B, E] of weight [N, E]; `pooling` [N] holds the row weights where they are used."""
    terms = weight[indices].astype(np.float64)
    if pooling is not None:
        terms *= pooling[indices].astype(np.float64)[:, None]
    n = lengths[:, None].astype(np.float64)
    y = segment_sum(terms, lengths)
    roundings = n if pooling is not None else np.maximum(n - 1, 0)
    variance = rounding.summed(roundings, segment_sum(terms**2, lengths), y)
    if table.pooling == "mean":
        scale = 1 / np.maximum(n, 1)
        y, variance = y * scale, variance * scale**2
        variance += np.where(n > 1, 2 * ROUND * y**2, 0)  # the rounded 1/n, and the product
    return Tracked(y, variance)


def backward(table: Table, weight: np.ndarray, pooling: np.ndarray | None, indices: np.ndarray,
             lengths: np.ndarray, dy: Tracked) -> tuple[RowGradient, RowGradient | None]:
    """(gradient of weight, gradient of the row weights where they are learned) for dy [B, E]."""
    bag = np.repeat(np.arange(len(lengths)), lengths)
    occurrence = dy[bag]
    if table.pooling == "mean":
        n = lengths[bag][:, None].astype(np.float64)
        value = occurrence.value / n
        values = Tracked(value, occurrence.variance / n**2 + np.where(n > 1, 2 * ROUND * value**2, 0))
    elif pooling is not None:
        w = pooling[indices].astype(np.float64)[:, None]
        value = occurrence.value * w
        values = Tracked(value, occurrence.variance * w**2 + ROUND * value**2)
    else:
        values = occurrence
    learned = None
    if table.pooling == "weighted_learned":
        learned = coalesce(indices, _dot(occurrence, weight[indices].astype(np.float64)))
    return coalesce(indices, values), learned


def coalesce(indices: np.ndarray, values: Tracked) -> RowGradient:
    """Sum the occurrences of every row."""
    rows, count = np.unique(indices, return_counts=True)
    order = np.argsort(indices, kind="stable")
    total = segment_sum(values.value[order], count)
    squares = segment_sum(values.value[order] ** 2, count)
    roundings = (count - 1).astype(np.float64).reshape(-1, *(1,) * (total.ndim - 1))
    variance = segment_sum(values.variance[order], count) + rounding.summed(roundings, squares, total)
    return RowGradient(rows, count, Tracked(total, variance))


def _dot(a: Tracked, b: np.ndarray) -> Tracked:
    """Row by row dot products, [K]."""
    terms = a.value * b
    y = terms.sum(1)
    return Tracked(y, (a.variance * b**2).sum(1) + rounding.summed(b.shape[1], (terms**2).sum(1), y))
