"""Nets in files: as Caffe2 NetDefs, and as ONNX models.

In the ONNX model each operator is one node, a function of the domain "caffe2" that holds its lowering, and every
blob keeps its name; of a blob that is written several times, each version has one (see `single_assignment`). The same
model inlined, for runtimes without functions, has ONNX's own operators alone.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlrm_caffe2.check import check_net, operator_name
from dlrm_caffe2.model import constants, init_net, predict_net, train_net
from dlrm_caffe2.net import outside_blobs, write_net
from dlrm_caffe2.operators import Node, OperatorError, record
from dlrm_caffe2.operators.lowering import DOMAIN, OPSET, onnx_type
from dlrm_caffe2.operators.record import FLOAT, INT32, INT64, TensorType
from dlrm_caffe2.operators.shape import piece_lengths
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import toml
from spec.errors import EngineError, InputError
from spec.files import replacing, write_bytes
from spec.model import ModelSpec
from spec.parameters import Arrays, parameter_shapes, state_shapes

if TYPE_CHECKING:
    import onnx

IR_VERSION = 8
"""The newest that ONNX Runtime 1.16 reads; functions need it."""

EMBEDDED_BYTES = 2**30
"""Initializers above this are written to a file of their own: protobuf ends at 2 GiB."""


class Axes(NamedTuple):
    """A type whose sizes may differ from run to run: those have a name, or "" where nothing is known."""

    dtype: np.dtype
    shape: tuple[int | str, ...]
    doc: str = ""


def export_netdef(spec: ModelSpec, parameters: Arrays, folder: Path) -> list[Path]:
    """Write init_net.pb, predict_net.pb and train_net.pb, which genuine Caffe2 loads; their paths.

    Raises InputError where the folder cannot be written to, and for more than protobuf's 2 GiB.
    """
    nets = {"init": init_net(spec, parameters), "predict": predict_net(spec), "train": train_net(spec)}
    paths = []
    for name, net in nets.items():
        paths.append(folder / f"{name}_net.pb")
        write_net(net, paths[-1])
    return paths


def export_onnx(spec: ModelSpec, parameters: Arrays, folder: Path) -> list[Path]:
    """Write the predict net as model.onnx and the train net as train.onnx, both of functions, and of either an
    .inlined.onnx; their paths.

    The initial parameters are part of the predict model: above EMBEDDED_BYTES they go to model.data, which both its
    files refer to. Raises InputError where the folder cannot be written to.
    """
    return [*_export_predict(spec, parameters, folder), *_write(train_model(spec), spec, folder, "train")]


def _export_predict(spec: ModelSpec, parameters: Arrays, folder: Path) -> list[Path]:
    net = predict_net(spec)
    blobs = {name: array for name, array in (parameters | constants(spec)).items() if name in net.external_input}
    external = "model.data" if sum(array.nbytes for array in blobs.values()) > EMBEDDED_BYTES else None
    model = export_net(net, blobs, {name: axes for name, axes in input_axes(spec).items()
                                    if name in net.external_input}, external=external)
    paths = []
    if external:
        paths.append(folder / external)
        with replacing(paths[-1]) as temporary, temporary.open("wb") as file:
            for array in blobs.values():
                _little_endian(array).tofile(file)
    return [*paths, *_write(model, spec, folder, "model")]


def train_model(spec: ModelSpec) -> "onnx.ModelProto":
    """One training step: from a batch, parameters and optimizer state to the loss and to what has become of
    them, each as "X.new". The learning rate is a constant."""
    axes = input_axes(spec)
    axes |= {name: Axes(FLOAT, shape, "parameter") for name, shape in parameter_shapes(spec).items()}
    axes |= {name: Axes(FLOAT, shape, "optimizer state") for name, shape in state_shapes(spec).items()}
    return export_net(train_net(spec), constants(spec), axes)


def _write(model: "onnx.ModelProto", spec: ModelSpec, folder: Path, name: str) -> list[Path]:
    """With functions, and inlined."""
    model.doc_string = f"DLRM '{spec.name}': {spec.description}" if spec.description else f"DLRM '{spec.name}'"
    for key, value in {"spec": toml.dumps(spec), "digest": spec.digest}.items():
        model.metadata_props.add(key=key, value=value)
    contents = {folder / f"{name}.onnx": model, folder / f"{name}.inlined.onnx": inline(model)}
    for path, content in contents.items():
        write_bytes(path, content.SerializeToString(deterministic=True))
    return list(contents)


def input_axes(spec: ModelSpec) -> dict[str, Axes]:
    """The batch's arrays, by name. "B" is the batch; each table has its own number of lookups."""
    axes = {"dense": Axes(FLOAT, ("B", spec.dense_features), "continuous features")}
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        axes[f"{name}.indices"] = Axes(INT64, (f"{name}.lookups",), f"rows that are looked up, sample by sample, "
                                       f"each from 0 to {table.rows - 1}")
        axes[f"{name}.lengths"] = Axes(INT32, ("B",), "how many of the indices belong to each sample; 0 is allowed")
    return axes | {"label": Axes(FLOAT, ("B", 1), "target")}


