"""Operators that move, reshape, convert or add whole tensors.

A kernel never returns a view of its input: a later operator may update that in place.
"""

import math
from collections.abc import Sequence

import numpy as np

from dlrm_caffe2.net import DTYPES
from dlrm_caffe2.operators.lowering import function, numbered, onnx_type, simple
from dlrm_caffe2.operators.record import (
    FLOAT,
    Arg,
    Gradient,
    GradientOps,
    Node,
    Operator,
    TensorType,
    grad,
    gradient_operator,
)
from dlrm_caffe2.operators.rules import (
    ANY_NUMBER,
    DOUBLE,
    INDEX,
    NUMERIC,
    dense,
    expect_dtype,
    expect_indices,
    expect_rank,
    expect_shape,
    expect_size,
    same_as_input,
    size,
    torch_dtype,
)
from dlrm_caffe2.operators.segments import CONSTANTS, KEYS, SORTED_RUNS


def _flatten_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    x, axis = inputs[0], node.args["axis"]
    node.require(0 <= axis <= len(x.shape), f"axis {axis} is outside a tensor of rank {len(x.shape)}")
    return [TensorType(x.dtype, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))]


def _flatten_aten(node: Node, x):
    axis = node.args["axis"]
    matrix = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return matrix if node.overwrites(0) else matrix.clone()


def _flatten_onnx(node: Node, ranks: Sequence[int]) -> str:
    axis = node.args["axis"]
    return function(node, "X", "Y", f"Y = Flatten<axis = {axis}>(X)", variant=[] if axis == 1 else ["axis", axis])


def _vector_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_rank(node, inputs, 0, 1)
    return [TensorType(inputs[0].dtype, (size(inputs[0]),))]


def _vector_aten(node: Node, x):
    return x.reshape(-1).clone()


def _resize_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    (x,) = node.inputs
    operator = gradient_operator("ResizeLike", [dense(node, outputs[0]), x], [grad(x)], **node.given)
    return GradientOps([operator], [grad(x)])


def _resize_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """The values of the first input in the shape of the second. `axis` is there for Flatten's gradient, and unused."""
    expect_size(node, inputs, 0, size(inputs[1]))
    return [TensorType(inputs[0].dtype, inputs[1].shape)]


def _resize_aten(node: Node, x, like):
    return x.reshape(like.shape).clone()


def _batch_gather_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Y = D[:, I], any dtype: shape D[:1] + I + D[2:]."""
    data, indices = inputs
    expect_dtype(node, inputs, *INDEX, at=[1])
    expect_rank(node, inputs, 0, 2)
    return [TensorType(data.dtype, data.shape[:1] + indices.shape + data.shape[2:])]


def _batch_gather_aten(node: Node, data, indices):
    """Unlike Gather's, a negative index is refused."""
    expect_indices(node, 1, indices, data.shape[1])
    if indices.dim() == 1:
        return data.index_select(1, indices)
    return data.index_select(1, indices.reshape(-1)).reshape(data.shape[0], *indices.shape, *data.shape[2:])


def _batch_gather_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    data, indices = node.inputs
    operator = gradient_operator("BatchGatherGradient", [data, indices, dense(node, outputs[0])], [grad(data)])
    return GradientOps([operator], [grad(data), None])


def _batch_scatter_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which does not compare the shape of dY and reads outside a short one."""
    data, indices, _ = inputs
    expect_dtype(node, inputs, FLOAT, at=[0, 2])
    expect_dtype(node, inputs, *INDEX, at=[1])
    expect_rank(node, inputs, 0, 2)
    expect_shape(node, inputs, 2, data.shape[:1] + indices.shape + data.shape[2:])
    return [data]


def _batch_scatter_aten(node: Node, data, indices, dy):
    import torch

    expect_indices(node, 1, indices, data.shape[1])
    flat = indices.reshape(-1).long()
    dy = dy.reshape(len(data), len(flat), *data.shape[2:])
    places = flat.reshape(1, -1, *[1] * (data.dim() - 2)).expand_as(dy)
    return torch.zeros_like(data).scatter_add_(1, places, dy)


_BATCH_SCATTER = f"""
    {CONSTANTS}
    everything = Constant<value_ints = [-1]>()
    axis2 = Constant<value_ints = [2]>()
    flat = Reshape(I, everything)
    {KEYS.format(indices="flat")}
    {SORTED_RUNS}
    batch = Shape<end = 1>(D)
    columns = Shape<start = 1, end = 2>(D)
    rest = Shape<start = 2>(D)
    pieces_shape = Concat<axis = 0>(batch, count, rest)
    pieces = Reshape<allowzero = 1>(dY, pieces_shape)
    nothing_shape = Concat<axis = 0>(batch, axis1, rest)
    nothing = ConstantOfShape(nothing_shape)
    padded = Concat<axis = 1>(pieces, nothing)
    all_sizes = Concat<axis = 0>(axis1, sizes)
    most = ReduceMax<keepdims = 0>(all_sizes)
    lane = Range(zero, most, one)
    sizes_U1 = Unsqueeze(sizes, axis1)
    starts_U1 = Unsqueeze(starts, axis1)
    used_UR = Less(lane, sizes_U1)
    last_U1 = Sub(sizes_U1, one)
    lane_UR = Min(lane, last_U1)
    place_UR = Add(starts_U1, lane_UR)
    piece_UR = Gather(order, place_UR)
    piece_or_none_UR = Where(used_UR, piece_UR, count)
    width = Reshape(most, axis1)
    sources_shape = Concat<axis = 0>(columns, width)
    none_CR = Expand(count, sources_shape)
    source_CR = ScatterND(none_CR, distinct_U1, piece_or_none_UR)
    terms = Gather<axis = 1>(padded, source_CR)
    dD = ReduceSum<keepdims = 0>(terms, axis2)
