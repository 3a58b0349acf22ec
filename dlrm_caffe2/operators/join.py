"""Tensors side by side: Concat and Split, each the gradient of the other.

A kernel never returns a view of its input: a later operator may update that in place.
"""

from collections.abc import Sequence

import numpy as np

from dlrm_caffe2.operators.lowering import function, numbered
from dlrm_caffe2.operators.record import (
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
    dense,
    expect_dtype,
    expect_shape,
    expect_size,
)


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

    axis, stacks = node.args["axis"], _stacks(node)
    lengths = [1] * len(inputs) if stacks else [piece.shape[axis] for piece in inputs]
    info = torch.from_numpy(np.array(lengths, np.int32)).to(inputs[0].device)  # torch.tensor takes three times as long
    return (torch.stack if stacks else torch.cat)(inputs, axis), info


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

    axis = node.args["axis"]
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

# Split's arguments reach Concat as its gradient, which ignores `split`.
_JOIN = {"axis": Arg("i", 1), "add_axis": Arg("i", 0), "split": Arg("ints", ()), "order": Arg("s", "NCHW")}

OPERATORS = [
    Operator("Concat", (1, ANY_NUMBER), (2, 2), _concat_infer, _concat_aten, _JOIN, _concat_gradient,
             _concat_onnx),
    Operator("Split", (1, 2), (1, ANY_NUMBER), _split_infer, _split_aten, _JOIN, _split_gradient, _split_onnx),
]
