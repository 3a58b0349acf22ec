"""What a loss takes besides cross-entropies: squared distance, clipping, weights, the mean."""

import math
from collections.abc import Sequence

import numpy as np

from dlrm_caffe2.operators.lowering import function, reshaped, simple
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
    NUMERIC,
    dense,
    expect_dtype,
    expect_rank,
    expect_shape,
    expect_size,
    same_as_input,
    size,
)

_LARGEST = float(np.finfo(np.float32).max)


def _distance_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    expect_rank(node, inputs, 0, 1)
    expect_shape(node, inputs, 1, inputs[0].shape)
    return [TensorType(FLOAT, inputs[0].shape[:1])]


def _distance_aten(node: Node, x, y):
    """Half the sum, over all dimensions but the first, of (x - y)^2.

    Caffe2 expands the square (x^2 - 2xy + y^2), which is less accurate where x is near y; this does not.
    """
    difference = (x - y).reshape(len(x), math.prod(x.shape[1:]))
    return 0.5 * (difference * difference).sum(1)


def _distance_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    x, y = node.inputs
    gradients = [grad(x), grad(y)]
    operator = gradient_operator("SquaredL2DistanceGradient", [x, y, dense(node, outputs[0])], gradients)
    return GradientOps([operator], gradients)


def _distance_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT, at=[2])
    expect_shape(node, inputs, 2, _distance_infer(node, inputs[:2])[0].shape)
    return [inputs[0], inputs[1]]


def _distance_gradient_aten(node: Node, x, y, dz):
    dx = dz.reshape(-1, *[1] * (x.dim() - 1)) * (x - y)
    return dx, -dx


def _distance_gradient_onnx(node: Node, ranks: Sequence[int]) -> str:
    rank = ranks[0]
    column = f"others = Constant<value_ints = {list(range(1, rank))}>() column = Unsqueeze(dZ, others)"
    return function(node, ["X", "T", "dZ"], ["dX", "dT"], f"""
        difference = Sub(X, T)
        {column if rank > 1 else "column = Identity(dZ)"}
        dX = Mul(column, difference)
        dT = Neg(dX)
    """, variant=() if rank == 2 else ("rank", rank))


def _clip_aten(node: Node, x):
    return x.clamp(node.args["min"], node.args["max"])


def _clip_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    dx = grad(node.inputs[0])
    operator = gradient_operator("ClipGradient", [node.outputs[0], dense(node, outputs[0])], [dx], **node.given)
    return GradientOps([operator], [dx])


def _clip_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    expect_size(node, inputs, 1, size(inputs[0]))
    return [inputs[0]]


def _clip_gradient_aten(node: Node, y, dy):
    """dY strictly inside the bounds, 0 at and beyond them."""
    return dy.reshape(y.shape) * ((y > node.args["min"]) & (y < node.args["max"]))


def _broadcast(node: Node, a: TensorType, b: TensorType) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise node.error(f"cannot broadcast {a} and {b}") from None


def _mul_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, *NUMERIC)
    expect_dtype(node, inputs, inputs[0].dtype)
    return [TensorType(inputs[0].dtype, _broadcast(node, *inputs))]


def _mul_aten(node: Node, a, b):
    return a * b


def _mul_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    gradients = [grad(name) for name in node.inputs]
    return GradientOps([gradient_operator("MulGradient", [dense(node, outputs[0]), *node.inputs], gradients)],
                       gradients)


def _mul_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which does not compare the shape of dC and reads outside a short one."""
    (product,) = _mul_infer(node, inputs[1:])
    expect_dtype(node, inputs, product.dtype, at=[0])
    expect_shape(node, inputs, 0, product.shape)
    return [inputs[1], inputs[2]]


def _mul_gradient_aten(node: Node, dc, a, b):
    """dA = dC * B and dB = dC * A, summed over the dimensions along which an input was broadcast."""
    return (dc * b).sum_to_size(a.shape), (dc * a).sum_to_size(b.shape)


def _mul_gradient_onnx(node: Node, ranks: Sequence[int]) -> str:
    """Only a run tells along which dimensions an input was broadcast. Each dimension of the product is cut in two, that
    of the input and how often it was repeated, 1 for most: the sum is over the latter, whatever they are. Axes that are
    themselves computed would say the same, and OpenVINO refuses them."""
    rank, body = ranks[0], ""
    if not rank:
        return function(node, ["dC", "A", "B"], ["dA", "dB"], "dA = Mul(dC, B) dB = Mul(dC, A)", variant=["scalars"])
    for own, other, ones in (("A", "B", rank - ranks[1]), ("B", "A", rank - ranks[2])):
        body += f"""
            product_{own} = Mul(dC, {other})
            own_{own} = Shape({own})
            {f"ones_{own} = Constant<value_ints = {[1] * ones}>() " if ones else ""}
            kept_{own} = {f"Concat<axis = 0>(ones_{own}, own_{own})" if ones else f"Identity(own_{own})"}
            divisor_{own} = Max(kept_{own}, one)
            repeats_{own} = Div(all, divisor_{own})
            kept_R1_{own} = Unsqueeze(kept_{own}, axis1)
            repeats_R1_{own} = Unsqueeze(repeats_{own}, axis1)
            pairs_{own} = Concat<axis = 1>(repeats_R1_{own}, kept_R1_{own})
            cut_{own} = Reshape(pairs_{own}, vector)
            pieces_{own} = Reshape<allowzero = 1>(product_{own}, cut_{own})
            sum_{own} = ReduceSum<keepdims = 0>(pieces_{own}, repeated)
            d{own} = Reshape<allowzero = 1>(sum_{own}, own_{own})
        """
    return function(node, ["dC", "A", "B"], ["dA", "dB"], f"""
        one = Constant<value_int = 1>()
        axis1 = Constant<value_ints = [1]>()
        vector = Constant<value_ints = [-1]>()
        repeated = Constant<value_ints = {list(range(0, 2 * rank, 2))}>()
        all = Shape(dC)
        {body}
    """, variant=["rank", *ranks])


def _average_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    return [TensorType(FLOAT, ())]


def _average_aten(node: Node, x):
    """The mean of all elements, a scalar; 0 where there is none."""
    return x.sum() / max(x.numel(), 1)


def _average_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    (x,) = node.inputs
    return GradientOps([gradient_operator("AveragedLossGradient", [x, dense(node, outputs[0])], [grad(x)])], [grad(x)])


def _average_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which reads the first element of dY whatever its size."""
    expect_dtype(node, inputs, FLOAT)
    expect_size(node, inputs, 1, 1)
    return [inputs[0]]