"""
"""Looks up, for each column, the R places that it was gathered to, R being the most that any has; the others look up
the zeros that are appended."""


def _cast_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Between the data types of net.DTYPES, float16 excepted, as on Caffe2's CPU. Towards zero for integers."""
    node.require(node.args["to"] in DTYPES, f"'to' {node.args['to']} is not a supported data type")
    target = DTYPES[node.args["to"]]
    for dtype in (inputs[0].dtype, target):
        node.require(dtype != np.float16, "float16 is not supported")
    return [TensorType(target, inputs[0].shape)]


def _cast_aten(node: Node, x):
    return x.to(torch_dtype(DTYPES[node.args["to"]]), copy=True)


def _cast_onnx(node: Node, ranks: Sequence[int]) -> str:
    target = DTYPES[node.args["to"]]
    return function(node, "X", "Y", f"Y = Cast<to = {onnx_type(target)}>(X)", variant=[target])


def _any_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    return [inputs[0]]


def _copy_aten(node: Node, x, like=None):
    return x.clone()


def _copy_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    (x,) = node.inputs
    return GradientOps([gradient_operator("CopyOnDeviceLike", [dense(node, outputs[0]), x], [grad(x)])], [grad(x)])


def _sum_aten(node: Node, first, *others):
    total = first + others[0] if others else first.clone()
    for other in others[1:]:
        total += other
    return total


def _sum_onnx(node: Node, ranks: Sequence[int]) -> str:
    """ONNX's own Sum takes no integers."""
    terms = numbered("X", len(ranks))
    body, total = "", terms[0]
    for number, term in enumerate(terms[1:], 1):
        body += f"sum{number} = Add({total}, {term}) "
        total = f"sum{number}"
    return function(node, terms, "Y", f"{body} Y = Identity({total})", variant=[len(ranks)])


def _sum_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    return GradientOps([], list(outputs) * len(node.inputs))


def _scale_aten(node: Node, x):
    return x * node.args["scale"]


def _scale_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    dx = grad(node.inputs[0])
    return GradientOps([gradient_operator("Scale", [dense(node, outputs[0])], [dx], **node.given)], [dx])


_SCALE = """
    scale = Constant<value_float: float = @scale>()
    scale_like = CastLike(scale, X)
    Y = Mul(X, scale_like)
"""
_RESIZE = """
    shape = Shape(like)
    Y = Reshape<allowzero = 1>(X, shape)
"""
_VECTOR = """
    shape = Constant<value_ints = [-1]>()
    Y = Reshape(X, shape)
"""

_FLATTEN = {"axis": Arg("i", 1)}  # reaches ResizeLike, its gradient

OPERATORS = [
    Operator("Flatten", (1, 1), (1, 1), _flatten_infer, _flatten_aten, _FLATTEN, _resize_gradient, _flatten_onnx,
             overwrites=0),
    Operator("FlattenToVec", (1, 1), (1, 1), _vector_infer, _vector_aten, gradient=_resize_gradient,
             onnx=simple("X", _VECTOR)),
    Operator("ResizeLike", (2, 2), (1, 1), _resize_infer, _resize_aten, _FLATTEN,
             onnx=simple("X, like", _RESIZE)),
    Operator("BatchGather", (2, 2), (1, 1), _batch_gather_infer, _batch_gather_aten,
             gradient=_batch_gather_gradient, onnx=simple("D, I", "Y = Gather<axis = 1>(D, I)")),
    Operator("BatchGatherGradient", (3, 3), (1, 1), _batch_scatter_infer, _batch_scatter_aten,
             onnx=simple("D, I, dY", _BATCH_SCATTER, outputs="dD")),
    Operator("Cast", (1, 1), (1, 1), _cast_infer, _cast_aten, {"to": Arg("i", required=True)},
             onnx=_cast_onnx),
    Operator("Copy", (1, 1), (1, 1), _any_infer, _copy_aten, gradient=_copy_gradient,
             onnx=simple("X", "Y = Identity(X)")),
    Operator("CopyOnDeviceLike", (2, 2), (1, 1), _any_infer, _copy_aten,
             onnx=simple("X, like", "Y = Identity(X)")),
    Operator("Sum", (1, ANY_NUMBER), (1, 1), same_as_input(0, *NUMERIC), _sum_aten, gradient=_sum_gradient,
             onnx=_sum_onnx),
    Operator("Scale", (1, 1), (1, 1), same_as_input(0, FLOAT, DOUBLE), _scale_aten, {"scale": Arg("f", 1.0)},
             _scale_gradient, simple("X", _SCALE, "scale")),
]
