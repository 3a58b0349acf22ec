"""What genuine Caffe2 runs in place of operators of its own that are slow, with the same result."""

from collections.abc import Iterator
from functools import partial

from dlrm_caffe2.net import argument, make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef

_ONE, _WIDTH, _EPSILON = "faster.one", "faster.width", "faster.epsilon"


def faster(net: NetDef, width: int) -> NetDef:
    """A copy of the net, for tables [N, width], in which other operators stand for two.

    ReluGradient is not vectorised and takes 20 times as long as PyTorch's kernel, by way of the operator ATen. Both let
    a gradient pass where the activation is above 0 and put 0 where it is not, whatever the gradient; they differ for an
    activation that is NaN alone.

    RowWiseSparseAdagrad on distinct rows of a table takes twice as long as what it consists of, one operator for each
    step of the formula (SPEC.md, 7); they may add the squares in another order.
    """
    result = NetDef.FromString(net.SerializeToString())
    del result.op[:]
    epsilons = [argument(operator, "epsilon").f for operator in net.op if _updates_table(operator)]
    if epsilons:  # all the same, the optimizer's
        result.op.extend(make_operator("ConstantFill", [], [constant], shape=[1], value=value)
                         for constant, value in ((_ONE, 1.0), (_WIDTH, float(width)), (_EPSILON, epsilons[0])))
    for operator in net.op:
        if operator.type == "ReluGradient":
            y, dy = operator.input
            result.op.append(make_operator("ATen", [dy, y], operator.output, gradient=True,
                                           operator="threshold_backward", threshold=0.0))
        elif _updates_table(operator):
            result.op.extend(_rowwise_adagrad(operator))
        else:
            result.op.append(operator)
    return result


def _updates_table(operator: OperatorDef) -> bool:
    """Not a table's weights of rows, [N]: they are not `width` wide, and small."""
    return (operator.type == "RowWiseSparseAdagrad" and operator.output[0].endswith(".weight")
            and argument(operator, "distinct_rows").i == 1)


def _rowwise_adagrad(operator: OperatorDef) -> Iterator[OperatorDef]:
    """h[r] += g g / width;  w[r] += rate / (sqrt(h[r]) + eps) g, for g [U, width]"""
    w, h, rows, g, rate = operator.input
    square, mean, moment, root, divisor, factor, step = (
        f"{g}.{part}" for part in ("square", "mean", "moment", "root", "divisor", "factor", "step"))
    update = partial(make_operator, part="optimizer")
    yield update("DotProduct", [g, g], [square])
    yield update("Div", [square, _WIDTH], [mean])
    yield update("ScatterWeightedSum", [h, _ONE, rows, mean, _ONE], [h])
    yield update("Gather", [h, rows], [moment])
    yield update("Sqrt", [moment], [root])
    yield update("Add", [root, _EPSILON], [divisor])
    yield update("Div", [rate, divisor], [factor])
    yield update("Mul", [g, factor], [step], broadcast=1, axis=0)
    yield update("ScatterWeightedSum", [w, _ONE, rows, step, _ONE], [w])