def export_net(net: NetDef, blobs: Mapping[str, np.ndarray], inputs: Mapping[str, Axes],
               outputs: Sequence[str] | None = None, sizes: Mapping[str, int] | None = None,
               external: str | None = None) -> "onnx.ModelProto":
    """A net as an ONNX model.

    Args:
        blobs: values of the external inputs that are constants of the model: its initializers.
        inputs: the other external inputs.
        outputs: blobs to return, as they are in the end; by default the net's external outputs.
        sizes: an example of the named sizes, where not all that have different names may differ from each other.
            The sizes of intermediate values are then left open.
        external: the name of a file that will hold the initializers, one after the other as in `blobs`.

    Raises EngineError for a net that cannot run (see check.check_net) or whose types do not fit together, and
    InputError for one that ONNX cannot express, since an operator has no lowering.
    """
    import onnx
    from onnx import TensorProto, helper

    used = outside_blobs(net.op)
    nodes, last = single_assignment(check_exportable(net, inputs.keys() | blobs.keys()), used)
    types = _value_types(net, nodes, blobs, inputs, sizes)
    functions: dict[str, onnx.FunctionProto] = {}
    calls = [_call(node, [len(types[name].shape) for name in node.inputs], functions) for node in nodes]
    initializers, offset = [], 0
    for name, array in blobs.items():
        if name in used:
            tensor = TensorProto(name=name, dims=array.shape, data_type=onnx_type(array.dtype))
            if external is None:
                tensor.raw_data = _little_endian(array).tobytes()
            else:
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in {"location": external, "offset": offset, "length": array.nbytes}.items():
                    tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
        offset += array.nbytes
    outputs = [last.get(name, name) for name in (net.external_output if outputs is None else outputs)]
    produced = [name for node in nodes for name in node.outputs]
    graph = helper.make_graph(
        calls, net.name,
        [_value(name, axes, axes.doc) for name, axes in inputs.items() if name in used],
        [_value(name, types[name]) for name in outputs],
        initializers,
        value_info=[_value(name, types[name]) for name in produced if name not in outputs])
    return helper.make_model(graph, ir_version=IR_VERSION, producer_name="dlrm-parity", functions=functions.values(),
                             opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])


def check_exportable(net: NetDef, blobs: Collection[str]) -> list[Node]:
    """check.check_net, and what ONNX asks for besides; raises what `export_net` does."""
    nodes = check_net(net, blobs)
    missing = sorted({node.type for node in nodes if record(node.type).onnx is None})
    if missing:
        raise InputError(f"net '{net.name}'", "operators that have an ONNX lowering", ", ".join(missing),
                         "add lowerings to their records")
    return nodes


def single_assignment(nodes: Sequence[Node], read: Collection[str]) -> tuple[list[Node], dict[str, str]]:
    """The same operators with a name for every version of a blob, and the name of each written blob's last one.

    The last keeps the blob's name, or is named X.new where X is in `read`, from outside; those in between are X.1,
    X.2, ...
    """
    taken = {name for node in nodes for name in (*node.inputs, *node.outputs)}
    writes = Counter(name for node in nodes for name in node.outputs)
    written: Counter[str] = Counter()
    now: dict[str, str] = {}

    def version(blob: str) -> str:
        written[blob] += 1
        if written[blob] < writes[blob]:
            name = f"{blob}.{written[blob]}"
        elif blob in read:
            name = f"{blob}.new"
        else:
            return blob
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    renamed = []
    for node in nodes:
        inputs = tuple(now.get(name, name) for name in node.inputs)
        now |= {name: version(name) for name in node.outputs}
        renamed.append(replace(node, inputs=inputs, outputs=tuple(now[name] for name in node.outputs)))
    return renamed, now


