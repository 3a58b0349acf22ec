"""What genuine Caffe2 runs in place of an operator of its own that is slow, with the same result."""

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef


def faster(net: NetDef) -> NetDef:
    """A copy of the net in which PyTorch's kernel, by way of the operator ATen, stands for ReluGradient.

    ReluGradient is not vectorised and takes 20 times as long. Both let a gradient pass where the activation is above
    0 and put 0 where it is not, whatever the gradient; they differ for an activation that is NaN alone.
    """
    net = NetDef.FromString(net.SerializeToString())
    for operator in net.op:
        if operator.type == "ReluGradient":
            y, dy = operator.input
            operator.CopyFrom(make_operator("ATen", [dy, y], operator.output, gradient=True,
                                            operator="threshold_backward", threshold=0.0))
    return net
