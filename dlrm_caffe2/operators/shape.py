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
    INT32,
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
)
from dlrm_caffe2.operators.segments import CONSTANTS, KEYS, SORTED_RUNS


def _axis(node: Node, rank: int) -> int:
    """The axis to join or split along, in a tensor of this rank. Caffe2's default is 1, the channels of NCHW."""
    axis = node.args["axis"]
    node.require(not {"axis", "order"} <= node.given.keys(), "give an axis or an order, not both")
    node.require(node.args["order"] == "NCHW", f"expected order NCHW, found {node.args['order']}; give an axis")
    node.require(-rank <= axis < rank, f"axis {axis} is outside a tensor of rank {rank}")
    return axis % rank


def _stacks(node: Node) -> bool:
    """Whether the joined axis is a new one. Caffe2 ignores add_axis where no axis is given."""
    return bool(node.args["add_axis"]) and "axis" in node.given


def _concat_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which accepts inputs of a lower rank than the first and reads them askew."""
    first = inputs[0]
    axis = _axis(node, len(first.shape) + _stacks(node))
    for position, other in enumerate(inputs):
        expect_dtype(node, inputs, first.dtype, at=[position])
        expected = list(first.shape)
        if not _stacks(node) and len(other.shape) == len(expected):
            expected[axis] = other.shape[axis]
        expect_shape(node, inputs, position, tuple(expected))
    if _stacks(node):
        shape = (*first.shape[:axis], len(inputs), *first.shape[axis:])
    else:
        shape = (*first.shape[:axis], sum(other.shape[axis] for other in inputs), *first.shape[axis + 1:])
    return [TensorType(first.dtype, shape), TensorType(INT32, (len(inputs),))]


def piece_lengths(node: Node, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Concat's second output: the length of each piece along the axis, 1 along a new axis."""
    axis = _axis(node, len(shapes[0]) + _stacks(node))
    return tuple(1 if _stacks(node) else shape[axis] for shape in shapes)


def _concat_aten(node: Node, *inputs):
    """The joined tensor and, as int32, the lengths of its pieces."""
    import torch

    lengths = piece_lengths(node, [piece.shape for piece in inputs])
    info = torch.tensor(lengths, dtype=torch.int32, device=inputs[0].device)
    axis = _axis(node, inputs[0].dim() + _stacks(node))
    return (torch.stack if _stacks(node) else torch.cat)(inputs, axis), info


def _concat_onnx(node: Node, ranks: Sequence[int]) -> str:
    axis, count = _axis(node, ranks[0] + _stacks(node)), len(ranks)
    pieces, lengths = numbered("X", count), numbered("length", count)
    if _stacks(node):
        stacked = [f"{piece}_1" for piece in pieces]
        body = f"""
            axis = Constant<value_ints = [{axis}]>()
            {" ".join(f"{to} = Unsqueeze({piece}, axis)" for to, piece in zip(stacked, pieces, strict=True))}
            Y = Concat<axis = {axis}>({", ".join(stacked)})
            lengths = Constant<value_ints = {[1] * count}>()
        """
    else:
        body = f"""
            Y = Concat<axis = {axis}>({", ".join(pieces)})
            {" ".join(f"{length} = Shape<start = {axis}, end = {axis + 1}>({piece})"
                      for length, piece in zip(lengths, pieces, strict=True))}
            lengths = Concat<axis = 0>({", ".join(lengths)})
        """
    return function(node, pieces, ["Y", "info"], body + "info = Cast<to = 6>(lengths)",
                    variant=[count, "axis", axis, *(["stacked"] if _stacks(node) else [])])


def _concat_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    gradients = [grad(name) for name in node.inputs]
    operator = gradient_operator("Split", [dense(node, outputs[0]), node.outputs[1]], gradients, **node.given)
    return GradientOps([operator], gradients)


