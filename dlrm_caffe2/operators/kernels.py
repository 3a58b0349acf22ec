"""Compiled loops that stand for a slow kernel of PyTorch's, or for several operators of a net (engine/fused.py).

They take tensors for which `rules.are_plain` holds, float32 on the CPU and contiguous, and contiguous indices: nothing
is checked here.
"""

import math
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from numba import carray

from dlrm_caffe2.operators.cross_entropy import LOG_FLOOR
from spec.native.loops import Team, float32s, float64s, int32s, int64s, loop, prefetch, turn
from spec.native.vectors import STEP, add_scaled, fma, load, splat, store, total

_TEAM = Team(torch._C.__file__)
_AHEAD = 16
"""How many rows early a row is fetched from memory, of those that one thread adds to."""
_SAMPLES_A_TURN, _INDICES_A_THREAD, _LABELS_A_TURN = 32, 2**14, 2**12


def add_rows(tables: Sequence[Any], indices: Sequence[Any], values: Sequence[Any], weight: float,
             lengths: Sequence[Any | None] = ()) -> None:
    """ScatterWeightedSum with a first weight of 1: table[indices[k]] += weight * values[k], in the order of k, for each
    table. The rows of values may lie apart.

    Where a table has `lengths`, of what SparseLengthsIndicesInGradientSumGradient makes of `values` [B, ...]: a row of
    these then belongs to as many indices. Any number of threads gives the same bits: a row is one thread's.
    """
    threads, count = torch.get_num_threads(), len(tables)
    parts = 1
    while parts * count < threads:
        parts *= 2
    columns = array("q", chain(
        map(_place, tables), map(_width, tables), map(_place, indices), map(_is_short, indices), map(_size, indices),
        map(_place, values), map(_apart, values), map(_rows, values), map(_place_if_any, lengths or [None] * count)))
    _TEAM.run(_add_rows, parts * count, threads, parts=parts, tables=count, columns=columns.buffer_info()[0],
              weight=weight)


def rows_exist(tables: Sequence[Any], indices: Sequence[Any]) -> bool:
    """Whether the indices of each table are 0 or more, and below its number of rows."""
    columns = array("q", chain(map(_rows, tables), map(_place, indices), map(_is_short, indices), map(_size, indices)))
    missing = array("q", [0])
    threads = torch.get_num_threads() if sum(map(_size, indices)) > _INDICES_A_THREAD else 1
    _TEAM.run(_rows_exist, len(tables), threads, tables=len(tables), columns=columns.buffer_info()[0],
              missing=missing.buffer_info()[0])
    return not missing[0]


