"""What an init_net makes, without an engine."""

import numpy as np

from dlrm_caffe2.check import check_net, operator_name
from dlrm_caffe2.operators import OperatorError, record
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError
from spec.parameters import Arrays


def initial_blobs(net: NetDef) -> Arrays:
    """What an init_net makes. Raises EngineError where an operator is not a fill from its arguments."""
    blobs = {}
    for number, node in enumerate(check_net(net, ())):
        if node.inputs or not {"value", "values"} & node.args.keys():
            raise EngineError(f"{operator_name(net.name, number, node.type)}: expected a fill without inputs")
        try:
            (type,) = record(node.type).infer(node, ())
        except OperatorError as error:
            raise EngineError(f"{operator_name(net.name, number, node.type)}: {error}") from error
        if "values" in node.args:
            blobs[node.outputs[0]] = np.array(node.args["values"], type.dtype).reshape(type.shape)
        else:
            blobs[node.outputs[0]] = np.full(type.shape, node.args["value"] or 0, type.dtype)
    return blobs
