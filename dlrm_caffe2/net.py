"""Reading and writing the messages of caffe2.proto: arguments, operators, tensors, net files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
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


def make_argument(name: str, value: Any) -> Argument:
    """int -> i, float -> f, str or bytes -> s; a list of them -> ints, floats, strings.

    The field matters: Caffe2 refuses an int in `f` and a float in `i`. An empty list is written as no value.
    """
    argument = Argument(name=name)
    many = isinstance(value, list | tuple | np.ndarray)
    values = list(value) if many else [value]
    values = [v.encode() if isinstance(v, str) else v.item() if isinstance(v, np.generic) else v for v in values]
    kinds = {type(v) for v in values} or {int}
    if kinds <= {int, bool}:
        field = "i"
    elif kinds <= {float, int}:
        field = "f"
    else:
        field = "s"
    if many:
        getattr(argument, {"i": "ints", "f": "floats", "s": "strings"}[field]).extend(values)
    else:
        setattr(argument, field, values[0])
    return argument


def make_operator(type: str, inputs: Iterable[str], outputs: Iterable[str], *, gradient: bool = False,
                  **arguments: Any) -> OperatorDef:
    """One OperatorDef; keyword arguments become its Arguments, in order."""
    operator = OperatorDef(type=type, input=list(inputs), output=list(outputs))
    operator.arg.extend(make_argument(name, value) for name, value in arguments.items())
    if gradient:
        operator.is_gradient_op = True
    return operator


def array_from_tensor(tensor: TensorProto) -> np.ndarray:
    """The values of a TensorProto, in its own dtype and shape. Raises ValueError for other data types."""
    if tensor.data_type not in DTYPES:
        raise ValueError(f"data type {tensor.data_type} is not supported")
    fields = {TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data", TensorProto.INT64: "int64_data"}
    values = getattr(tensor, fields.get(tensor.data_type, "int32_data"))
    return np.array(values, DTYPES[tensor.data_type]).reshape(tuple(tensor.dims))


def read_net(path: Path) -> NetDef:
    """Parse a .pb file. Raises InputError where it is missing, corrupted or holds no operator."""
    try:
        net = NetDef.FromString(path.read_bytes())
    except OSError as error:
        raise InputError(str(path), "a readable NetDef file", error.strerror, "check the path") from None
    except DecodeError as error:
        raise InputError(str(path), "a serialized caffe2 NetDef", f"bytes that do not parse ({error})",
                         "export it again") from None
    if not net.op or any(not operator.type for operator in net.op):
        raise InputError(str(path), "a NetDef with operators, each with a type", f"{len(net.op)} operators",
                         "is it another kind of file?")
    return net


def write_net(net: NetDef, path: Path) -> None:
    """Serialize deterministically. Raises InputError above protobuf's 2 GiB, before anything is written."""
    if net.ByteSize() >= 2**31:
        raise InputError(str(path), "less than 2 GiB, protobuf's limit", f"{net.ByteSize() / 2**30:.1f} GiB",
                         "cap the tables with --max-rows")
    write_bytes(path, net.SerializeToString(deterministic=True))
