"""Matrix products and the activations between them.

A kernel is stricter than Caffe2's own where that reads outside a tensor or silently ignores a part of one.
"""

import math
from collections.abc import Sequence

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
    are_plain,
    dense,
    expect_dtype,
    expect_rank,
    expect_shape,
    expect_size,
    same_as_input,
)


def _flattened(node: Node, type: TensorType, argument: str) -> tuple[tuple[int, ...], int, int]:
    """Leading dimensions before the axis, and the sizes of the matrix that flattening there gives."""
    rank, axis = len(type.shape), node.args[argument]
    node.require(-rank <= axis < rank, f"{argument} {axis} is outside a tensor of rank {rank}")
    leading, rest = type.shape[:axis], type.shape[axis:]
    return leading, math.prod(leading), math.prod(rest)


def _fc_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    leading, _, k = _flattened(node, inputs[0], "axis")
    _, n, w_k = _flattened(node, inputs[1], "axis_w")
    node.require(k == w_k, f"dimension mismatch: X {inputs[0]} has K = {k}, W {inputs[1]} has K = {w_k}")
    node.require(k > 0 and n > 0, f"expected K and N above 0, found {k} and {n}")
    expect_shape(node, inputs, 2, (n,))
    return [TensorType(FLOAT, (*leading, n))]


def _matrix(x, axis: int):
    """Flatten to two dimensions; sizes of 0 allowed."""
    if axis == 1 and x.dim() == 2:
        return x
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _like(x, shape: Sequence[int]):
    return x if x.shape == shape else x.reshape(shape)


def _fc_aten(node: Node, x, w, b):
    import torch

    x_MK, w_NK = _matrix(x, node.args["axis"]), _matrix(w, node.args["axis_w"])
    y_MN = torch.addmm(b, x_MK, w_NK.t())
    return y_MN if x_MK is x else y_MN.reshape(*x.shape[:node.args["axis"]], b.shape[0])


def _fc_onnx(node: Node, ranks: Sequence[int]) -> str:
    axis, axis_w = (node.args[argument] % rank for argument, rank in zip(("axis", "axis_w"), ranks, strict=False))
    if (axis, axis_w, *ranks[:2]) == (1, 1, 2, 2):
        return function(node, "XWb", "Y", "Y = Gemm<transB = 1>(X, W, b)")
    return function(node, "XWb", "Y", f"""
        x = Flatten<axis = {axis}>(X)
        w = Flatten<axis = {axis_w}>(W)
        y = Gemm<transB = 1>(x, w, b)
        leading = Shape<end = {axis}>(X)
        n = Shape(b)
        shape = Concat<axis = 0>(leading, n)
        Y = Reshape<allowzero = 1>(y, shape)
    """, variant=["rank", *ranks[:2], "axis", axis, axis_w])


def _fc_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    x, w, b = node.inputs
    operator = gradient_operator("FCGradient", [x, w, dense(node, outputs[0])], [grad(w), grad(b), grad(x)],
                                 **node.given)
    return GradientOps([operator], [grad(x), grad(w), grad(b)])


