"""Updates of dense parameters, and what counts the steps.

Updates add `lr * gradient`, so the learning rate is negative.
"""

from collections.abc import Sequence

from dlrm_caffe2.operators.lowering import as_scalar, function, numbered, reshaped, simple
from dlrm_caffe2.operators.record import FLOAT, INT64, Arg, Node, Operator, TensorType
from dlrm_caffe2.operators.rules import (
    ANY_NUMBER,
    expect_dtype,
    expect_size,
    no_gradient,
    size,
)


def _weighted_sum_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """X0, w0, X1, w1, ...: tensors of one size (their shape is not compared) and weights of one element."""
    node.require(len(inputs) % 2 == 0, f"expected pairs of a tensor and its weight, found {len(inputs)} inputs")
    expect_dtype(node, inputs, FLOAT)
    for position in range(0, len(inputs), 2):
        expect_size(node, inputs, position, size(inputs[0]))
        expect_size(node, inputs, position + 1, 1)
    return [inputs[0]]


def _weighted_sum_aten(node: Node, x, weight, *others):
    """A weight of 1 multiplies nothing; X0 is written into where it is the output, too."""
    first = float(weight)
    in_place = node.outputs[0] == node.inputs[0] and node.inputs[0] not in node.inputs[2:]
    total = x if in_place else x.clone()
    if first != 1:
        total *= first
    for other, weight in zip(others[::2], others[1::2], strict=True):
        total.add_(other.reshape(x.shape), alpha=float(weight))
    return total


def _weighted_sum_onnx(node: Node, ranks: Sequence[int]) -> str:
    count = len(ranks) // 2
    body = f"{as_scalar('w0s', 'w0', ranks[1])} sum0 = Mul(X0, w0s)"
    for number in range(1, count):
        body += f"""
            {reshaped(f"x{number}", f"X{number}", "X0")}
            {as_scalar(f"w{number}s", f"w{number}", ranks[2 * number + 1])}
            term{number} = Mul(x{number}, w{number}s)
            sum{number} = Add(sum{number - 1}, term{number})
        """
    names = [name for pair in zip(numbered("X", count), numbered("w", count), strict=True) for name in pair]
    return function(node, names, "Y", f"{body} Y = Identity(sum{count - 1})", variant=[count, "rank", *ranks])


def _adagrad_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """P, M, g of one size, lr of one element. Caffe2 does not check the latter, and can return two more outputs."""
    expect_dtype(node, inputs, FLOAT)
    for position in (1, 2):
        expect_size(node, inputs, position, size(inputs[0]))
    expect_size(node, inputs, 3, 1)
    return [inputs[0], inputs[1]]


def _adagrad_aten(node: Node, parameter, moment, gradient, lr):
    """g += weight_decay P; M = decay M + g^2; P += lr g / (sqrt(M) + epsilon)."""
    args, flat = node.args, gradient.reshape(parameter.shape)
    if args["weight_decay"]:
        flat = flat + args["weight_decay"] * parameter
    moment = args["decay"] * moment + (flat * flat).reshape(moment.shape)
    step = lr.reshape(()) * flat / (moment.reshape(parameter.shape).sqrt() + args["epsilon"])
    return parameter + step, moment


def adagrad_constants(node: Node) -> tuple[list[str], str]:
    """Those arguments of an Adagrad that matter, and the constants that hold them."""
    used = ["epsilon", *(["weight_decay"] if node.args["weight_decay"] else []),
            *(["decay"] if node.args.get("decay", 1) != 1 else [])]
    return used, " ".join(f"{name} = Constant<value_float: float = @{name}>()" for name in used)


def adagrad_step(node: Node, p: str, h: str, g: str, row: Sequence[int] = (),
          new: tuple[str, str] = ("new_p", "new_h")) -> str:
    """The two of `new` from a parameter, its moment and its gradient, of one shape. With `row`, the axes of a row,
    there is one moment for each row."""
    pull = f"pull = Mul(weight_decay, {p}) gradient = Add({g}, pull)" if node.args["weight_decay"] else \
        f"gradient = Identity({g})"
    mean = f"""
        row = Constant<value_ints = {list(row)}>()
        added = ReduceMean<keepdims = 0>(squares, row)
    """ if row else "added = Identity(squares)"
    return f"""
        {pull}
        squares = Mul(gradient, gradient)
        {mean}
        {new[1]} = Add({h}, added)
        root = Sqrt({new[1]})
        scales = Add(root, epsilon)
        scale = {"Unsqueeze(scales, row)" if row else "Identity(scales)"}
        scaled = Mul(rate, gradient)
        step = Div(scaled, scale)
        {new[0]} = Add({p}, step)
    """


def _adagrad_onnx(node: Node, ranks: Sequence[int]) -> str:
    used, constants = adagrad_constants(node)
    return function(node, ["P", "M", "g", "lr"], ["new_p", "new_M"], f"""
        {constants}
        {as_scalar("rate", "lr", ranks[3])}
        {reshaped("given", "g", "P")}
        {reshaped("moment", "M", "P")}
        old = {"Mul(decay, moment)" if "decay" in used else "Identity(moment)"}
        {adagrad_step(node, "P", "old", "given")}
        {reshaped("new_M", "new_h", "M")}
    """, attributes=used, variant=["rank", ranks[3], *used[1:]])


def _iter_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which silently overwrites a counter of another dtype."""
    expect_dtype(node, inputs, INT64)
    expect_size(node, inputs, 0, 1)
    return [inputs[0]]


def _iter_aten(node: Node, counter):
    return counter.add_(1)


def _rate_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    node.require(node.args["policy"] == "fixed", f"expected policy 'fixed', found '{node.args['policy']}'")
    expect_dtype(node, inputs, INT64)
    expect_size(node, inputs, 0, 1)
    return [TensorType(FLOAT, ())]


def _rate_aten(node: Node, counter):
    import torch

    return torch.full((), node.args["base_lr"], dtype=torch.float32, device=counter.device)


_ITER = """
    one = Constant<value_int = 1>()
    Y = Add(N, one)
"""
ADAGRAD = {"epsilon": Arg("f", 1e-5), "weight_decay": Arg("f", 0.0)}
DECAY = {"decay": Arg("f", 1.0)}
MISSPELT = ("decay_", "weight_decay_")
"""So facebookresearch/dlrm writes the arguments, and Caffe2 reads its defaults."""

OPERATORS = [
    Operator("WeightedSum", (2, ANY_NUMBER), (1, 1), _weighted_sum_infer, _weighted_sum_aten,
             onnx=_weighted_sum_onnx),
    Operator("Adagrad", (4, 4), (2, 2), _adagrad_infer, _adagrad_aten, ADAGRAD | DECAY,
             onnx=_adagrad_onnx, ignored=MISSPELT),
    Operator("Iter", (1, 1), (1, 1), _iter_infer, _iter_aten, gradient=no_gradient,
             onnx=simple("N", _ITER), in_place={0: 0}),
    Operator("LearningRate", (1, 1), (1, 1), _rate_infer, _rate_aten,
             {"base_lr": Arg("f", required=True), "policy": Arg("s", required=True)}, no_gradient,
             simple("N", "Y = Constant<value_float: float = @base_lr>()", "base_lr")),
]
