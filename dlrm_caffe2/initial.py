"""What an init_net makes, without an engine."""

from collections.abc import Collection

import numpy as np

from dlrm_caffe2.check import check_net, operator_name
from dlrm_caffe2.operators import OperatorError, record
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError, InputError
from spec.parameters import Arrays

RANDOM = frozenset({"GaussianFill", "MSRAFill", "TruncatedGaussianFill", "UniformFill", "UniformIntFill",
                    "UniqueUniformFill", "XavierFill"})
"""Caffe2's fills whose values are another in each run."""


def initial_blobs(net: NetDef, given: Collection[str] = ()) -> Arrays:
    """What an init_net makes, but for the blobs that are `given` otherwise.

    Raises EngineError where an operator is not a fill from its arguments, InputError for a random one.
    """
    if given:
        net = NetDef(name=net.name, op=[operator for operator in net.op if not set(given).issuperset(operator.output)])
    for operator in net.op:
        if operator.type in RANDOM:
            raise InputError(f"net '{net.name}'", "fills from values", f"{operator.type}, which draws "
                             f"'{operator.output[0]}' at random", "pass the values that it had with --parameters FILE")
    blobs = {}
    for number, node in enumerate(check_net(net, ())):
        where = operator_name(net.name, number, node.type)
        if node.inputs or not ({"value", "values"} & record(node.type).args.keys()):
            raise EngineError(f"{where}: expected a fill without inputs")
        try:
            (type,) = record(node.type).infer(node, ())
        except OperatorError as error:
            raise EngineError(f"{where}: {error}") from error
        if "values" in node.args:
            blobs[node.outputs[0]] = node.args["values"].astype(type.dtype, copy=False).reshape(type.shape)
        else:
            blobs[node.outputs[0]] = np.full(type.shape, node.args["value"] or 0, type.dtype)
    return blobs
