"""Lookups sorted by row before a step, so that no operator of the net has to.

The sparse Adagrads need the gradients of a row summed. Within a net that takes Unique and UnsortedSegmentSum, which on
genuine Caffe2 are slow and single-threaded. The sorted lookups depend on the batch alone: fed with it, they turn the
sum into one SparseLengthsSum with the roles exchanged, whose bags are the rows and whose table is the gradient. SGD
takes them where the engine is faster so: rows in their order are found sooner in a large table.

An engine may want them in blocks of rows, each summed and used up before the next, so that the sums stay in the cache.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators.record import Slice
from dlrm_caffe2.optimizer import update_operators
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays

UNIQUE, COUNTS, SAMPLES, ORDER = "unique", "counts", "samples", "order"


def sorted_lookups(spec: ModelSpec, batch: Batch, blocks: Mapping[int, int], executor: Executor) -> Arrays:
    """For each of these tables and its blocks, 0 to `blocks[t]` - 1, blobs `tables.{t}.indices.{part}.{block}`, of part

    unique: int64 [U], the rows that are looked up, ascending.
    counts: int32 [U], how often each is.
    order: int32 [K], the places of the lookups of the first row, of the second, and so on, each in its own order.
    samples: int32 [K], the samples that these lookups belong to; in place of `order` where pooling is a plain sum.

    A table's blocks have as many rows each, but for one, and are empty where there are not enough.
    """
    def sort(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indices = batch.indices[number]
        if _source(spec, number) == SAMPLES:
            return _sorted(indices, np.repeat(np.arange(batch.size), batch.lengths[number]), batch.size)
        return _sorted(indices, np.arange(len(indices)), len(indices))

    blobs = {}
    for number, (rows, counts, places) in zip(blocks, executor.map(sort, blocks), strict=True):
        size = -(-len(rows) // blocks[number])
        ends = np.append(0, counts.cumsum())
        for block in range(blocks[number]):
            start, end = (min(at * size, len(rows)) for at in (block, block + 1))
            blobs[_name(number, UNIQUE, block)] = rows[start:end]
            blobs[_name(number, COUNTS, block)] = counts[start:end]
            blobs[_name(number, _source(spec, number), block)] = places[ends[start]:ends[end]]
    return blobs


def update_by_row(spec: ModelSpec, operators: Sequence[OperatorDef], gradients: Mapping[str, str | Slice],
                  blocks: Mapping[int, int]) -> tuple[list[OperatorDef], dict[str, str | Slice]]:
    """The operators with the update of these tables, and the gradients of all other parameters.

    The gradient of a plain sum is looked up straight from the pooled rows' gradient: the operator that copies
    it to every lookup is left out.
    """
    operators, others, updates = list(operators), {}, []
    for parameter, gradient in gradients.items():
        if not isinstance(gradient, Slice) or (number := int(parameter.split(".")[1])) not in blocks:
            others[parameter] = gradient
            continue
        source, places = gradient.values, _source(spec, number)
        if places == SAMPLES:
            operators = [operator for operator in operators if gradient.values not in operator.output]
            source = f"tables.{number}.pooled_grad"
        for block in range(blocks[number]):
            summed = Slice(_name(number, UNIQUE, block), f"{gradient.values}_unique")
            lookups = [_name(number, part, block) for part in (places, COUNTS)]
            updates.append(make_operator("SparseLengthsSum", [source, *lookups], [summed.values]))
            updates += update_operators(spec, {parameter: summed}, [parameter])
    return operators + updates, others


def _name(number: int, part: str, block: int) -> str:
    return f"tables.{number}.indices.{part}.{block}"


def _source(spec: ModelSpec, number: int) -> str:
    """The gradient of a plain sum is the same for every lookup of a sample: it is found by the sample."""
    return SAMPLES if spec.tables[number].pooling == "sum" else ORDER


def _sorted(indices: np.ndarray, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct indices, how often each occurs, and the places, which are below `size` and ascending, of each one.

    Index and place in one number, of 32 bits where they fit: NumPy sorts numbers 10 times as fast as it finds an order.
    """
    bits = size.bit_length()
    top = int(indices.max(initial=0)) << bits | size
    keys = indices.astype(np.uint32 if top < 2**32 else np.int64)
    keys <<= bits
    keys |= places.astype(keys.dtype)
    keys.sort()
    rows = keys >> bits
    first = np.ones(len(rows), bool)
    np.not_equal(rows[1:], rows[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=len(rows)).astype(np.int32)
    return rows[starts].astype(np.int64), counts, (keys & ((1 << bits) - 1)).astype(np.int32)