def _split_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """X, and optionally the int32 lengths of the pieces, which are then not known from the types alone."""
    x, pieces = inputs[0], len(node.outputs)
    axis = _axis(node, len(x.shape))
    channels, rest = x.shape[axis], (x.shape[:axis], x.shape[axis + 1:])
    if len(inputs) == 2:
        expect_dtype(node, inputs, INT32, at=[1])
        expect_size(node, inputs, 1, pieces)
        node.require(not node.args["split"], "give the lengths as an input or as an argument, not as both")
        sizes = [-1] * pieces
    elif node.args["split"]:
        sizes = list(node.args["split"])
        _expect_pieces(node, sizes, channels)
    else:
        node.require(channels % pieces == 0, f"dimension {channels} cannot be split into {pieces} equal pieces")
        sizes = [channels // pieces] * pieces
    if _stacks(node):
        node.require(channels == pieces, f"add_axis: expected {pieces} along axis {axis}, found {channels}")
        return [TensorType(x.dtype, rest[0] + rest[1])] * pieces
    return [TensorType(x.dtype, (*rest[0], length, *rest[1])) for length in sizes]


def _expect_pieces(node: Node, sizes: Sequence[int], channels: int) -> None:
    node.require(len(sizes) == len(node.outputs), f"expected {len(node.outputs)} lengths, found {len(sizes)}")
    node.require(min(sizes) >= 0 and sum(sizes) == channels,
                 f"expected lengths of 0 or more that add up to {channels}, found {list(sizes)}")


def _split_aten(node: Node, x, lengths=None):
    import torch

    axis = _axis(node, x.dim())
    if _stacks(node):
        # All pieces in one new block of memory.
        return x.movedim(axis, 0).clone(memory_format=torch.contiguous_format).unbind(0)
    if lengths is not None:
        sizes = lengths.reshape(-1).tolist()
        _expect_pieces(node, sizes, x.shape[axis])
    else:
        sizes = list(node.args["split"]) or [x.shape[axis] // len(node.outputs)] * len(node.outputs)
    return tuple(piece.clone(memory_format=torch.contiguous_format) for piece in x.split(sizes, axis))


def _split_onnx(node: Node, ranks: Sequence[int]) -> str:
    axis, count = _axis(node, ranks[0]), len(node.outputs)
    pieces = numbered("Y", count)
    parts = [f"{piece}_1" for piece in pieces] if _stacks(node) else pieces
    sizes, variant, attributes = "", "equal", [f"num_outputs = {count}"]
    body = f"{', '.join(parts)} = Split<{{}}>(X{{}})"
    if len(ranks) == 2:
        body, variant = "sizes = Cast<to = 7>(lengths) " + body, "lengths"
    elif node.args["split"]:
        body, variant = "sizes = Constant<value_ints: ints = @split>() " + body, "split"
    if variant != "equal":
        sizes, attributes = ", sizes", []
    body = body.format(", ".join([f"axis = {axis}", *attributes]), sizes)
    if _stacks(node):
        body += f" axis = Constant<value_ints = [{axis}]>() " + " ".join(
            f"{piece} = Squeeze({part}, axis)" for piece, part in zip(pieces, parts, strict=True))
    return function(node, ["X", "lengths"][:len(ranks)], pieces, body,
                    attributes=["split"] if variant == "split" else [],
                    variant=[count, variant, "axis", axis, *(["stacked"] if _stacks(node) else [])])


def _split_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    """Stricter than Caffe2, which leaves out a piece that has no gradient and returns a wrong shape."""
    dx = grad(node.inputs[0])
    operator = gradient_operator("Concat", [dense(node, output) for output in outputs], [dx, f"_{dx}_dims"],
                                 **node.given)
    return GradientOps([operator], [dx, None][:len(node.inputs)])


def _flatten_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    x, axis = inputs[0], node.args["axis"]
    node.require(0 <= axis <= len(x.shape), f"axis {axis} is outside a tensor of rank {len(x.shape)}")
    return [TensorType(x.dtype, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))]


def _flatten_aten(node: Node, x):
    axis = node.args["axis"]
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])).clone()


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
    return data.index_select(1, indices.reshape(-1)).reshape(len(data), *indices.shape, *data.shape[2:])


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
    import torch

    return x.to(getattr(torch, DTYPES[node.args["to"]].name), copy=True)


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
    total = first.clone()
    for other in others:
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

# Split's arguments reach Concat as its gradient, which ignores `split`; and Flatten's reach ResizeLike.
_JOIN = {"axis": Arg("i", 1), "add_axis": Arg("i", 0), "split": Arg("ints", ()), "order": Arg("s", "NCHW")}
_FLATTEN = {"axis": Arg("i", 1)}

OPERATORS = [
    Operator("Concat", (1, ANY_NUMBER), (2, 2), _concat_infer, _concat_aten, _JOIN, _concat_gradient,
             _concat_onnx),
    Operator("Split", (1, 2), (1, ANY_NUMBER), _split_infer, _split_aten, _JOIN, _split_gradient, _split_onnx),
    Operator("Flatten", (1, 1), (1, 1), _flatten_infer, _flatten_aten, _FLATTEN, _resize_gradient, _flatten_onnx),
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
