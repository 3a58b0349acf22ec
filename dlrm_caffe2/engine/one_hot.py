"""Tables of which every sample looks one row up: bags of one row need not be summed."""

from dlrm_caffe2.net import argument, make_operator, with_operators
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef

_SUMS = ("SparseLengthsSum", "SparseLengthsMean")


def without_bags(net: NetDef) -> NetDef:
    """A copy of the net in which their rows are gathered, and the gradient of what was pooled is the rows' own.

    Of Criteo's 26 tables it copies nothing and is fed no lengths. The bits are the same, but for a row's -0.0, which a
    sum makes 0.0.
    """
    operators: list[OperatorDef] = []
    sources: dict[str, str] = {}
    for operator in net.op:
        operator = OperatorDef.FromString(operator.SerializeToString())
        operator.input[:] = [sources.get(name, name) for name in operator.input]
        one_hot = argument(operator, "fixed_lookups").i == 1
        if one_hot and operator.type in _SUMS:
            operators.append(make_operator("Gather", operator.input[:2], operator.output))
        elif one_hot and operator.type in (f"{sum.replace('Lengths', 'LengthsIndicesInGradient')}Gradient"
                                           for sum in _SUMS):
            sources[operator.output[0]] = operator.input[0]
        else:
            operators.append(operator)
    return with_operators(net, operators)