def _fc_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which does not compare the size of dY and reads outside a short one."""
    expect_dtype(node, inputs, FLOAT)
    _, m, k = _flattened(node, inputs[0], "axis")
    _, n, w_k = _flattened(node, inputs[1], "axis_w")
    node.require(k == w_k, f"dimension mismatch: X {inputs[0]} has K = {k}, W {inputs[1]} has K = {w_k}")
    expect_size(node, inputs, 2, m * n)
    return [inputs[1], TensorType(FLOAT, (n,)), inputs[0]][:len(node.outputs)]


def columns_first(w):
    """The same [N, K], lying in memory as [K, N], followed by zeros up to a multiple of 8 rows.

    MKL multiplies matrices of an odd width up to twice as slowly; so it is even in the gradient of the weight, and can
    be in that of the input (`_in_eights`).
    """
    if w.dim() != 2:
        return w
    n, k = w.shape
    result = w.new_zeros(-(-k // 8) * 8, n)[:k].t()
    return result.copy_(w)


def _in_eights(w):
    """[N, K or up to 7 more]: with the zeros that `columns_first` put there; without them if it was not so."""
    n, k = w.shape
    width = -(-k // 8) * 8
    end = (w.storage_offset() + width * n) * w.element_size()
    if w.stride() != (1, n) or end > w.untyped_storage().nbytes():
        return w
    return w.as_strided((n, width), (1, n))


_ADDED_SAMPLES, _ADDED_WIDTH = 256, 64
"""So many samples at most, and a matrix at least so wide, and MKL adds up a product of theirs before it adds it to
anything: a weight to which it is added is rounded once. A thin one, or of a larger batch, is rounded many times."""


def step_of_layer(x, w, b, dy, rate: float, wants_dx: bool):
    """w += rate dY' X, b += rate times the sum of dY, for x [M, K], w [N, K], b [N], dy [M, N]; and dX, if it is
    wanted. It may be a part of a wider matrix."""
    dx = dy.mm(_in_eights(w))[:, :w.shape[1]] if wants_dx else None
    if len(x) <= _ADDED_SAMPLES and min(w.shape) >= _ADDED_WIDTH:
        w.t().addmm_(x.t(), dy, alpha=rate)
    else:
        w.t().add_(x.t().mm(dy), alpha=rate)
    b.add_(dy.sum(0), alpha=rate)
    return dx


def _fc_gradient_aten(node: Node, x, w, dy):
    """dW lies in memory as W does, which may be as [K, N]."""
    import torch

    x_MK, w_NK = _matrix(x, node.args["axis"]), _matrix(w, node.args["axis_w"])
    dy_MN = _like(dy, (x_MK.shape[0], w_NK.shape[0]))
    dw_NK = torch.mm(dy_MN.t(), x_MK) if w_NK.is_contiguous() else torch.mm(x_MK.t(), dy_MN).t()
    dw, db = _like(dw_NK, w.shape), dy_MN.sum(0)
    return (dw, db) if len(node.outputs) == 2 else (dw, db, _like(torch.mm(dy_MN, w_NK), x.shape))


def _fc_gradient_onnx(node: Node, ranks: Sequence[int]) -> str:
    axis, axis_w = (node.args[argument] % rank for argument, rank in zip(("axis", "axis_w"), ranks, strict=False))
    outputs = ["dW", "db", "dX"][:len(node.outputs)]
    if (axis, axis_w, *ranks) == (1, 1, 2, 2, 2):
        return function(node, ["X", "W", "dY"], outputs, f"""
            axis0 = Constant<value_ints = [0]>()
            dW = Gemm<transA = 1>(dY, X)
            db = ReduceSum<keepdims = 0>(dY, axis0)
            {"dX = MatMul(dY, W)" if "dX" in outputs else ""}
        """, variant=[len(outputs)])
    return function(node, ["X", "W", "dY"], outputs, f"""
        axis0 = Constant<value_ints = [0]>()
        x = Flatten<axis = {axis}>(X)
        w = Flatten<axis = {axis_w}>(W)
        m = Shape<end = 1>(x)
        n = Shape<end = 1>(w)
        shape = Concat<axis = 0>(m, n)
        dy = Reshape<allowzero = 1>(dY, shape)
        dw = Gemm<transA = 1>(dy, x)
        {reshaped("dW", "dw", "W")}
        db = ReduceSum<keepdims = 0>(dy, axis0)
        {"dx = MatMul(dy, w) " + reshaped("dX", "dx", "X") if "dX" in outputs else ""}
    """, variant=[len(outputs), "rank", *ranks, "axis", axis, axis_w])


def _bmm_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    for position in (0, 1):
        expect_rank(node, inputs, position, 2)
    a, b = inputs[0].shape, inputs[1].shape
    m, a_k = a[:-3:-1] if node.args["trans_a"] else a[-2:]
    b_k, n = b[:-3:-1] if node.args["trans_b"] else b[-2:]
    node.require(a[:-2] == b[:-2] and a_k == b_k,
                 f"cannot multiply {inputs[0]} and {inputs[1]} with trans_a {node.args['trans_a']}, "
                 f"trans_b {node.args['trans_b']}")
    return [TensorType(FLOAT, (*a[:-2], m, n))]


def _bmm_aten(node: Node, a, b):
    import torch

    if a is b and a.dim() == 3 and are_plain(a) and node.args["trans_b"] and not node.args["trans_a"]:
        from dlrm_caffe2.operators import kernels

        return kernels.own_products(a)
    multiply = torch.bmm if a.dim() == 3 else torch.matmul
    return multiply(a.mT if node.args["trans_a"] else a, b.mT if node.args["trans_b"] else b)


def _bmm_onnx(node: Node, ranks: Sequence[int]) -> str:
    rank = ranks[0]
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    operand = {False: "Identity({})", True: f"Transpose<perm = {swapped}>({{}})"}
    flags = [flag for flag in ("trans_a", "trans_b") if node.args[flag]]
    return function(node, "AB", "Y", f"""
        a = {operand["trans_a" in flags].format("A")}
        b = {operand["trans_b" in flags].format("B")}
        Y = MatMul(a, b)
    """, variant=[*flags, *(("rank", rank) if rank != 3 else ())])


def _bmm_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    (a, b), dy = node.inputs, dense(node, outputs[0])
    trans_a, trans_b = bool(node.args["trans_a"]), bool(node.args["trans_b"])
    # (left, right, trans_a, trans_b) of the product that gives each input's gradient
    da = (b, dy, trans_b, True) if trans_a else (dy, b, False, not trans_b)
    db = (dy, a, True, trans_a) if trans_b else (a, dy, not trans_a, False)
    operators = []
    for name, (left, right, left_transposed, right_transposed) in ((a, da), (b, db)):
        flags = {"trans_a": left_transposed, "trans_b": right_transposed}
        operators.append(gradient_operator("BatchMatMul", [left, right], [grad(name)],
                                           **{flag: 1 for flag, value in flags.items() if value}))
    return GradientOps(operators, [grad(a), grad(b)])


def _relu_aten(node: Node, x):
    import torch

    return torch.relu_(x) if node.overwrites(0) else torch.relu(x)


def _activation_gradient(type: str):
    def gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
        (x,), (y,) = node.inputs, node.outputs
        return GradientOps([gradient_operator(type, [y, dense(node, outputs[0])], [grad(x)])], [grad(x)])
    return gradient


def _relu_gradient_aten(node: Node, y, dy):
    import torch

    if node.overwrites(1):
        return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)
    return torch.ops.aten.threshold_backward(dy, y, 0)


def _sigmoid_aten(node: Node, x):
    import torch

    return torch.sigmoid_(x) if node.overwrites(0) else torch.sigmoid(x)


def _sigmoid_gradient_aten(node: Node, y, dy):
    import torch

    return torch.ops.aten.sigmoid_backward(dy, y)


# Not ONNX's Sigmoid: ONNX Runtime's is good to 1e-7 in absolute terms only, 100 % off at -18.
_SIGMOID = """
    one = Constant<value_float = 1.0>()
    negative = Neg(X)
    power = Exp(negative)
    sum = Add(one, power)
    Y = Reciprocal(sum)
