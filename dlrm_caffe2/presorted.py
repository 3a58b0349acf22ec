"""Lookups sorted by row before a step, so that no operator of the net has to.

The sparse Adagrads need the gradients of a row summed. Within a net that takes Unique and UnsortedSegmentSum, which on
genuine Caffe2 are slow and single-threaded. The sorted lookups depend on the batch alone: fed with it, they turn the
sum into one SparseLengthsSum with the roles exchanged, whose bags are the rows and whose table is the gradient. SGD
takes them where the engine is faster so.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators.record import Slice
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays

UNIQUE, COUNTS, SAMPLES, ORDER = "unique", "counts", "samples", "order"


def sorted_lookups(spec: ModelSpec, batch: Batch) -> Arrays:
    """For each table, blobs `tables.{t}.indices.` + :

    unique: int64 [U], the rows that are looked up, ascending.
    counts: int32 [U], how often each is.
    order: int32 [K], the places of the lookups of the first row, of the second, and so on, each in its own order.
    samples: int32 [K], the samples that these lookups belong to; in place of `order` where pooling is a plain sum.
    """
    blobs = {}
    for number, (table, indices, lengths) in enumerate(zip(spec.tables, batch.indices, batch.lengths, strict=True)):
        rows, counts, order = _sorted(indices)
        blobs[_name(number, UNIQUE)], blobs[_name(number, COUNTS)] = rows, counts
        if table.pooling == "sum":
            samples = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            blobs[_name(number, SAMPLES)] = samples[order]
        else:
            blobs[_name(number, ORDER)] = order.astype(np.int32)
    return blobs


def sum_by_row(spec: ModelSpec, operators: Sequence[OperatorDef],
               gradients: Mapping[str, str | Slice]) -> tuple[list[OperatorDef], dict[str, str | Slice]]:
    """The operators, and the gradients that they make, every Slice with its rows distinct and ascending.

    The gradient of a plain sum is looked up straight from the pooled rows' gradient: the operator that copies
    it to every lookup is left out.
    """
    operators, summed = list(operators), dict(gradients)
    for parameter, gradient in gradients.items():
        if not isinstance(gradient, Slice):
            continue
        number = int(parameter.split(".")[1])
        source, places = gradient.values, ORDER
        if spec.tables[number].pooling == "sum":
            operators = [operator for operator in operators if gradient.values not in operator.output]
            source, places = f"tables.{number}.pooled_grad", SAMPLES
        values = f"{gradient.values}_unique"
        operators.append(make_operator("SparseLengthsSum", [source, _name(number, places), _name(number, COUNTS)],
                                       [values]))
        summed[parameter] = Slice(_name(number, UNIQUE), values)
    return operators, summed


def _name(number: int, part: str) -> str:
    return f"tables.{number}.indices.{part}"


def _sorted(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct indices, how often each occurs, and the places of its occurrences.

    Index and place in one number, since NumPy sorts numbers 10 times as fast as it finds an order.
    """
    bits = len(indices).bit_length()
    keys = np.sort(indices << bits | np.arange(len(indices)))
    rows = keys >> bits
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return rows[starts], np.diff(starts, append=len(rows)).astype(np.int32), keys & ((1 << bits) - 1)
