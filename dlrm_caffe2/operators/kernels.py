"""Compiled loops that stand for a slow kernel of PyTorch's, or for several operators of a net (engine/fused.py).

They take tensors that are `rules.is_plain`: float32, on the CPU, contiguous. Nothing is checked here.
"""

from typing import Any

import torch
from numba import carray

from spec.native.loops import Team, float32s, int32s, int64s, loop, prefetch, turn
from spec.native.vectors import STEP, fma, load, splat, store, total

_TEAM = Team(torch._C.__file__)
_AHEAD = 16
"""How many rows early a row is fetched from memory, of those that one thread adds to."""
_SAMPLES_A_TURN = 32


def add_rows(table: Any, indices: Any, values: Any, weight: float, lengths: Any = None) -> None:
    """ScatterWeightedSum with a first weight of 1: table[indices[k]] += weight * values[k], in the order of k.

    Of SparseLengthsIndicesInGradientSumGradient's output, where there are `lengths`: a row of `values` [B, ...] then
    belongs to as many indices. Any number of threads gives the same bits: a row is one thread's.
    """
    threads = torch.get_num_threads()
    parts = 1
    while parts < threads:
        parts *= 2
    _TEAM.run(_add_rows, parts, threads, table=table.data_ptr(), row=table.stride(0), indices=indices.data_ptr(),
              short=indices.dtype is torch.int32, count=len(indices), values=values.data_ptr(),
              lengths=0 if lengths is None else lengths.data_ptr(), bags=len(values), weight=weight)


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


@loop(table=int, row=int, indices=int, short=int, count=int, values=int, lengths=int, bags=int, weight=float)
def _add_rows(pointer):
    """A turn takes the rows whose number has the turn's in its last bits."""
    a = carray(pointer, 1)[0]
    table, size, short, count, bags = a.table, 4 * a.row, a.short, a.count, a.bags
    few, many, lengths = int32s(a.indices, count), int64s(a.indices, count), int32s(a.lengths, bags)
    in_bags, last_bits, weight, ahead = a.lengths != 0, a.turns - 1, splat(a.weight), _AHEAD * a.turns
    mine = turn(pointer)
    while mine <= last_bits:
        value, k = a.values, 0
        for bag in range(bags):
            end = k + lengths[bag] if in_bags else k + 1
            while k < end:
                if k + ahead < count:
                    coming = few[k + ahead] if short else many[k + ahead]
                    if coming & last_bits == mine:
                        prefetch(table + coming * size, size)
                index = few[k] if short else many[k]
                if index & last_bits == mine:
                    at = table + index * size
                    for e in range(0, size, STEP):
                        left = (size - e) // 4
                        store(at + e, fma(weight, load(value + e, left), load(at + e, left)), left)
                k += 1
            value += size
        mine = turn(pointer)


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