"""

# A product with the mask is several times faster in ONNX Runtime than Where, but NaN where dY is not finite and Y is 0.
# The sum of dY times 0 is 0 where all of dY is finite, unless it overflows. Otherwise a Loop takes a turn. An If would
# do, but what the first run of OpenVINO's (2026.4) returns is at times not what it computed.
_RELU_GRADIENT = """
    zero = Constant<value_float = 0.0>()
    once = Constant<value_int = 1>()
    above = Greater(Y, zero)
    mask = Cast<to = 1>(above)
    total = ReduceSum<keepdims = 0>(dY)
    nothing = Mul(total, zero)
    finite = Equal(nothing, zero)
    doubtful = Not(finite)
    clean = Loop<body = choice (int64 number, bool going, given) => (bool go_on, chosen) {
        go_on = Identity(going)
        chosen = Where(above, given, zero)
    }>(once, doubtful, dY)
    dX = Mul(clean, mask)
"""
_SIGMOID_GRADIENT = """
    one = Constant<value_float = 1.0>()
    rest = Sub(one, Y)
    product = Mul(dY, Y)
    dX = Mul(product, rest)
"""

_AXES = {"axis": Arg("i", 1), "axis_w": Arg("i", 1)}
_TRANSPOSED = {"trans_a": Arg("i", 0), "trans_b": Arg("i", 0)}

OPERATORS = [
    Operator("FC", (3, 3), (1, 1), _fc_infer, _fc_aten, _AXES, _fc_gradient, _fc_onnx),
    Operator("FCGradient", (3, 3), (2, 3), _fc_gradient_infer, _fc_gradient_aten, _AXES,
             onnx=_fc_gradient_onnx),
    Operator("BatchMatMul", (2, 2), (1, 1), _bmm_infer, _bmm_aten, _TRANSPOSED, _bmm_gradient,
             _bmm_onnx),
    Operator("Relu", (1, 1), (1, 1), same_as_input(), _relu_aten, gradient=_activation_gradient("ReluGradient"),
             onnx=simple("X", "Y = Relu(X)"), overwrites=0),
    Operator("ReluGradient", (2, 2), (1, 1), same_as_input(), _relu_gradient_aten,
             onnx=simple("Y, dY", _RELU_GRADIENT, outputs="dX"), overwrites=1),
    Operator("Sigmoid", (1, 1), (1, 1), same_as_input(), _sigmoid_aten,
             gradient=_activation_gradient("SigmoidGradient"), onnx=simple("X", _SIGMOID), overwrites=0),
    Operator("SigmoidGradient", (2, 2), (1, 1), same_as_input(), _sigmoid_gradient_aten,
             onnx=simple("Y, dY", _SIGMOID_GRADIENT, outputs="dX")),
]
