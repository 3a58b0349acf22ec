"""What is said about the types of a net's inputs: by the user, and by the file itself."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from dlrm_caffe2.net import DTYPES
from dlrm_caffe2.onnx.derive import Hint
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import InputError

_NAMES = {str(dtype): dtype for dtype in DTYPES.values()}
_FORM = "NAME=TYPE or NAME=TYPE[SIZES], such as dense=float32[B,13], '*_i=int64[?]' or ids=int32"


def declared(options: Iterable[str], names: Sequence[str]) -> dict[str, Hint]:
    """Hints from options, each for the inputs of `names` that its NAME, a name or a shell pattern, matches; later ones
    win. A size is a number, a name (an axis that may differ from run to run), or `?` (one without a name).

    Raises InputError for an option that has another form, or that matches no input.
    """
    hints: dict[str, Hint] = {}
    for option in options:
        pattern, hint = _parsed(option)
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise InputError(f"--input '{option}'", f"one of the net's inputs: {', '.join(names)}", f"'{pattern}'",
                             "check the spelling")
        hints |= dict.fromkeys(matching, hint)
    return hints


def shape_info(net: NetDef) -> dict[str, Hint]:
    """From the net's argument `input_shape_info`, where it has one: the types and sizes of an example."""
    tensors = [tensor for argument in net.arg if argument.name == "input_shape_info" for tensor in argument.tensors]
    return {tensor.name: Hint(DTYPES[tensor.data_type], tuple(tensor.dims))
            for tensor in tensors if tensor.data_type in DTYPES}


def merged(info: Mapping[str, Hint], said: Mapping[str, Hint]) -> dict[str, Hint]:
    """Both; where the user says a type without a shape, that of the file stays."""
    return {**info, **{name: hint._replace(shape=info[name].shape) if hint.shape is None and name in info else hint
                       for name, hint in said.items()}}


def _parsed(option: str) -> tuple[str, Hint]:
    found = re.fullmatch(r"(.+)=(\w+)(?:\[([^][]*)\])?", option)
    sizes = [size.strip() for size in (found[3] or "").split(",") if size.strip()] if found else []
    if not found or not all(re.fullmatch(r"\d+|[A-Za-z_][\w.]*|\?", size) for size in sizes):
        raise InputError(f"--input '{option}'", _FORM, "another form", "write it so")
    if found[2] not in _NAMES:
        raise InputError(f"--input '{option}'", f"a type: {', '.join(_NAMES)}", f"'{found[2]}'", "use one of them")
    shape = None if found[3] is None else tuple(int(size) if size.isdecimal() else size for size in sizes)
    return found[1], Hint(np.dtype(_NAMES[found[2]]), shape)
