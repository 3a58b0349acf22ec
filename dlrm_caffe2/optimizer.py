"""The optimizers as operators of a train net (SPEC.md, 7). Caffe2's updates add, so the rate is negative."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators.record import Slice
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef
from spec.model import ModelSpec
from spec.parameters import Arrays, moment_name

RATE = "minus_learning_rate"
ONE = "one"


def optimizer_constants(spec: ModelSpec) -> Arrays:
    """Blobs of one float32 that the updates read."""
    blobs = {RATE: np.array([-spec.optimizer.learning_rate], np.float32)}
    return blobs | {ONE: np.ones(1, np.float32)} if spec.optimizer.kind == "sgd" else blobs


def needs_distinct_rows(spec: ModelSpec) -> bool:
    """The sparse Adagrads apply a repeated row's gradients one after the other, which is another result."""
    return spec.optimizer.kind != "sgd"


def update_operators(spec: ModelSpec, gradients: Mapping[str, str | Slice],
                     distinct: Collection[str] = ()) -> Iterator[OperatorDef]:
    """The update of every parameter in `gradients`, in place. `distinct`: those whose Slice lists no row twice."""
    rule = _sgd if spec.optimizer.kind == "sgd" else _adagrad
    coalesced: set[str] = set()
    for parameter, gradient in gradients.items():
        if isinstance(gradient, Slice) and needs_distinct_rows(spec) and parameter not in distinct:
            yield from _coalesce(gradient, coalesced)
            gradient = _unique(gradient)
        update = rule(spec, parameter, gradient)
        if parameter in distinct:
            update.arg.add(name="distinct_rows", i=1)
        yield update


def _sgd(spec: ModelSpec, parameter: str, gradient: str | Slice) -> OperatorDef:
    """w += -lr g; ScatterWeightedSum adds a row's occurrences one by one."""
    if isinstance(gradient, Slice):
        inputs = [parameter, ONE, gradient.indices, gradient.values, RATE]
        return make_operator("ScatterWeightedSum", inputs, [parameter])
    return make_operator("WeightedSum", [parameter, ONE, gradient, RATE], [parameter])


def _adagrad(spec: ModelSpec, parameter: str, gradient: str | Slice) -> OperatorDef:
    """h += g^2, or its mean over the row; w += -lr g / (sqrt(h) + eps)."""
    state = [parameter, moment_name(parameter)]
    if isinstance(gradient, Slice):
        kind = "RowWiseSparseAdagrad" if spec.optimizer.kind == "rowwise_adagrad" else "SparseAdagrad"
        inputs = [*state, *gradient, RATE]
    else:
        kind, inputs = "Adagrad", [*state, gradient, RATE]
    return make_operator(kind, inputs, state, epsilon=spec.optimizer.eps)


def _unique(gradient: Slice) -> Slice:
    return Slice(f"{gradient.indices}_unique", f"{gradient.values}_unique")


def _coalesce(gradient: Slice, done: set[str]) -> Iterator[OperatorDef]:
    """Sum the values of a repeated row.

    `done` lists the index blobs that have been made unique: a table's two parameters share theirs.
    """
    unique, places = _unique(gradient), f"{gradient.indices}_places"
    if gradient.indices not in done:
        done.add(gradient.indices)
        yield make_operator("Unique", [gradient.indices], [unique.indices, places])
    yield make_operator("UnsortedSegmentSum", [gradient.values, places], [unique.values])
