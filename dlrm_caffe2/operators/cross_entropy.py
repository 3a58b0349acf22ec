"""Cross-entropies of a probability or of its logit, and the two classes that one of them takes."""

import math
from collections.abc import Sequence

from dlrm_caffe2.operators.lowering import reshaped, simple
from dlrm_caffe2.operators.record import (
    FLOAT,
    INT32,
    Gradient,
    GradientOps,
    Node,
    Operator,
    TensorType,
    grad,
    gradient_operator,
)
from dlrm_caffe2.operators.rules import (
    dense,
    expect_dtype,
    expect_indices,
    expect_rank,
    expect_shape,
    expect_size,
)

LOG_FLOOR = 1e-20
"""kLOG_THRESHOLD of Caffe2: the least probability that a logarithm is taken of."""


def _two_class_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    return [TensorType(FLOAT, (*inputs[0].shape, 2))]


def _two_class_aten(node: Node, x):
    """[1 - x, x] in a new last dimension."""
    import torch

    return torch.stack([1 - x, x], -1)


def _two_class_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    dx = grad(node.inputs[0])
    return GradientOps([gradient_operator("MakeTwoClassGradient", [dense(node, outputs[0])], [dx])], [dx])


def _two_class_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    expect_rank(node, inputs, 0, 1)
    shape = inputs[0].shape
    node.require(shape[-1] == 2, f"expected a last dimension of 2, found {shape[-1]}")
    return [TensorType(FLOAT, shape[:-1])]


def _two_class_gradient_aten(node: Node, dy):
    return dy[..., 1] - dy[..., 0]


def _label_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """X [N, ...], label int32 [N] or [N, 1] -> [N]."""
    expect_dtype(node, inputs, FLOAT, at=[0])
    expect_dtype(node, inputs, INT32, at=[1])
    expect_rank(node, inputs, 0, 1)
    samples = inputs[0].shape[:1]
    if inputs[1].shape != (*samples, 1):
        expect_shape(node, inputs, 1, samples)
    return [TensorType(FLOAT, samples)]


def _chosen(node: Node, x, label):
    """X as [N, classes], the label as int64 [N, 1], and x of the label [N, 1]. Every label has to be a class."""
    x_NC = x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))
    label_N1 = label.reshape(-1, 1).long()
    if not x.is_cpu:  # there, gather stops the process
        expect_indices(node, 1, label, x_NC.shape[1])
    try:
        return x_NC, label_N1, x_NC.gather(1, label_N1)
    except RuntimeError:
        expect_indices(node, 1, label, x_NC.shape[1])
        raise


def _label_aten(node: Node, x, label):
    """-log(max(p, 1e-20)) of the probability of each sample's class."""
    _, _, p_N1 = _chosen(node, x, label)
    return p_N1.squeeze(1).clamp_min_(LOG_FLOOR).log_().neg_()


def _label_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    x, label = node.inputs
    operator = gradient_operator("LabelCrossEntropyGradient", [x, label, dense(node, outputs[0])], [grad(x)])
    return GradientOps([operator], [grad(x), None])


def _label_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_shape(node, inputs, 2, _label_infer(node, inputs[:2])[0].shape)
    expect_dtype(node, inputs, FLOAT, at=[2])
    return [inputs[0]]


def _label_gradient_aten(node: Node, x, label, dy):
    """-dY / max(p, 1e-20) at the class, 0 elsewhere. Caffe2 does not check the label here and writes outside dX."""
    import torch

    x_NC, label_N1, p_N1 = _chosen(node, x, label)
    at_label = dy.unsqueeze(1).div(p_N1.clamp_min_(LOG_FLOOR)).neg_()
    return torch.zeros_like(x_NC).scatter_(1, label_N1, at_label).view(x.shape)


def _logits_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """x and t of one shape; the mean over the last dimension is returned. An empty one crashes Caffe2."""
    expect_dtype(node, inputs, FLOAT)
    expect_shape(node, inputs, 1, inputs[0].shape)
    node.require(inputs[0].shape[-1:] != (0,), "expected a last dimension above 0")
    return [TensorType(FLOAT, inputs[0].shape[:-1])]


def _logits_aten(node: Node, x, t):
    """x (1[x >= 0] - t) + log(1 + exp(-|x|)): the cross-entropy of sigmoid(x) in the form that cannot overflow."""
    loss = x * ((x >= 0).float() - t) + (-x.abs()).exp().log1p()
    return loss.mean(-1)


def _logits_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    x, t = node.inputs
    operator = gradient_operator("SigmoidCrossEntropyWithLogitsGradient", [dense(node, outputs[0]), x, t], [grad(x)])
    return GradientOps([operator], [grad(x), None])


