"""Lookups sorted by row before a step, so that no operator of the net has to.

The sparse Adagrads need the gradients of a row summed. Within a net that takes Unique and UnsortedSegmentSum, which on
genuine Caffe2 are slow and single-threaded. The sorted lookups depend on the batch alone: fed with it, they turn the
sum into one SparseLengthsSum with the roles exchanged, whose bags are the rows and whose table is the gradient. SGD
takes them where the engine is faster so: rows in their order are found sooner in a large table.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators.record import Slice
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays

UNIQUE, COUNTS, SAMPLES, ORDER = "unique", "counts", "samples", "order"


def sorted_lookups(spec: ModelSpec, batch: Batch, tables: Collection[int], executor: Executor) -> Arrays:
    """For each of these tables, blobs `tables.{t}.indices.` + :

    unique: int64 [U], the rows that are looked up, ascending.
    counts: int32 [U], how often each is.
    order: int32 [K], the places of the lookups of the first row, of the second, and so on, each in its own order.
    samples: int32 [K], the samples that these lookups belong to; in place of `order` where pooling is a plain sum.
    """
    def sort(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indices = batch.indices[number]
        if _source(spec, number) == SAMPLES:
            return _sorted(indices, np.repeat(np.arange(batch.size), batch.lengths[number]), batch.size)
        return _sorted(indices, np.arange(len(indices)), len(indices))

    return {_name(number, part): array
            for number, arrays in zip(tables, executor.map(sort, tables), strict=True)
            for part, array in zip((UNIQUE, COUNTS, _source(spec, number)), arrays, strict=True)}


def sum_by_row(spec: ModelSpec, operators: Sequence[OperatorDef], gradients: Mapping[str, str | Slice],
               tables: Collection[int]) -> tuple[list[OperatorDef], dict[str, str | Slice]]:
    """The operators, and the gradients that they make, each Slice of these tables with its rows distinct and ascending.

    The gradient of a plain sum is looked up straight from the pooled rows' gradient: the operator that copies
    it to every lookup is left out.
    """
    operators, summed = list(operators), dict(gradients)
    for parameter, gradient in gradients.items():
        if not isinstance(gradient, Slice) or (number := int(parameter.split(".")[1])) not in tables:
            continue
        source, places = gradient.values, _source(spec, number)
        if places == SAMPLES:
            operators = [operator for operator in operators if gradient.values not in operator.output]
            source = f"tables.{number}.pooled_grad"
        values = f"{gradient.values}_unique"
        operators.append(make_operator("SparseLengthsSum", [source, _name(number, places), _name(number, COUNTS)],
                                       [values]))
        summed[parameter] = Slice(_name(number, UNIQUE), values)
    return operators, summed


def _name(number: int, part: str) -> str:
    return f"tables.{number}.indices.{part}"


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
