"""Nets as ONNX models.

Each operator is one node, a function of the domain "caffe2" that holds its lowering, and every blob keeps its name; of
a blob that is written several times, each version has one (see versions.py). The same model inlined, for runtimes
without functions, has ONNX's own operators alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlrm_caffe2.check import check_net
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.onnx.axes import Axes, value_types
from dlrm_caffe2.onnx.sparse import promise_distinct, return_rows, share_sorting, sparse_updates
from dlrm_caffe2.onnx.versions import single_assignment
from dlrm_caffe2.operators import Node, record
from dlrm_caffe2.operators.lowering import DOMAIN, OPSET, onnx_type
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import InputError

if TYPE_CHECKING:
    import onnx

IR_VERSION = 8
"""The newest that ONNX Runtime 1.16 reads; functions need it."""

NODE_NAME = r"([A-Za-z0-9]+)#\d+"
"""What the name of a node that comes from a function holds, before and after inlining: the Caffe2 operator."""


def export_net(net: NetDef, blobs: Mapping[str, np.ndarray], inputs: Mapping[str, Axes],
               outputs: Sequence[str] | None = None, sizes: Mapping[str, int] | None = None,
               stored: Mapping[str, tuple[str, int]] | None = None,
               by_rows: Collection[str] = ()) -> "onnx.ModelProto":
    """A net as an ONNX model.

    Args:
        blobs: values of the external inputs that are constants of the model: its initializers.
        inputs: the other external inputs.
        outputs: blobs to return, as they are in the end; by default the net's external outputs.
        sizes: an example of the named sizes, where not all that have different names may differ from each other.
            The sizes of intermediate values are then left open.
        stored: of the initializers that a file holds, for the model to refer to: its path, and where in it each begins.
        by_rows: outputs to return as `sparse.Rows`, the rows that change alone. Those that one operator updates have
            to be here together, and be among `sparse.sparse_updates`.

    Raises EngineError for a net that cannot run (see check.check_net) or whose types do not fit together, and
    InputError for one that ONNX cannot express, since an operator has no lowering.
    """
    import onnx
    from onnx import helper

    used = outside_blobs(net.op)
    plain = check_exportable(net, inputs.keys() | blobs.keys())
    nodes, last = single_assignment(plain, used)
    types = value_types(net, nodes, blobs, inputs, sizes)
    outputs = net.external_output if outputs is None else outputs
    returned = {blob: (last.get(blob, blob),) for blob in outputs}
    if by_rows:
        updates = {blob: rows for blob, rows in sparse_updates(plain).items() if blob in by_rows}
        returned |= updates
        nodes = [return_rows(node, [updates[blob] for blob in old.outputs]) if old.outputs[0] in updates else node
                 for old, node in zip(plain, nodes, strict=True)]
        for blob, (rows, values) in updates.items():
            types[rows] = Axes(np.dtype(np.int64), ("",))
            types[values] = Axes(types[blob].dtype, ("", *types[blob].shape[1:]))
    nodes, vectors = share_sorting(promise_distinct(nodes))
    types |= {name: Axes(np.dtype(np.int64), ("",)) for name in vectors}
    functions: dict[str, onnx.FunctionProto] = {}
    calls = [_call(node, [len(types[name].shape) for name in node.inputs], functions) for node in nodes]
    initializers = [_initializer(name, array, (stored or {}).get(name))
                    for name, array in blobs.items() if name in used]
    outputs = list(dict.fromkeys(name for blob in outputs for name in returned[blob]))
    produced = [name for node in nodes for name in node.outputs]
    graph = helper.make_graph(
        calls, net.name,
        [_value(name, axes) for name, axes in inputs.items() if name in used],
        [_value(name, types[name]) for name in outputs],
        initializers,
        value_info=[_value(name, types[name]) for name in produced if name not in outputs])
    return helper.make_model(graph, ir_version=IR_VERSION, producer_name="dlrm-parity", functions=functions.values(),
                             opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])


def add_defaults(model: "onnx.ModelProto", values: Mapping[str, np.ndarray],
                 stored: Mapping[str, tuple[str, int]]) -> None:
    """Give inputs of the model values that they have where nothing is fed. `stored`: as for `export_net`."""
    model.graph.initializer.extend(_initializer(name, array, stored.get(name)) for name, array in values.items())


def check_exportable(net: NetDef, blobs: Collection[str]) -> list[Node]:
    """check.check_net, and what ONNX asks for besides; raises what `export_net` does."""
    nodes = check_net(net, blobs)
    missing = sorted({node.type for node in nodes if record(node.type).onnx is None})
    if missing:
        raise InputError(f"net '{net.name}'", "operators that have an ONNX lowering", ", ".join(missing),
                         "add lowerings to their records")
    return nodes


def inline(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same model of ONNX's own operators alone."""
    from onnx import inliner

    flat = inliner.inline_local_functions(model)
    standard = [imported for imported in flat.opset_import if imported.domain != DOMAIN]
    del flat.opset_import[:]
    flat.opset_import.extend(standard)
    return flat


def _call(node: Node, ranks: list[int], functions: dict[str, "onnx.FunctionProto"]) -> "onnx.NodeProto":
    """The node that calls a node's function, which is added to `functions` where it is new."""
    from onnx import AttributeProto, helper, parser

    function = parser.parse_function(record(node.type).onnx(node, ranks))
    _name_nodes(function.node, node.type)
    assert functions.setdefault(function.name, function) == function, f"two functions are named {function.name}"
    call = helper.make_node(function.name, node.inputs, node.outputs, node.outputs[0], domain=DOMAIN)
    kinds = {"ints": AttributeProto.INTS, "floats": AttributeProto.FLOATS}  # an empty list does not tell its kind
    call.attribute.extend(
        helper.make_attribute(name, node.args[name], attr_type=kinds.get(record(node.type).args[name].field))
        for name in function.attribute)
    return call


def _name_nodes(nodes: Iterable["onnx.NodeProto"], type: str) -> None:
    """Profilers show the name, and it says which Caffe2 operator the node is part of; see NODE_NAME."""
    for number, node in enumerate(nodes):
        node.name = f"{type}#{number}"
        for attribute in node.attribute:
            _name_nodes(attribute.g.node, type)


def _initializer(name: str, array: np.ndarray, stored: tuple[str, int] | None) -> "onnx.TensorProto":
    from onnx import TensorProto

    tensor = TensorProto(name=name, dims=array.shape, data_type=onnx_type(array.dtype))
    if stored is None:
        tensor.raw_data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    else:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": stored[0], "offset": stored[1], "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def _value(name: str, axes: Axes) -> "onnx.ValueInfoProto":
    from onnx import helper

    shape = [None if size == "" else size for size in axes.shape]
    return helper.make_tensor_value_info(name, onnx_type(axes.dtype), shape)