def side_by_side(sources: Sequence[Any], indices: Sequence[Any | None]) -> Any | None:
    """[B, F, E]: sources [B, E] next to each other, or, of a table [N, E] with indices [B], the rows that these name.

    None where a row does not exist.
    """
    samples = next(source.shape[0] if rows is None else rows.shape[0]
                   for source, rows in zip(sources, indices, strict=True))
    y = sources[0].new_empty(samples, len(sources), sources[0].shape[1])
    columns = array("q", chain(map(_place, sources), map(_rows, sources), map(_place_if_any, indices),
                               (i is not None and _is_short(i) for i in indices)))
    missing = array("q", [0])
    _TEAM.run(_side_by_side, -(-samples // _SAMPLES_A_TURN), torch.get_num_threads(), samples=samples,
              sources=len(sources), width=y.shape[2], columns=columns.buffer_info()[0], y=y.data_ptr(),
              missing=missing.buffer_info()[0])
    return None if missing[0] else y


def chosen_products(first: Any, x: Any, pairs: Any) -> Any:
    """[B, K + P]: `first` [B, K], then for each of the pairs int64 [P, 2] the product of two rows of x [B, F, E]."""
    samples, vectors, width = x.shape
    kept, count = first.shape[1], len(pairs)
    y = x.new_empty(samples, kept + count)
    _TEAM.run(_chosen_products, -(-samples // _SAMPLES_A_TURN), torch.get_num_threads(), samples=samples,
              x=x.data_ptr(), vectors=vectors, width=width, first=first.data_ptr(), kept=kept, pairs=pairs.data_ptr(),
              count=count, y=y.data_ptr())
    return y


def own_products(x: Any) -> Any:
    """[B, F, F]: X X' for x [B, F, E], with the bits of `chosen_products`: a net that is traced, and one that is fused,
    must agree on which side of a kink an activation is."""
    samples, vectors, _ = x.shape
    pairs = torch.cartesian_prod(torch.arange(vectors), torch.arange(vectors))
    return chosen_products(x.new_empty(samples, 0), x, pairs).view(samples, vectors, vectors)


def chosen_sums(dy: Any, places: Any, beyond: float, x: Any) -> Any:
    """[B, F, E] = A X for matrices A [B, F, F] of elements of dy [B, W]: those at `places` int64 [F, F].

    The rows of dy may lie apart. A place from W on is `beyond` times the element W places before it, 0 if `beyond` is.
    """
    samples, vectors, width = x.shape
    dx = torch.empty_like(x)
    _TEAM.run(_chosen_sums, -(-samples // _SAMPLES_A_TURN), torch.get_num_threads(), samples=samples, x=x.data_ptr(),
              vectors=vectors, width=width, dy=dy.data_ptr(), row=dy.stride(0), columns=dy.shape[1],
              places=places.data_ptr(), beyond=beyond, dx=dx.data_ptr())
    return dx


def cross_entropy(p: Any, label: Any) -> tuple[float, Any] | None:
    """The mean of -log(max(q, 1e-20)), q being p or 1 - p as the label says, 1 or 0, and its gradient with respect to
    the logit of which p is the sigmoid: p' = p (1 - p). None where a label is neither.

    Caffe2's MakeTwoClass, LabelCrossEntropy, AveragedLoss, their gradients and SigmoidGradient, rounded as they do.
    """
    count = p.numel()
    turns = -(-count // _LABELS_A_TURN)
    dz, sums, strange = torch.empty_like(p), array("d", [0.0] * turns), array("q", [0])
    _TEAM.run(_cross_entropy, turns, torch.get_num_threads(), count=count, p=p.data_ptr(), label=label.data_ptr(),
              dz=dz.data_ptr(), sums=sums.buffer_info()[0], strange=strange.buffer_info()[0])
    return None if strange[0] else (sum(sums) / count, dz)


_place, _size = methodcaller("data_ptr"), methodcaller("numel")
_apart, _rows = methodcaller("stride", 0), methodcaller("size", 0)


def _width(table: Any) -> int:
    """Of a row. The stride of a table of one row may be anything."""
    return table.numel() // max(table.shape[0], 1)


def _place_if_any(x: Any | None) -> int:
    return 0 if x is None else x.data_ptr()


def _is_short(x: Any) -> bool:
    return x.dtype is torch.int32


@loop(parts=int, tables=int, columns=int, weight=float)
def _add_rows(pointer):
    """A turn takes a table, or, where it has several, those rows whose number has the turn's in its last bits."""
    a = carray(pointer, 1)[0]
    turns, parts, tables, columns = a.turns, a.parts, a.tables, int64s(a.columns, 9 * a.tables)
    weight, ahead = splat(a.weight), _AHEAD * parts
    number = turn(pointer)
    while number < turns:
        at, mine = number // parts, number % parts
        table, size = columns[at], 4 * columns[tables + at]
        short, count = columns[3 * tables + at], columns[4 * tables + at]
        few, many = int32s(columns[2 * tables + at], count), int64s(columns[2 * tables + at], count)
        value, to_next, bags = columns[5 * tables + at], 4 * columns[6 * tables + at], columns[7 * tables + at]
        in_bags, lengths = columns[8 * tables + at] != 0, int32s(columns[8 * tables + at], bags)
        k = 0
        for bag in range(bags):
            end = k + lengths[bag] if in_bags else k + 1
            while k < end:
                if k + ahead < count:
                    coming = few[k + ahead] if short else many[k + ahead]
                    if coming & (parts - 1) == mine:
                        prefetch(table + coming * size, size)
                index = few[k] if short else many[k]
                if index & (parts - 1) == mine:
                    add_scaled(table + index * size, weight, value, size)
                k += 1
            value += to_next
        number = turn(pointer)


@loop(tables=int, columns=int, missing=int)
def _rows_exist(pointer):
    """A turn takes a table."""
    a = carray(pointer, 1)[0]
    turns, tables, columns, missing = a.turns, a.tables, int64s(a.columns, 4 * a.tables), int64s(a.missing, 1)
    number = turn(pointer)
    while number < turns:
        rows, place, short, count = (columns[number], columns[tables + number], columns[2 * tables + number],
                                     columns[3 * tables + number])
        few, many = int32s(place, count), int64s(place, count)
        for k in range(count):
            index = few[k] if short else many[k]
            if index < 0 or index >= rows:
                missing[0] = 1
        number = turn(pointer)


@loop(samples=int, sources=int, width=int, columns=int, y=int, missing=int)
def _side_by_side(pointer):
    """A turn takes some samples."""
    a = carray(pointer, 1)[0]
    turns, samples, sources, size, ys = a.turns, a.samples, a.sources, 4 * a.width, a.y
    columns, missing = int64s(a.columns, 4 * sources), int64s(a.missing, 1)
    number = turn(pointer)
    while number < turns:
        first, last = number * _SAMPLES_A_TURN, min((number + 1) * _SAMPLES_A_TURN, samples)
        for at in range(sources):
            source, rows, place, short = (columns[at], columns[sources + at], columns[2 * sources + at],
                                          columns[3 * sources + at])
            few, many = int32s(place, samples), int64s(place, samples)
            for sample in range(first, last):
                row = sample
                if place:
                    if sample + _AHEAD < last:
                        coming = few[sample + _AHEAD] if short else many[sample + _AHEAD]
                        prefetch(source + coming * size, size)
                    row = few[sample] if short else many[sample]
                if row < 0 or row >= rows:
                    missing[0] = 1
                else:
                    x, y = source + row * size, ys + (sample * sources + at) * size
                    for e in range(0, size, STEP):
                        left = (size - e) // 4
                        store(y + e, load(x + e, left), left)
        number = turn(pointer)


@loop(samples=int, x=int, vectors=int, width=int, first=int, kept=int, pairs=int, count=int, y=int)
def _chosen_products(pointer):
    """A turn takes some samples."""
    a = carray(pointer, 1)[0]
    samples, vectors, size, kept, count, turns = a.samples, a.vectors, 4 * a.width, a.kept, a.count, a.turns
    pairs, firsts, ys = int64s(a.pairs, 2 * count), a.first, a.y
    number = turn(pointer)
    while number < turns:
        for sample in range(number * _SAMPLES_A_TURN, min((number + 1) * _SAMPLES_A_TURN, samples)):
            x = a.x + sample * vectors * size
            y = float32s(ys + 4 * sample * (kept + count), kept + count)
            first = float32s(firsts + 4 * sample * kept, kept)
            for column in range(kept):
                y[column] = first[column]
            for pair in range(count):
                left, right = x + pairs[2 * pair] * size, x + pairs[2 * pair + 1] * size
                product = load(left, size // 4) * load(right, size // 4)
                for e in range(STEP, size, STEP):
                    product = fma(load(left + e, (size - e) // 4), load(right + e, (size - e) // 4), product)
                y[kept + pair] = total(product)
        number = turn(pointer)


@loop(samples=int, x=int, vectors=int, width=int, dy=int, row=int, columns=int, places=int, beyond=float, dx=int)
def _chosen_sums(pointer):
    """A turn takes some samples."""
    a = carray(pointer, 1)[0]
    samples, vectors, size, columns, turns = a.samples, a.vectors, 4 * a.width, a.columns, a.turns
    places, beyond, dys, row, dxs = int64s(a.places, vectors * vectors), a.beyond, a.dy, a.row, a.dx
    number = turn(pointer)
    while number < turns:
        for sample in range(number * _SAMPLES_A_TURN, min((number + 1) * _SAMPLES_A_TURN, samples)):
            x, dx = a.x + sample * vectors * size, dxs + sample * vectors * size
            dy = float32s(dys + 4 * sample * row, columns)
            for i in range(vectors):
                for e in range(0, size, STEP):
                    left = (size - e) // 4
                    result = splat(0)
                    for j in range(vectors):
                        place = places[i * vectors + j]
                        if place < columns:
                            result = fma(splat(dy[place]), load(x + j * size + e, left), result)
                        elif beyond:
                            factor = beyond * dy[place - columns]
                            result = fma(splat(factor), load(x + j * size + e, left), result)
                    store(dx + i * size + e, result, left)
        number = turn(pointer)


@loop(count=int, p=int, label=int, dz=int, sums=int, strange=int)
def _cross_entropy(pointer):
    """A turn takes some labels."""
    a = carray(pointer, 1)[0]
    turns, count = a.turns, a.count
    p, label, dz = float32s(a.p, count), float32s(a.label, count), float32s(a.dz, count)
    sums, strange = float64s(a.sums, turns), int64s(a.strange, 1)
    one, floor = np.float32(1), np.float32(LOG_FLOOR)
    each = -(one / np.float32(count))
    number = turn(pointer)
    while number < turns:
        terms = 0.0
        for at in range(number * _LABELS_A_TURN, min((number + 1) * _LABELS_A_TURN, count)):
            positive = label[at] == one
            if not positive and label[at] != 0:
                strange[0] = 1
            rest = one - p[at]
            chosen = p[at] if positive else rest
            if chosen < floor:
                chosen = floor
            terms -= math.log(chosen)
            gradient = each / chosen
            dz[at] = (gradient if positive else -gradient) * p[at] * rest
        sums[number] = terms
        number = turn(pointer)
