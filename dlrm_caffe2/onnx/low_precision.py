"""Exported models that predict, their tables in fewer bits: each row is made float32 after it was looked up, never a
whole table. File to file, for whatever has written the first one.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spec import exported, low_precision, tensor_file
from spec.errors import EngineError
from spec.files import write_bytes
from spec.low_precision import DTYPES, SCALES
from spec.parameters import Arrays
from spec.tensor_file import ArrayType
from spec.threads import thread_count

_TABLE = re.compile(r"tables\.\d+\.weight")
_SCALES = ".scales"


def write(source: Path, target: Path, kind: str, external: bool = False) -> list[Path]:
    """Write the model in `source`, of ONNX's own operators alone, with its tables as `spec.low_precision` stores them.

    Returns the paths of the file and of the tables' own: there is one, beside it, with `external` or where they are
    too large to be part of it (`spec.exported.EMBEDDED_BYTES`). Tables are in memory one at a time.

    Raises InputError for a table that cannot be stored so, or a folder that cannot be written to; EngineError where
    the model does something else with a table than to look rows up.
    """
    model = onnx.load(source, load_external_data=False)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}
    tables = {name: tuple(tensor.dims) for name, tensor in kept.items() if _TABLE.fullmatch(name)}
    _rewrite(model.graph, tables, kind)

    def make(name: str) -> np.ndarray:
        owner = name.removesuffix(_SCALES)
        table = _array(kept[owner], source)
        scales = low_precision.row_scales(owner, table, kind)
        return scales if name != owner else low_precision.quantize(table, scales, kind)

    types = {name: ArrayType(DTYPES[kind], shape) for name, shape in tables.items()}
    if SCALES[kind]:
        types |= {name + _SCALES: ArrayType(np.dtype(np.float32), (shape[0], SCALES[kind]))
                  for name, shape in tables.items()}
    paths = [target]
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(_array(tensor, source), name)
                                   for name, tensor in kept.items() if name not in tables)
    if external or sum(type.nbytes for type in types.values()) > exported.EMBEDDED_BYTES:
        data = tensor_file.write(target.with_suffix(".safetensors"), types, make)
        paths.insert(0, data.path)
        model.graph.initializer.extend(_reference(name, type, data) for name, type in types.items())
    else:
        model.graph.initializer.extend(numpy_helper.from_array(make(name), name) for name in types)
    model.metadata_props.add(key="tables", value=kind)
    write_bytes(target, model.SerializeToString(deterministic=True))
    return paths


def tables(path: Path) -> Iterable[tuple[str, np.ndarray]]:
    """The tables of a model in float32, one at a time: as they are stored, or as a lookup makes them."""
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in filter(_TABLE.fullmatch, tensors):
        stored = _array(tensors[name], path)
        scales = tensors.get(name + _SCALES)
        yield name, low_precision.dequantize(stored, np.empty((0, 0)) if scales is None else _array(scales, path))


def table_bytes(path: Path) -> int:
    """Of the tables as they are stored, with their scales."""
    model = onnx.load(path, load_external_data=False)
    return sum(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
               for tensor in model.graph.initializer if _TABLE.fullmatch(tensor.name.removesuffix(_SCALES)))


def open_model(path: Path) -> Callable[[Arrays], np.ndarray]:
    """A function from a batch's arrays to `probability`, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise EngineError(f"{path} in ONNX Runtime: {str(error).splitlines()[0]}") from error
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(["probability"], {name: arrays[name] for name in names})[0]


def _rewrite(graph: onnx.GraphProto, tables: Iterable[str], kind: str) -> None:
    """What looks rows up in a table makes them float32. Shape, which does not read the table, may stay."""
    aliases = {name: name for name in tables}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in aliases:
            aliases[node.output[0]] = aliases[node.input[0]]
            continue
        table = next((aliases[name] for name in node.input if name in aliases), None)
        if table is None:
            if _reads(node, aliases):
                raise EngineError(f"node '{node.name}': a table is used within its body")
            nodes.append(node)
        elif node.op_type == "Gather":
            nodes += _lookup(node, table, kind)
        elif node.op_type == "Shape":
            node.input[0] = table
            nodes.append(node)
        else:
            raise EngineError(f"node '{node.name}' ({node.op_type}): table '{table}' is not only looked up")
    del graph.node[:]
    graph.node.extend(nodes)
    described = [value for value in graph.value_info if value.name not in aliases]
    del graph.value_info[:]
    graph.value_info.extend(described)


def _reads(node: onnx.NodeProto, names: Iterable[str]) -> bool:
    """Whether the body of a Loop or an If has one of these among its inputs."""
    inner = [inside for attribute in node.attribute for inside in attribute.g.node]
    return any(not set(inside.input).isdisjoint(names) or _reads(inside, names) for inside in inner)


def _lookup(gather: onnx.NodeProto, table: str, kind: str) -> list[onnx.NodeProto]:
    """The Gather's rows, times their scale, plus their bias."""
    indices, output = gather.input[1], gather.output[0]
    steps = [("stored", "Gather", [table, indices], {}), ("number", "Cast", ["stored"], {"to": TensorProto.FLOAT})]
    if kind != "fp16":
        steps.append(("scales", "Gather", [table + _SCALES, indices], {}))
    if kind == "int8":
        steps.append(("row", "Mul", ["number", "scales"], {}))
    elif kind == "uint8-rowwise":
        steps += [("scale bias", "Split", ["scales"], {"axis": -1, "num_outputs": 2}),
                  ("product", "Mul", ["number", "scale"], {}), ("row", "Add", ["product", "bias"], {})]
    local = {name: f"{output}.{name}" for made, *_ in steps for name in made.split()}
    local[steps[-1][0]] = output
    return [helper.make_node(type, [local.get(name, name) for name in inputs], [local[name] for name in made.split()],
                             f"{gather.name}.{made.split()[0]}", **attributes)
            for made, type, inputs, attributes in steps]


def _array(tensor: TensorProto, path: Path) -> np.ndarray:
    return numpy_helper.to_array(tensor, str(path.parent))


def _reference(name: str, type: ArrayType, data: tensor_file.TensorFile) -> TensorProto:
    tensor = TensorProto(name=name, dims=type.shape, data_type=helper.np_dtype_to_tensor_dtype(type.dtype),
                         data_location=TensorProto.EXTERNAL)
    for key, value in {"location": data.path.name, "offset": data.offsets[name], "length": type.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
