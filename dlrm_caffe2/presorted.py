"""Lookups sorted by row before a step, so that no operator of the net has to.

The sparse Adagrads need the gradients of a row summed. Within a net that takes Unique and UnsortedSegmentSum, which on
genuine Caffe2 are slow and single-threaded. The sorted lookups depend on the batch alone: fed with it, they turn the
sum into one SparseLengthsSum with the roles exchanged, whose bags are the rows and whose table is the gradient. SGD
takes them where the engine is faster so: rows in their order are found sooner in a large table.

An engine may want them in blocks of rows, each read, summed and used up before the next, so that rows and sums stay in
the cache.
"""

from collections.abc import Iterator, Mapping, Sequence
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
BLOCK_ROWS, BLOCK_LOOKUPS = "block_rows", "block_lookups"


def sorted_lookups(spec: ModelSpec, batch: Batch, blocks: Mapping[int, int], executor: Executor) -> Arrays:
    """For each of these tables blobs `tables.{t}.indices.{part}`, of part

    unique: int64 [U], the rows that are looked up, ascending.
    counts: int32 [U], how often each is.
    order: int32 [K], the places of the lookups of the first row, of the second, and so on, each in its own order.
    samples: int32 [K], the samples that these lookups belong to; in place of `order` where pooling is a plain sum.

    And for those of several blocks, `blocks[t]`:

    block_rows: int32 [blocks], how many of the rows belong to each block; the same but for the last ones, which may be
        empty.
    block_lookups: int32 [blocks], how many of the lookups.
    """
    def sort(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indices, lengths = batch.indices[number], batch.lengths[number]
        if _source(spec, number) == SAMPLES:
            return _sorted(indices, np.repeat(np.arange(batch.size, dtype=np.uint32), lengths), batch.size)
        return _sorted(indices, np.arange(len(indices), dtype=np.uint32), len(indices))

    blobs = {}
    for number, (rows, counts, places) in zip(blocks, executor.map(sort, blocks), strict=True):
        parts = {UNIQUE: rows, COUNTS: counts, _source(spec, number): places}
        if blocks[number] > 1:
            size = -(-len(rows) // blocks[number])
            ends = np.minimum(np.arange(1, blocks[number] + 1) * size, len(rows))
            lookups = np.append(0, counts.cumsum())[ends]
            parts |= {BLOCK_ROWS: np.diff(ends, prepend=0).astype(np.int32),
                      BLOCK_LOOKUPS: np.diff(lookups, prepend=0).astype(np.int32)}
        blobs |= {_name(number, part): array for part, array in parts.items()}
    return blobs


def update_by_row(spec: ModelSpec, operators: Sequence[OperatorDef], gradients: Mapping[str, str | Slice],
                  blocks: Mapping[int, int]) -> tuple[list[OperatorDef], dict[str, str | Slice]]:
    """The operators with the update of these tables, and the gradients of all other parameters.

    The gradient of a plain sum is looked up straight from the pooled rows' gradient: the operator that copies
    it to every lookup is left out.
    """
    operators, others, updates = list(operators), {}, []
    splits = [split for number, count in blocks.items() if count > 1 for split in _splits(spec, number, count)]
    for parameter, gradient in gradients.items():
        if not isinstance(gradient, Slice) or (number := int(parameter.split(".")[1])) not in blocks:
            others[parameter] = gradient
            continue
        source, places = gradient.values, _source(spec, number)
        if places == SAMPLES:
            operators = [operator for operator in operators if gradient.values not in operator.output]
            source = f"tables.{number}.pooled_grad"
        several = blocks[number] > 1
        for block in range(blocks[number]):
            unique, counts, lookups = (_name(number, part, block if several else None)
                                       for part in (UNIQUE, COUNTS, places))
            summed = Slice(unique, f"{gradient.values}_unique")
            if several and spec.optimizer.kind != "adagrad":  # SparseAdagrad fetches ahead by itself
                updates.append(_read_ahead(parameter, unique, _name(number, BLOCK_ROWS, block), summed.values))
            updates.append(make_operator("SparseLengthsSum", [source, lookups, counts], [summed.values]))
            updates += update_operators(spec, {parameter: summed}, [parameter])
    return splits + operators + updates, others


def _splits(spec: ModelSpec, number: int, count: int) -> Iterator[OperatorDef]:
    """Each part of the sorted lookups in blocks, `tables.{t}.indices.{part}.{block}`; `block_rows` is one number each.
    """
    sizes = {UNIQUE: BLOCK_ROWS, COUNTS: BLOCK_ROWS, _source(spec, number): BLOCK_LOOKUPS, BLOCK_ROWS: None}
    for part, size in sizes.items():
        inputs = [_name(number, part)] + [_name(number, size)] * (size is not None)
        yield make_operator("Split", inputs, [_name(number, part, block) for block in range(count)], axis=0,
                            part="embedding")


def _read_ahead(parameter: str, rows: str, count: str, output: str) -> OperatorDef:
    """Reads a block's rows into the cache: SparseLengthsSum fetches the next ones meanwhile, where the operators that
    update rows wait for each. Nobody needs its output, which the next operator overwrites: they form one chain, which
    a net of type "dag" need not schedule."""
    return make_operator("SparseLengthsSum", [parameter, rows, count], [output], part="optimizer")


def _name(number: int, part: str, block: int | None = None) -> str:
    return f"tables.{number}.indices.{part}" + (f".{block}" if block is not None else "")


def _source(spec: ModelSpec, number: int) -> str:
    """The gradient of a plain sum is the same for every lookup of a sample: it is found by the sample."""
    return SAMPLES if spec.tables[number].pooling == "sum" else ORDER


def _sorted(indices: np.ndarray, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct indices, how often each occurs, and the places, uint32 below `size` and ascending, of each one.

    Index and place in one number, of 32 bits where they fit: NumPy sorts numbers 10 times as fast as it finds an order.
    New memory takes as long as the sorting, so little is made.
    """
    bits = size.bit_length()
    top = int(indices.max(initial=0)) << bits | size
    keys = indices.astype(np.uint32 if top < 2**32 else np.uint64)
    keys <<= bits
    keys |= places
    keys.sort()
    places = (keys & ((1 << bits) - 1)).astype(np.uint32, copy=False).view(np.int32)
    keys >>= bits
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    counts = np.empty(len(starts), np.int32)
    np.subtract(starts[1:], starts[:-1], out=counts[:-1], casting="same_kind")
    counts[-1:] = len(keys) - starts[-1:]
    return keys[starts].astype(np.int64), counts, places
