"""Terms of a sum that are rounded alike (SPEC.md, 10)."""

from typing import NamedTuple

import numpy as np


class Alike(NamedTuple):
    """Of the terms of some sums: `count`, how many are like others of the same sum, and `squares`, the sum of m^2 over
    groups of m such terms."""

    count: np.ndarray
    squares: np.ndarray


def alike(terms: np.ndarray, lengths: np.ndarray | None = None) -> Alike:
    """Of terms [P, N], of which each column is a sum, or each run of `lengths` [S] rows of a column: [S, N], or [1, N].

    Terms are alike where they agree but for about the last place of the sum of n such terms, n / 2^23 of their size: a
    running sum that has grown to its last power of two rounds them in the same way. Zeros, which are not rounded, are
    not counted.
    """
    lengths = np.array([len(terms)]) if lengths is None else lengths
    with np.errstate(over="ignore"):
        keys = (terms + 0.0).astype(np.float32).view(np.uint32)
    keys = keys >> np.ceil(np.log2(np.repeat(np.maximum(lengths, 1), lengths))).astype(np.uint32)[:, None]
    if len(lengths) > 1:
        keys = np.repeat(np.arange(len(lengths), dtype=np.uint64) << np.uint64(32), lengths)[:, None] | keys
    keys = np.sort(np.ascontiguousarray(keys.T), axis=1)
    like_the_next = np.zeros(keys.shape, bool)
    like_the_next[:, :-1] = (keys[:, 1:] == keys[:, :-1]) & (keys[:, 1:] & 0xFFFFFFFF != 0)
    places = np.flatnonzero(like_the_next)
    first = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    sizes = np.diff(first, append=len(places)) + 1.0
    shape = len(lengths), keys.shape[0]
    columns, segments = places[first] // max(keys.shape[1], 1), np.zeros(len(first), np.int64)
    if len(lengths) > 1:
        segments = (keys.ravel()[places[first]] >> np.uint64(32)).astype(np.int64)
    sums = segments * shape[1] + columns
    return Alike(*(np.bincount(sums, weights, shape[0] * shape[1]).reshape(shape) for weights in (sizes, sizes**2)))
