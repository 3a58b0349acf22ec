"""Compiled loops for what PyTorch has no fast kernel for on a CPU: adding to rows of tables, the dot interaction, and
what it has several small kernels for.

All take float32, and check nothing. They are compiled when this module is first imported (spec/native/loops.py).
"""

import math
from array import array
from collections.abc import Callable

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from spec.loss import FLOOR
from spec.native.loops import Team, float32s, float64s, int32s, int64s, loop, prefetch, turn
from spec.native.vectors import STEP, add_scaled, fma, load, splat, sqrt, store, total, where_not_positive

_TEAM = Team(torch._C.__file__)
_LIBRARY = torch.library.Library("dlrm", "DEF")


def _operator(schema: str) -> Callable[[Callable], Callable]:
    """Makes an operator of PyTorch's, dlrm::NAME, of a function NAME: profilers see it."""
    def register(function: Callable) -> Callable:
        _LIBRARY.define(function.__name__ + schema)
        _LIBRARY.impl(function.__name__, function, "CPU")
        return getattr(torch.ops.dlrm, function.__name__).default
    return register


_AHEAD = 16
"""How many rows before it is needed a row is fetched from memory, of those that one thread works on."""
_ROWS_A_TURN, _SAMPLES_A_TURN, _SAMPLES_A_SUM, _TERMS_A_TURN = 512, 32, 64, 4096


@_operator("(Tensor(a!) storage, Tensor rows, Tensor? ends, Tensor? factors, Tensor? row_weights, Tensor gradient, "
           "float rate) -> ()")
def add_to_rows(storage: Tensor, rows: Tensor, ends: Tensor | None, factors: Tensor | None, row_weights: Tensor | None,
                gradient_BGE: Tensor, rate: float) -> None:
    """storage[row] += rate * factor * row weight * gradient, for each row of each bag.

    A row that occurs several times is added to as often, in the order of the samples, by one thread: the same bits in
    every run and with any number of threads.

    Args:
        storage: [N, E], contiguous.
        rows: int32 or int64 [K], bag by bag, table by table.
        ends: int64 [G * B], where each bag's rows end; None where every bag has one.
        factors: [G * B] or [G * B, 1], of bags, or None.
        row_weights: [N], or None.
        gradient_BGE: [B, G, E], of any strides between vectors, contiguous ones.
    """
    threads = torch.get_num_threads()
    samples, tables, width = gradient_BGE.shape
    shards = 1
    while shards * tables < threads:
        shards *= 2
    to_next_sample, to_next_table, _ = gradient_BGE.stride()
    _TEAM.run(_add_to_rows, tables * shards, threads, shards=shards, samples=samples, width=width,
              storage=storage.data_ptr(), rows=rows.data_ptr(), narrow=rows.dtype is torch.int32, bags=tables * samples,
              count=len(rows), ends=_address(ends), factors=_address(factors), row_weights=_address(row_weights),
              weights=len(storage), gradient=gradient_BGE.data_ptr(), to_next_sample=4 * to_next_sample,
              to_next_table=4 * to_next_table, rate=rate)


@_operator("(Tensor(a!) storage, Tensor(b!) moment, Tensor rows, Tensor bags, Tensor starts, Tensor? factors, "
           "Tensor? row_weights, Tensor gradient, float rate, float eps) -> ()")