def _average_gradient_aten(node: Node, x, dy):
    import torch

    return (dy.reshape(()) / max(x.numel(), 1)).expand(x.shape).clone(memory_format=torch.contiguous_format)


_DISTANCE = """
    half = Constant<value_float = 0.5>()
    axis = Constant<value_ints = [1]>()
    difference = Sub(X, T)
    matrix = Flatten(difference)
    square = Mul(matrix, matrix)
    sum = ReduceSum<keepdims = 0>(square, axis)
    Y = Mul(half, sum)
"""
_CLIP = """
    least = Constant<value_float: float = @min>()
    greatest = Constant<value_float: float = @max>()
    Y = Clip(X, least, greatest)
"""
_AVERAGE = """
    one = Constant<value_int = 1>()
    sum = ReduceSum<keepdims = 0>(X)
    size = Size(X)
    divisor = Max(size, one)
    divisor_float = Cast<to = 1>(divisor)
    Y = Div(sum, divisor_float)
"""
_CLIP_GRADIENT = f"""
    least = Constant<value_float: float = @min>()
    greatest = Constant<value_float: float = @max>()
    above = Greater(Y, least)
    below = Less(Y, greatest)
    inside = And(above, below)
    mask = Cast<to = 1>(inside)
    {reshaped("dy", "dY", "Y")}
    dX = Mul(dy, mask)
"""
_AVERAGE_GRADIENT = f"""
    one = Constant<value_int = 1>()
    axis1 = Constant<value_ints = [1]>()
    size = Size(X)
    divisor = Max(size, one)
    divisor_float = Cast<to = 1>(divisor)
    dy = Reshape(dY, axis1)
    dx = Div(dy, divisor_float)
    count = Reshape(size, axis1)
    repeated = Expand(dx, count)
    {reshaped("dX", "repeated", "X")}
"""

_BOUNDS = {"min": Arg("f", -_LARGEST), "max": Arg("f", _LARGEST)}

OPERATORS = [
    Operator("SquaredL2Distance", (2, 2), (1, 1), _distance_infer, _distance_aten, gradient=_distance_gradient,
             onnx=simple("X, T", _DISTANCE)),
    Operator("SquaredL2DistanceGradient", (3, 3), (2, 2), _distance_gradient_infer, _distance_gradient_aten,
             onnx=_distance_gradient_onnx),
    Operator("Clip", (1, 1), (1, 1), same_as_input(), _clip_aten, _BOUNDS, _clip_gradient,
             simple("X", _CLIP, "min", "max")),
    Operator("ClipGradient", (2, 2), (1, 1), _clip_gradient_infer, _clip_gradient_aten, _BOUNDS,
             onnx=simple("Y, dY", _CLIP_GRADIENT, "min", "max", outputs="dX")),
    Operator("Mul", (2, 2), (1, 1), _mul_infer, _mul_aten, gradient=_mul_gradient,
             onnx=simple("A, B", "Y = Mul(A, B)")),
    Operator("MulGradient", (3, 3), (2, 2), _mul_gradient_infer, _mul_gradient_aten,
             onnx=_mul_gradient_onnx),
    Operator("AveragedLoss", (1, 1), (1, 1), _average_infer, _average_aten, gradient=_average_gradient,
             onnx=simple("X", _AVERAGE)),
    Operator("AveragedLossGradient", (2, 2), (1, 1), _average_gradient_infer, _average_gradient_aten,
             onnx=simple("X, dY", _AVERAGE_GRADIENT, outputs="dX")),
]
