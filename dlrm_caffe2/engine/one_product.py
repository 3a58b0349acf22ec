"""The gradient of the dot interaction with one matrix product in place of two."""

import numpy as np

from dlrm_caffe2.net import make_operator, with_operators
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec.model import ModelSpec
from spec.parameters import Arrays

_COLUMNS, _VECTOR = "one_product.columns", "one_product.vector"
_FEATURES = "interaction.features"


def one_product(spec: ModelSpec, net: NetDef) -> tuple[NetDef, Arrays]:
    """A copy of the net, or the net itself where there is nothing to do, and the blobs that it reads besides.

    For P = X X', dX is dP X + dP' X = (dP + dP') X. The sum is symmetric: each pair's gradient stands at two places, on
    the diagonal its double with self-interaction, zeros without. All of it is looked up in the gradient of the
    interaction's output, beside which the diagonal is put; so is the dense vector's. The result differs by rounding.
    """
    scatter = next((operator for operator in net.op if operator.type == "BatchGatherGradient"), None)
    if scatter is None or not spec.pairs:
        return net, {}
    split = next(operator for operator in net.op if scatter.input[2] in operator.output)
    replaced, made = [split, scatter], set(scatter.output)
    for operator in net.op:
        if operator.type in ("ResizeLike", "BatchMatMul", "Sum") and not made.isdisjoint(operator.input):
            replaced.append(operator)
            made.update(operator.output)
    operators = []
    for operator in net.op:
        if operator is split:
            operators += _gradients(spec, split.input[0], split.output[0], replaced[-1].output[0])
        elif not any(operator is other for other in replaced):
            operators.append(operator)
    blobs = {_COLUMNS: _columns(spec), _VECTOR: np.arange(spec.embedding_dim)}
    return with_operators(net, operators, blobs), blobs


def _gradients(spec: ModelSpec, output: str, vector: str, features: str) -> list[OperatorDef]:
    """They make that of the dense vector, as it is handed on, and those of all vectors, from that of the output."""
    diagonal, columns, both = (f"one_product.{name}" for name in ("diagonal", "gradients", "both"))
    if spec.interaction.self_interaction:
        on_diagonal = make_operator("Scale", [output], [diagonal], scale=2.0)
    else:
        on_diagonal = make_operator("ConstantFill", ["label"], [diagonal], value=0.0)
    return [
        make_operator("BatchGather", [output, _VECTOR], [vector]),
        on_diagonal,
        make_operator("Concat", [output, diagonal], [columns, f"{columns}.lengths"], axis=1),
        make_operator("BatchGather", [columns, _COLUMNS], [both]),
        make_operator("BatchMatMul", [both, _FEATURES], [features]),
    ]


def _columns(spec: ModelSpec) -> np.ndarray:
    """int64 [F, F]: where the gradient for each place is found."""
    places = np.array(spec.pairs, np.int64)
    width = spec.embedding_dim + len(places)
    columns = np.full([spec.interacting_vectors] * 2, width, np.int64)
    columns[*places.T] = columns[*places.T[::-1]] = np.arange(spec.embedding_dim, width)
    if spec.interaction.self_interaction:
        np.fill_diagonal(columns, width + columns.diagonal())
    return columns