def _logits_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT)
    expect_shape(node, inputs, 2, inputs[1].shape)
    node.require(inputs[1].shape[-1:] != (0,), "expected a last dimension above 0")
    expect_size(node, inputs, 0, math.prod(inputs[1].shape[:-1]))
    return [inputs[1]]


def _logits_gradient_aten(node: Node, dy, x, t):
    inner = x.shape[-1] if x.dim() else 1
    scale = (dy / inner).reshape((*x.shape[:-1], *[1] * min(x.dim(), 1)))
    return scale * (x.sigmoid() - t)


_TWO_CLASS = """
    one = Constant<value_float = 1.0>()
    last = Constant<value_ints = [-1]>()
    rest = Sub(one, X)
    first_class = Unsqueeze(rest, last)
    second_class = Unsqueeze(X, last)
    Y = Concat<axis = -1>(first_class, second_class)
"""
_OWN_CLASS = f"""
    column = Constant<value_ints = [-1, 1]>()
    axis = Constant<value_ints = [1]>()
    floor = Constant<value_float = {LOG_FLOOR}>()
    x_NC = Flatten(X)
    label_int64 = Cast<to = 7>(label)
    label_N1 = Reshape(label_int64, column)
    chosen_N1 = GatherElements<axis = 1>(x_NC, label_N1)
    probability_N1 = Max(chosen_N1, floor)
"""
_LABEL = f"""
    {_OWN_CLASS}
    probability = Squeeze(probability_N1, axis)
    log = Log(probability)
    Y = Neg(log)
"""
_LOGITS = """
    zero = Constant<value_float = 0.0>()
    one = Constant<value_float = 1.0>()
    last = Constant<value_ints = [-1]>()
    above = GreaterOrEqual(X, zero)
    sign = Cast<to = 1>(above)
    difference = Sub(sign, t)
    linear = Mul(X, difference)
    magnitude = Abs(X)
    negative = Neg(magnitude)
    power = Exp(negative)
    sum = Add(one, power)
    log = Log(sum)
    loss = Add(linear, log)
    Y = ReduceMean<keepdims = 0>(loss, last)
"""

_TWO_CLASS_GRADIENT = """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    first = Gather<axis = -1>(dY, zero)
    second = Gather<axis = -1>(dY, one)
    dX = Sub(second, first)
"""
_LABEL_GRADIENT = f"""
    {_OWN_CLASS}
    dy_N1 = Unsqueeze(dY, axis)
    quotient_N1 = Div(dy_N1, probability_N1)
    at_label_N1 = Neg(quotient_N1)
    shape_NC = Shape(x_NC)
    zeros_NC = ConstantOfShape(shape_NC)
    dx_NC = ScatterElements<axis = 1>(zeros_NC, label_N1, at_label_N1)
    {reshaped("dX", "dx_NC", "X")}
"""
_LOGITS_GRADIENT = """
    one = Constant<value_float = 1.0>()
    axis1 = Constant<value_ints = [1]>()
    leading = Shape<end = -1>(X)
    classes = Shape<start = -1>(X)
    column = Concat<axis = 0>(leading, axis1)
    dy = Reshape<allowzero = 1>(dY, column)
    divisor = Cast<to = 1>(classes)
    scale = Div(dy, divisor)
    negative = Neg(X)
    power = Exp(negative)
    sum = Add(one, power)
    sigmoid = Reciprocal(sum)
    difference = Sub(sigmoid, t)
    dX = Mul(scale, difference)
"""

OPERATORS = [
    Operator("MakeTwoClass", (1, 1), (1, 1), _two_class_infer, _two_class_aten, gradient=_two_class_gradient,
             onnx=simple("X", _TWO_CLASS)),
    Operator("MakeTwoClassGradient", (1, 1), (1, 1), _two_class_gradient_infer, _two_class_gradient_aten,
             onnx=simple("dY", _TWO_CLASS_GRADIENT, outputs="dX")),
    Operator("LabelCrossEntropy", (2, 2), (1, 1), _label_infer, _label_aten, gradient=_label_gradient,
             onnx=simple("X, label", _LABEL)),
    Operator("LabelCrossEntropyGradient", (3, 3), (1, 1), _label_gradient_infer, _label_gradient_aten,
             onnx=simple("X, label, dY", _LABEL_GRADIENT, outputs="dX")),
    Operator("SigmoidCrossEntropyWithLogits", (2, 2), (1, 1), _logits_infer, _logits_aten,
             gradient=_logits_gradient, onnx=simple("X, t", _LOGITS)),
    Operator("SigmoidCrossEntropyWithLogitsGradient", (3, 3), (1, 1), _logits_gradient_infer, _logits_gradient_aten,
             onnx=simple("dY, X, t", _LOGITS_GRADIENT, outputs="dX")),
]
