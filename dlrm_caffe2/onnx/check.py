"""Whether an ONNX file can run: it and its external data are whole, ONNX allows it, and ONNX Runtime takes it."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from spec.errors import EngineError, InputError

if TYPE_CHECKING:
    import onnx

_LONGEST = 400
"""Characters of a message of another package's."""


def check_file(path: Path) -> str:
    """One line on the model in an .onnx file that ONNX Runtime can run: its name, sizes and opset.

    Raises InputError for a file that holds no model, and for external data that is missing or too short; EngineError
    for a model that ONNX does not allow, or ONNX Runtime refuses.
    """
    import onnx
    import onnxruntime

    model = read_model(path)
    external = sum(_external_bytes(path, tensor) for tensor in model.graph.initializer)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"onnx {onnx.__version__} does not allow it: {_one_line(error)}") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} refuses it: {_one_line(error)}") from None
    opset = next((imported.version for imported in model.opset_import if not imported.domain), "none")
    types = Counter(node.op_type for node in model.graph.node)
    data = f", {external / 2**20:,.1f} MiB of external data" if external else ""
    return (f"model '{model.graph.name}', {types.total()} nodes of {len(types)} types, opset {opset}, "
            f"{len(model.functions)} functions, {len(model.graph.input)} inputs, {len(model.graph.output)} outputs"
            f"{data}; ONNX Runtime {onnxruntime.__version__} takes it")


def read_model(path: Path) -> "onnx.ModelProto":
    """Without its external data. Raises InputError where the file is missing, corrupted or holds no model."""
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    try:
        model = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise InputError(str(path), "a readable ONNX file", error.strerror, "check the path") from None
    except DecodeError as error:
        raise InputError(str(path), "a serialized ONNX model", f"bytes that do not parse ({error})",
                         "export it again: it may be truncated") from None
    if not model.ir_version or not model.graph.node:
        raise InputError(str(path), "an ONNX model with nodes", f"{len(model.graph.node)} nodes",
                         "is it another kind of file?")
    return model


def _external_bytes(path: Path, tensor: "onnx.TensorProto") -> int:
    """How many bytes of a tensor are in another file, once they are known to be there."""
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    if tensor.data_location != TensorProto.EXTERNAL:
        return 0
    entries = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{path}: initializer '{tensor.name}'"
    file = path.parent / entries.get("location", "")
    if not file.resolve().is_relative_to(path.parent.resolve()) or not entries.get("location"):
        raise InputError(where, "external data in the model's folder", f"'{entries.get('location', '')}'",
                         "put the file beside the model, and export it again")
    if not file.is_file():
        raise InputError(where, f"external data in {file}", "no such file", "put it beside the model")
    needed = math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    begin, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    size = file.stat().st_size
    if length != needed or begin + length > size:
        raise InputError(where, f"{needed:,} bytes of external data from {begin:,} on in {file}",
                         f"{min(length, max(0, size - begin)):,}", "the file is truncated, or another model's")
    return length


def _one_line(error: Exception) -> str:
    """Without what ONNX Runtime says of its own source: status, path, line and signature."""
    text = " ".join(str(error).split()).rpartition("failed:")[2]
    return re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+:\d+ [^()]*\([^()]*\) ", "", text).strip()[:_LONGEST]
