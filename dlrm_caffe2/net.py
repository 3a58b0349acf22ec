"""Reading and writing the messages of caffe2.proto: arguments, operators, net files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError

from dlrm_caffe2.proto.caffe2_pb2 import Argument, NetDef, OperatorDef, TensorProto
from spec.errors import InputError
from spec.files import write_bytes

DTYPES = {
    TensorProto.FLOAT: np.dtype(np.float32), TensorProto.INT32: np.dtype(np.int32),
    TensorProto.INT64: np.dtype(np.int64), TensorProto.DOUBLE: np.dtype(np.float64),
    TensorProto.FLOAT16: np.dtype(np.float16), TensorProto.BOOL: np.dtype(np.bool_),
    TensorProto.UINT8: np.dtype(np.uint8), TensorProto.INT8: np.dtype(np.int8),
}
DATA_TYPES = {dtype: number for number, dtype in DTYPES.items()}

_CHUNK = 1 << 20
"""Numbers of an array that are converted at a time: as Python's own they take ten times its memory."""


def make_argument(name: str, value: Any) -> Argument:
    """int -> i, float -> f, str or bytes -> s; a list, tuple or one-dimensional array of numbers -> ints or floats.

    The field matters: Caffe2 refuses an int in `f` and a float in `i`. An empty list is written as no value.
    """
    argument = Argument(name=name)
    if isinstance(value, np.ndarray):
        numbers = argument.floats if value.dtype.kind == "f" else argument.ints
        for start in range(0, len(value), _CHUNK):
            numbers.extend(value[start:start + _CHUNK].tolist())
    elif isinstance(value, list | tuple):
        whole = all(isinstance(number, int | np.integer) for number in value)
        (argument.ints if whole else argument.floats).extend(value)
    elif isinstance(value, str | bytes):
        argument.s = value.encode() if isinstance(value, str) else value
    elif isinstance(value, float | np.floating):
        argument.f = value
    else:
        argument.i = value
    return argument


def make_operator(type: str, inputs: Iterable[str], outputs: Iterable[str], *, gradient: bool = False, part: str = "",
                  **arguments: Any) -> OperatorDef:
    """One OperatorDef; keyword arguments become its Arguments, in order.

    `part`: where it belongs to another of `spec.backend.PARTS` than its type; genuine Caffe2's profile says so.
    """
    operator = OperatorDef(type=type, input=list(inputs), output=list(outputs), name=f"{part}/{type}" if part else None)
    operator.arg.extend(make_argument(name, value) for name, value in arguments.items())
    if gradient:
        operator.is_gradient_op = True
    return operator


def argument(operator: OperatorDef, name: str) -> Argument:
    """The argument of this name, or an empty one: 0, "" or no values."""
    return next((argument for argument in operator.arg if argument.name == name), Argument())


def outside_blobs(operators: Iterable[OperatorDef]) -> tuple[str, ...]:
    """The blobs that are read before any of the operators writes them."""
    return read_before_written((operator.input, operator.output) for operator in operators)


def read_before_written(operators: Iterable[tuple[Iterable[str], Iterable[str]]]) -> tuple[str, ...]:
    """The same, of the inputs and outputs of each."""
    read, written = {}, set()
    for inputs, outputs in operators:
        read |= dict.fromkeys(blob for blob in inputs if blob not in written)
        written.update(outputs)
    return tuple(read)


def with_operators(net: NetDef, operators: Iterable[OperatorDef], inputs: Iterable[str] = ()) -> NetDef:
    """A copy of the net with these operators in place of its own, and with those of its external inputs, and of
    `inputs`, that they read."""
    operators = list(operators)
    result = NetDef.FromString(net.SerializeToString())
    del result.op[:], result.external_input[:]
    result.op.extend(operators)
    read = outside_blobs(operators)
    result.external_input.extend(name for name in (*net.external_input, *inputs) if name in read)
    return result


def read_net(path: Path) -> NetDef:
    """Parse a file, serialized or in protobuf's text format. Raises InputError where it is missing, corrupted or holds
    no operator."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(str(path), "a readable NetDef file", error.strerror, "check the path") from None
    try:
        net = NetDef.FromString(content)
    except DecodeError as error:
        net = _parsed(path, content, error)
    if not net.op or any(not operator.type for operator in net.op):
        raise InputError(str(path), "a NetDef with operators, each with a type", f"{len(net.op)} operators",
                         "is it another kind of file?")
    return net


def _parsed(path: Path, content: bytes, error: DecodeError) -> NetDef:
    text = content.decode("latin-1")
    if not all(character.isprintable() or character.isspace() for character in text):
        raise InputError(str(path), "a serialized caffe2 NetDef", f"bytes that do not parse ({error})",
                         "export it again") from None
    try:
        return text_format.Parse(text, NetDef())
    except text_format.ParseError as problem:
        raise InputError(str(path), "a caffe2 NetDef, serialized or as text", f"text that does not parse ({problem})",
                         "mend it, or export it again") from None


def write_net(net: NetDef, path: Path) -> None:
    """Serialize deterministically. Raises InputError above protobuf's 2 GiB, before anything is written."""
    if net.ByteSize() >= 2**31:
        raise InputError(str(path), "less than 2 GiB, protobuf's limit", f"{net.ByteSize() / 2**30:.1f} GiB",
                         "cap the tables with --max-rows")
    write_bytes(path, net.SerializeToString(deterministic=True))