def adagrad_rows(storage: Tensor, moment: Tensor, rows: Tensor, bags: Tensor, starts: Tensor, factors: Tensor | None,
                 row_weights: Tensor | None, gradient: Tensor, rate: float, eps: float) -> None:
    """h[row] += g g;  storage[row] -= rate * g / (sqrt(h[row]) + eps), for g the sum over the bags that each row is in.

    Row-wise where `moment` is [N]: h[row] += mean(g g).

    Args:
        storage, moment: [N, E], or [N] for a moment, contiguous.
        rows, bags, starts: see `Lookups.transposed`.
        factors: [bags] or [bags, 1], or None.
        row_weights: [N], or None.
        gradient: [bags, E], contiguous.
    """
    threads = torch.get_num_threads()
    _TEAM.run(_adagrad_rows, -(-len(rows) // _ROWS_A_TURN), threads, width=storage.shape[1], storage=storage.data_ptr(),
              moment=moment.data_ptr(), rowwise=moment.dim() == 1, rows=rows.data_ptr(), distinct=len(rows),
              bags=bags.data_ptr(), narrow=bags.dtype is torch.int32, count=len(bags), starts=starts.data_ptr(),
              factors=_address(factors), all_bags=len(gradient), row_weights=_address(row_weights),
              weights=len(storage), gradient=gradient.data_ptr(), rate=rate, eps=eps)


@_operator("(Tensor features, Tensor columns, int width) -> Tensor")
def dot_products(features_BFE: Tensor, columns_FF: Tensor, width: int) -> Tensor:
    """[B, width]: the first vector of each sample, then the product of the vectors i and j in column columns[i, j].

    Args:
        features_BFE: contiguous.
        columns_FF: int64, symmetric; a pair that is not wanted has column 0.
    """
    samples, vectors, size = features_BFE.shape
    output = features_BFE.new_empty(samples, width)
    _TEAM.run(_dot_products, -(-samples // _SAMPLES_A_TURN), torch.get_num_threads(), samples=samples, vectors=vectors,
              size=size, features=features_BFE.data_ptr(), columns=columns_FF.data_ptr(), output=output.data_ptr(),
              to_next=4 * width)
    return output


@_operator("(Tensor gradient, Tensor features, Tensor columns) -> Tensor")
def dot_gradient(gradient: Tensor, features_BFE: Tensor, columns_FF: Tensor) -> Tensor:
    """[B, F, E], of the vectors that `dot_products` took, for a gradient [B, width or more] of what it made."""
    samples, vectors, size = features_BFE.shape
    result = torch.empty_like(features_BFE)
    _TEAM.run(_dot_gradient, -(-samples // _SAMPLES_A_TURN), torch.get_num_threads(), samples=samples, vectors=vectors,
              size=size, features=features_BFE.data_ptr(), columns=columns_FF.data_ptr(), gradient=gradient.data_ptr(),
              to_next=4 * gradient.stride(0), result=result.data_ptr())
    return result


@_operator("(Tensor(a!) gradient, Tensor y) -> Tensor")
def reverse_relu(gradient_BN: Tensor, y_BN: Tensor) -> Tensor:
    """[N], the sum over the samples of the gradient, once it is 0 where y is not above 0. That of a NaN stays.

    Args:
        gradient_BN: its rows may lie apart.
        y_BN: what ReLU made, contiguous.
    """
    samples, width = y_BN.shape
    turns = -(-samples // _SAMPLES_A_SUM)
    sums_TN = y_BN.new_zeros(turns, width)
    _TEAM.run(_reverse_relu, turns, torch.get_num_threads(), samples=samples, width=width,
              gradient=gradient_BN.data_ptr(), to_next=4 * gradient_BN.stride(0), y=y_BN.data_ptr(),
              sums=sums_TN.data_ptr())
    return sums_TN.sum(0) if turns > 1 else sums_TN[0]


@_operator("(Tensor p, Tensor label, float low, float high, float negative_weight, float positive_weight) -> "
           "(float, Tensor)")
def cross_entropy(p_B1: Tensor, label_B1: Tensor, low: float, high: float, negative_weight: float,
                  positive_weight: float) -> tuple[float, Tensor]:
    """The mean of the terms of `loss.py`, and its gradient [B, 1] by the logit, of which p is the sigmoid. Labels are 0
    or 1; p is clipped to [low, high]."""
    gradient_B1 = torch.empty_like(p_B1)
    samples = len(p_B1)
    turns = -(-samples // _TERMS_A_TURN)
    sums = array("d", [0.0]) * turns
    _TEAM.run(_cross_entropy, turns, torch.get_num_threads(), samples=samples, p=p_B1.data_ptr(),
              label=label_B1.data_ptr(), low=low, high=high, negative_weight=negative_weight,
              positive_weight=positive_weight, gradient=gradient_B1.data_ptr(), sums=sums.buffer_info()[0])
    return float(np.float32(sum(sums) / samples)), gradient_B1


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@loop(shards=int, samples=int, width=int, storage=int, rows=int, narrow=int, bags=int, count=int, ends=int, factors=int,
      row_weights=int, weights=int, gradient=int, to_next_sample=int, to_next_table=int, rate=float)
def _add_to_rows(pointer):
    """A turn is a table, or those rows of it that are one shard."""
    a = carray(pointer, 1)[0]
    turns, shards, samples, width, storage, narrow = a.turns, a.shards, a.samples, a.width, a.storage, a.narrow
    few, many = int32s(a.rows, a.count), int64s(a.rows, a.count)
    ends, factors, row_weights = int64s(a.ends, a.bags), float32s(a.factors, a.bags), float32s(a.row_weights, a.weights)
    in_bags, has_factors, has_weights = a.ends != 0, a.factors != 0, a.row_weights != 0
    gradient, to_next_sample, to_next_table, rate = a.gradient, a.to_next_sample, a.to_next_table, a.rate
    size, ahead = 4 * width, _AHEAD * shards
    number = turn(pointer)
    while number < turns:
        table, shard = number // shards, number % shards
        first = table * samples
        if in_bags:
            k, last = (ends[first - 1] if first else 0), ends[first + samples - 1]
        else:
            k, last = first, first + samples
        g = gradient + table * to_next_table
        for bag in range(first, first + samples):
            prefetch(g + to_next_sample, size)
            scale = rate * factors[bag] if has_factors else rate
            factor = splat(scale)
            end = ends[bag] if in_bags else bag + 1
            while k < end:
                if k + ahead < last:
                    later = few[k + ahead] if narrow else many[k + ahead]
                    if later & (shards - 1) == shard:
                        prefetch(storage + later * size, size)
                row = few[k] if narrow else many[k]
                k += 1
                if row & (shards - 1) == shard:
                    if has_weights:
                        factor = splat(scale * row_weights[row])
                    add_scaled(storage + row * size, factor, g, size)
            g += to_next_sample
        number = turn(pointer)


@njit(forceinline=True)
def _sum(gradient, size, n, few, many, narrow, start, end, factors, has_factors):
    """Of up to 16 columns of the bags from `start` to `end`."""
    result = splat(0)
    for k in range(start, end):
        bag = few[k] if narrow else many[k]
        g = load(gradient + bag * size, n)
        result = fma(splat(factors[bag]), g, result) if has_factors else result + g
    return result


@loop(width=int, storage=int, moment=int, rowwise=int, rows=int, distinct=int, bags=int, narrow=int, count=int,
      starts=int, factors=int, all_bags=int, row_weights=int, weights=int, gradient=int, rate=float, eps=float)
def _adagrad_rows(pointer):
    """A turn is some distinct rows."""
    a = carray(pointer, 1)[0]
    turns, width, storage, moment, rowwise, narrow = a.turns, a.width, a.storage, a.moment, a.rowwise, a.narrow
    distinct, count, gradient, rows = a.distinct, a.count, a.gradient, int64s(a.rows, a.distinct)
    few, many, short, long = (int32s(a.bags, count), int64s(a.bags, count), int32s(a.starts, distinct),
                              int64s(a.starts, distinct))
    factors, has_factors = float32s(a.factors, a.all_bags), a.factors != 0
    row_weights, has_weights = float32s(a.row_weights, a.weights), a.row_weights != 0
    moments = float32s(moment, a.weights)
    rate, eps = splat(-a.rate), splat(a.eps)
    size = 4 * width
    number = turn(pointer)
    while number < turns:
        for place in range(number * _ROWS_A_TURN, min((number + 1) * _ROWS_A_TURN, distinct)):
            if place + _AHEAD < distinct:
                later = rows[place + _AHEAD]
                prefetch(storage + later * size, size)
                prefetch(moment + later * (4 if rowwise else size), 4 if rowwise else size)
            row = rows[place]
            start = short[place] if narrow else long[place]
            end = count
            if place + 1 < distinct:
                end = short[place + 1] if narrow else long[place + 1]
            weight = row_weights[row] if has_weights else 1.0
            w = storage + row * size
            squares = splat(0)
            if rowwise:
                for e in range(0, size, STEP):
                    n = (size - e) // 4
                    g = _sum(gradient + e, size, n, few, many, narrow, start, end, factors, has_factors) * splat(weight)
                    squares = fma(g, g, squares)
                moments[row] += total(squares) / width
            for e in range(0, size, STEP):
                n = (size - e) // 4
                g = _sum(gradient + e, size, n, few, many, narrow, start, end, factors, has_factors) * splat(weight)
                if rowwise:
                    h = splat(moments[row])
                else:
                    h = fma(g, g, load(moment + row * size + e, n))
                    store(moment + row * size + e, h, n)
                store(w + e, load(w + e, n) + rate * g / (sqrt(h) + eps), n)
        number = turn(pointer)


@loop(samples=int, vectors=int, size=int, features=int, columns=int, output=int, to_next=int)
def _dot_products(pointer):
    """A turn is some samples."""
    a = carray(pointer, 1)[0]
    turns, samples, vectors, features, output, to_next = a.turns, a.samples, a.vectors, a.features, a.output, a.to_next
    columns = int64s(a.columns, vectors * vectors)
    width, size = a.size, 4 * a.size
    number = turn(pointer)
    while number < turns:
        for sample in range(number * _SAMPLES_A_TURN, min((number + 1) * _SAMPLES_A_TURN, samples)):
            x, y = features + sample * vectors * size, output + sample * to_next
            for e in range(0, size, STEP):
                n = (size - e) // 4
                store(y + e, load(x + e, n), n)
            y = float32s(y, to_next // 4)
            for i in range(vectors):
                xi = x + i * size
                start = load(xi, width)
                for j in range(i + 1):
                    column = columns[i * vectors + j]
                    if column:
                        xj = x + j * size
                        product = start * load(xj, width)
                        for e in range(STEP, size, STEP):
                            n = (size - e) // 4
                            product = fma(load(xi + e, n), load(xj + e, n), product)
                        y[column] = total(product)
        number = turn(pointer)


@loop(samples=int, vectors=int, size=int, features=int, columns=int, gradient=int, to_next=int, result=int)
def _dot_gradient(pointer):
    """A turn is some samples."""
    a = carray(pointer, 1)[0]
    turns, samples, vectors, features, gradient, to_next = (a.turns, a.samples, a.vectors, a.features, a.gradient,
                                                            a.to_next)
    columns = int64s(a.columns, vectors * vectors)
    result, size = a.result, 4 * a.size
    number = turn(pointer)
    while number < turns:
        for sample in range(number * _SAMPLES_A_TURN, min((number + 1) * _SAMPLES_A_TURN, samples)):
            x, dx = features + sample * vectors * size, result + sample * vectors * size
            dy = gradient + sample * to_next
            of_columns = float32s(dy, to_next // 4)
            for i in range(vectors):
                for e in range(0, size, STEP):
                    n = (size - e) // 4
                    g = splat(0) if i else load(dy + e, n)
                    for j in range(vectors):
                        column = columns[i * vectors + j]
                        if column:
                            factor = of_columns[column]
                            if i == j:  # a vector's product with itself
                                factor += factor
                            g = fma(splat(factor), load(x + j * size + e, n), g)
                    store(dx + i * size + e, g, n)
        number = turn(pointer)


@loop(samples=int, width=int, gradient=int, to_next=int, y=int, sums=int)
def _reverse_relu(pointer):
    """A turn is some samples."""
    a = carray(pointer, 1)[0]
    turns, samples, size, gradient, to_next, ys = a.turns, a.samples, 4 * a.width, a.gradient, a.to_next, a.y
    all_sums = a.sums
    number = turn(pointer)
    while number < turns:
        sums = all_sums + number * size
        for sample in range(number * _SAMPLES_A_SUM, min((number + 1) * _SAMPLES_A_SUM, samples)):
            g, y = gradient + sample * to_next, ys + sample * size
            for e in range(0, size, STEP):
                n = (size - e) // 4
                kept = where_not_positive(load(y + e, n), splat(0), load(g + e, n))
                store(g + e, kept, n)
                store(sums + e, load(sums + e, n) + kept, n)
        number = turn(pointer)


@loop(samples=int, p=int, label=int, low=float, high=float, negative_weight=float, positive_weight=float, gradient=int,
      sums=int)
def _cross_entropy(pointer):
    """A turn is some samples."""
    a = carray(pointer, 1)[0]
    turns, samples = a.turns, a.samples
    ps, labels, gradients = float32s(a.p, samples), float32s(a.label, samples), float32s(a.gradient, samples)
    sums, low, high = float64s(a.sums, turns), np.float32(a.low), np.float32(a.high)
    weights = np.float32(a.negative_weight), np.float32(a.positive_weight)
    one, floor, count = np.float32(1), np.float32(FLOOR), np.float32(samples)
    number = turn(pointer)
    while number < turns:
        terms = 0.0
        for sample in range(number * _TERMS_A_TURN, min((number + 1) * _TERMS_A_TURN, samples)):
            p, positive = ps[sample], labels[sample] == one
            clipped = p
            if p < low:
                clipped = low
            if p > high:
                clipped = high
            q = clipped if positive else one - clipped
            if q < floor:
                q = floor
            weight = weights[1] if positive else weights[0]
            terms -= weight * math.log(q)
            by_p = weight / q / count
            if p <= low or p >= high:
                by_p = np.float32(0)
            gradients[sample] = (-by_p if positive else by_p) * p * (one - p)
        sums[number] = terms
        number = turn(pointer)
