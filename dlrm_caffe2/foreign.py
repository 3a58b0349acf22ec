"""The way out of Caffe2: any NetDef in a file, whose operators have records, as ONNX models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dlrm_caffe2.initial import RANDOM, initial_blobs
from dlrm_caffe2.net import outside_blobs, read_net
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import add_defaults, check_exportable, export_net, inline
from dlrm_caffe2.onnx.declared import declared, merged, shape_info
from dlrm_caffe2.onnx.derive import Hint, derive
from dlrm_caffe2.operators import records
from dlrm_caffe2.operators.record import TensorType
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import exported, tensor_file
from spec.errors import EngineError, InputError
from spec.exported import Source
from spec.files import write_bytes
from spec.parameters import Arrays
from spec.tensor_file import ArrayType

if TYPE_CHECKING:
    import onnx


class Converted(NamedTuple):
    """The files written, the last two of them models; and one line on each input and output of these."""

    paths: list[Path]
    lines: list[str]

    def run(self, feeds: Arrays) -> Arrays:
        """The outputs of the inlined model in ONNX Runtime. Raises EngineError where it refuses."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(self.paths[-1], options, providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            return dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"{self.paths[-1]}: {str(error).splitlines()[0]}") from error


def convert_files(netdef: Path, folder: Path, init: Path | None = None, values: Path | None = None,
                  inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> Converted:
    """Write a NetDef as NAME.onnx, with a function for each operator, and NAME.inlined.onnx.

    What `init` makes, or `values` holds, is a constant of the model; a blob that the net updates, such as a parameter
    of a training net, is an input with this value as its default, and NAME.new among the outputs. A type of the other
    inputs is what the operators imply (see onnx/derive.py). What mobile_exporter put into `init` for an input, a zero
    of shape [1, 1], is taken as an input.

    Args:
        netdef, init: serialized, or in protobuf's text format.
        values: a safetensors file of blobs; they win over those of `init`.
        inputs: what their types are, where the operators do not imply it, and which blobs of `init` are to be inputs;
            see onnx/declared.py.
        outputs: blobs; by default the net's external outputs or, where it names none, what no operator reads.

    Raises InputError and EngineError naming the file, for operators without records, among much else.
    """
    net = read_net(netdef)
    try:
        return _convert(net, netdef, folder, _values(init, values), inputs, outputs)
    except InputError as error:
        named = error.where.startswith((str(init), str(values), str(folder), "--"))
        raise error if named else error.within(str(netdef)) from None
    except EngineError as error:
        raise EngineError(f"{netdef}: {error}") from None


class _Values(NamedTuple):
    arrays: Arrays
    source: Source


def _values(init: Path | None, values: Path | None) -> _Values:
    file = tensor_file.read(values) if values else None
    arrays: Arrays = {}
    if init:
        net = read_net(init)
        net.name = net.name or init.stem
        try:
            check_known(net, also=RANDOM)
            made = initial_blobs(net, file.arrays if file else ())
        except InputError as error:
            raise error.within(str(init)) from None
        except EngineError as error:
            raise EngineError(f"{init}: {error}") from None
        arrays = {name: array for name, array in made.items() if not _stands_in(array)}
    names = " and ".join(f"file {path.name}" for path in (init, values) if path)
    return _Values(arrays | dict(file.arrays if file else {}), Source(names or "inputs of the model", file))


def _stands_in(array: np.ndarray) -> bool:
    """For an input, as caffe2.python.predictor.mobile_exporter writes it."""
    return array.shape == (1, 1) and array.dtype == np.float32 and not array.any()


def check_known(net: NetDef, also: frozenset[str] = frozenset()) -> None:
    """Raise InputError naming every type of operator that has no record."""
    missing = sorted({operator.type for operator in net.op} - records().keys() - also)
    if missing:
        raise InputError(f"net '{net.name}'", "operators that this package knows", f"others: {', '.join(missing)}",
                         "add records for them to dlrm_caffe2/operators, or take them out of the net")


def _convert(net: NetDef, path: Path, folder: Path, values: _Values, options: Sequence[str],
             outputs: Sequence[str]) -> Converted:
    net.name = net.name or path.stem
    check_known(net)
    del net.external_input[:]  # some files list what an init_net makes, others do not
    wanted = _prune(net, outputs)
    read, made = outside_blobs(net.op), {name for operator in net.op for name in operator.output}
    updated = [name for name in read if name in made]
    hints = declared(options, read)
    inputs_only = {name for name, hint in hints.items() if hint.shape is not None}
    known = {name: array for name, array in values.arrays.items() if name in read and name not in inputs_only}
    nodes = check_exportable(net, read)
    axes = _inputs(net, nodes, known, updated, merged(shape_info(net), hints))
    constants = {name: array for name, array in known.items() if name not in updated}
    source = _stored_if_large(known, folder, path, values.source)
    model = export_net(net, constants, axes, wanted, stored=source.references(folder))
    add_defaults(model, {name: known[name] for name in updated if name in known}, source.references(folder))
    return Converted([*source.paths(folder), *_write(model, path, folder, source.name)], _lines(model))


def _inputs(net: NetDef, nodes: Sequence, known: Arrays, updated: Sequence[str],
            hints: Mapping[str, Hint]) -> dict[str, Axes]:
    types = {name: TensorType(array.dtype, array.shape) for name, array in known.items()}
    found = derive(net, nodes, types, {name: hint for name, hint in hints.items() if name not in known})
    return found | {name: Axes(*types[name]) for name in updated if name in known}


def _prune(net: NetDef, wanted: Sequence[str]) -> list[str]:
    """The blobs to return, without the operators that neither these nor any update needs."""
    made = {name for operator in net.op for name in operator.output}
    for name in wanted:
        if name not in made:
            raise InputError(f"--output '{name}'", "a blob that the net makes", "none of this name",
                             f"it makes, among others, {', '.join(_unread(net)[-3:])}")
    listed = [name for name in net.external_output if name in made]
    updated = [name for name in outside_blobs(net.op) if name in made]
    outputs = dict.fromkeys([*(wanted or listed or _unread(net)), *updated])
    needed, kept = set(outputs), []
    for operator in reversed(net.op):
        if not needed.isdisjoint(operator.output):
            needed.update(operator.input)
            kept.append(operator)
    kept = [NetDef(op=[operator]).op[0] for operator in reversed(kept)]
    del net.op[:], net.external_output[:]
    net.op.extend(kept)
    return list(outputs)


def _unread(net: NetDef) -> list[str]:
    """What no operator reads after it was last written."""
    unread: dict[str, None] = {}
    for operator in net.op:
        for name in operator.input:
            unread.pop(name, None)
        unread |= dict.fromkeys(operator.output)
    return list(unread)


def _stored_if_large(arrays: Arrays, folder: Path, path: Path, source: Source) -> Source:
    """As `exported.stored_if_large`, for blobs of any names."""
    if source.references(folder) or sum(array.nbytes for array in arrays.values()) <= exported.EMBEDDED_BYTES:
        return source
    types = {name: ArrayType(array.dtype, array.shape) for name, array in arrays.items()}
    stored = folder / f"{path.stem}.safetensors"
    return Source(source.name, tensor_file.write(stored, types, arrays.__getitem__))


def _write(model: "onnx.ModelProto", path: Path, folder: Path, parameters: str) -> list[Path]:
    model.doc_string = f"Caffe2 net '{model.graph.name}' of {path.name}"
    for key, value in {"netdef": path.name, "parameters": parameters}.items():
        model.metadata_props.add(key=key, value=value)
    contents = {folder / f"{path.stem}.onnx": model, folder / f"{path.stem}.inlined.onnx": inline(model)}
    for file, content in contents.items():
        write_bytes(file, content.SerializeToString(deterministic=True))
    return list(contents)


def _lines(model: "onnx.ModelProto") -> list[str]:
    from onnx.helper import tensor_dtype_to_np_dtype

    lines, defaults = [], {tensor.name for tensor in model.graph.initializer}
    for what, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            kind = value.type.tensor_type
            sizes = ",".join(axis.dim_param or (str(axis.dim_value) if axis.HasField("dim_value") else "?")
                             for axis in kind.shape.dim)
            default = " (has a default)" if what == "input" and value.name in defaults else ""
            lines.append(f"{what} {value.name}={tensor_dtype_to_np_dtype(kind.elem_type)}[{sizes}]{default}")
    return lines