def inline(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same model of ONNX's own operators alone."""
    from onnx import inliner

    flat = inliner.inline_local_functions(model)
    standard = [imported for imported in flat.opset_import if imported.domain != DOMAIN]
    del flat.opset_import[:]
    flat.opset_import.extend(standard)
    return flat


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


def _value_types(net: NetDef, nodes: Sequence[Node], blobs: Mapping[str, np.ndarray], inputs: Mapping[str, Axes],
                 sizes: Mapping[str, int] | None) -> dict[str, Axes]:
    """Of every blob. The records' rules want numbers, so the types are inferred for two sets of sizes: what is
    equal in both is fixed, and what is a named size in both has its name. From one set, `sizes`, nothing follows."""
    names = list(dict.fromkeys(size for axes in inputs.values() for size in axes.shape if isinstance(size, str)))
    if sizes is None:
        probes = [{name: first + number for number, name in enumerate(names)} for first in (10**6, 2 * 10**6)]
    else:
        probes = [dict(sizes)]
    inferred = [_infer(net, nodes, {
        **{name: TensorType(array.dtype, array.shape) for name, array in blobs.items()},
        **{name: TensorType(axes.dtype, tuple(probe.get(size, size) for size in axes.shape))
           for name, axes in inputs.items()}}) for probe in probes]
    symbols = {tuple(probe[name] for probe in probes): name for name in names}

    def merged(found: tuple[int, ...]) -> int | str:
        if sizes is not None or -1 in found:
            return ""
        return found[0] if len(set(found)) == 1 else symbols.get(found, "")

    return {name: Axes(type.dtype, tuple(map(merged, zip(*(types[name].shape for types in inferred), strict=True))))
            for name, type in inferred[0].items()} | dict(inputs)


def _infer(net: NetDef, nodes: Sequence[Node], types: dict[str, TensorType]) -> dict[str, TensorType]:
    """By the records' rules, and one thing that these cannot know: a Split by lengths that come from a Concat."""
    lengths: dict[str, tuple[int, ...]] = {}
    for number, node in enumerate(nodes):
        rule = node
        if node.type == "Split" and node.inputs[-1] in lengths:
            rule = replace(node, inputs=node.inputs[:1], args={**node.args, "split": lengths[node.inputs[-1]]})
        try:
            made = record(node.type).infer(rule, [types[name] for name in rule.inputs])
        except OperatorError as error:
            raise EngineError(f"{operator_name(net.name, number, node.type)}: {error}") from error
        types.update(zip(node.outputs, made, strict=True))
        if node.type == "Concat":
            lengths[node.outputs[1]] = piece_lengths(node, [types[name].shape for name in node.inputs])
    return types


def _call(node: Node, ranks: list[int], functions: dict[str, "onnx.FunctionProto"]) -> "onnx.NodeProto":
    """The node that calls a node's function, which is added to `functions` where it is new."""
    from onnx import AttributeProto, helper, parser

    function = parser.parse_function(record(node.type).onnx(node, ranks))
    assert functions.setdefault(function.name, function) == function, f"two functions are named {function.name}"
    call = helper.make_node(function.name, node.inputs, node.outputs, node.outputs[0], domain=DOMAIN)
    kinds = {"ints": AttributeProto.INTS, "floats": AttributeProto.FLOATS}  # an empty list does not tell its kind
    call.attribute.extend(
        helper.make_attribute(name, node.args[name], attr_type=kinds.get(record(node.type).args[name].field))
        for name in function.attribute)
    return call


def _value(name: str, axes: Axes, doc: str = "") -> "onnx.ValueInfoProto":
    from onnx import helper

    shape = [None if size == "" else size for size in axes.shape]
    return helper.make_tensor_value_info(name, onnx_type(axes.dtype), shape, doc)


def _little_endian(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
