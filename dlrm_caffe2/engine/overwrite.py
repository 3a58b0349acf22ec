"""Operators that write over what nothing reads any more, where their kernels can (`Operator.overwrites`)."""

from collections import Counter

from dlrm_caffe2.net import outside_blobs, with_operators
from dlrm_caffe2.operators import record
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef


def overwrite(net: NetDef) -> NetDef:
    """A copy of the net in which such an operator's output is the blob that it reads: the same bits, and fewer blobs.

    Blobs that come from outside, go outside, or are written more than once keep what they hold.
    """
    kept = {*outside_blobs(net.op), *net.external_output}
    kept.update(blob for blob, count in Counter(name for op in net.op for name in op.output).items() if count > 1)
    last_read = {blob: number for number, operator in enumerate(net.op) for blob in operator.input}
    blobs: dict[str, str] = {}
    operators = []
    for number, operator in enumerate(net.op):
        copy = OperatorDef.FromString(operator.SerializeToString())
        copy.input[:] = [blobs.get(name, name) for name in operator.input]
        position = record(operator.type).overwrites
        if position is not None:
            source, output = operator.input[position], operator.output[0]
            if (kept.isdisjoint((source, output)) and last_read[source] == number
                    and list(operator.input).count(source) == 1):
                blobs[output] = copy.output[0] = copy.input[position]
        operators.append(copy)
    return with_operators(net, operators)
