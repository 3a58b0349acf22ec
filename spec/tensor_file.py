"""Arrays in a safetensors file, whose bytes other files may refer to: read and written without a second copy in memory.

The format (https://github.com/huggingface/safetensors): 8 bytes, little-endian, the length of the header; the header,
a JSON object {name: {dtype, shape, data_offsets}}, padded with spaces; then the arrays' bytes, little-endian, without
gaps. The package of that name gives neither the offsets nor, for NumPy, arrays that are not copies.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from spec.errors import InputError
from spec.files import replacing

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
           "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_PAGE = 4096
"""The arrays begin on a memory page, so that each is as well aligned as its place among the others allows."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the package's own limit."""


class ArrayType(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """Attributes: arrays: maps of the file, read-only; offsets: where each begins, in bytes from the file's start."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    offsets: Mapping[str, int]


def write(path: Path, types: Mapping[str, ArrayType], make: Callable[[str], np.ndarray],
          metadata: Mapping[str, str] | None = None) -> TensorFile:
    """Write arrays, one at a time: `make` gives each by its name. Raises InputError where that cannot be written."""
    # Those of large elements first, then large ones first: each begins at a multiple of its element's size.
    order = sorted(types, key=lambda name: (-types[name].dtype.itemsize, -types[name].nbytes))
    header: dict[str, dict] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        type = types[name]
        begin, end = end, end + type.nbytes
        header[name] = {"dtype": _NAMES[type.dtype.newbyteorder("<")], "shape": type.shape,
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _PAGE)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _append(file, make(name), types[name])
    return read(path)


def _append(file: BinaryIO, array: np.ndarray, type: ArrayType) -> None:
    """A function of its own, so that one array is gone before the next is made."""
    assert (array.dtype, array.shape) == type, f"expected {type}, found {array.dtype}{array.shape}"
    np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tofile(file)


def read(path: Path) -> TensorFile:
    """Map a file. Raises InputError for one that is missing, truncated, or no safetensors file."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"{size} bytes, too few for the header")
            header = json.loads(file.read(length))
            header.pop(_METADATA, None)
            arrays = {name: _map(path, size, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise InputError(str(path), "a readable safetensors file", error.strerror, "check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever is wrong with a header
        raise InputError(str(path), "a whole safetensors file", f"one that is not ({error})",
                         "write it again, or name another file") from None
    return TensorFile(path, arrays, {name: 8 + length + header[name]["data_offsets"][0] for name in header})


def _map(path: Path, size: int, start: int, entry: dict) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']}")
    type = ArrayType(np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != type.nbytes or start + end > size:
        raise ValueError(f"{size} bytes, where {type.dtype}{list(type.shape)} is at {start + begin} to {start + end}")
    if begin == end:
        return np.empty(type.shape, type.dtype)  # there is no map of nothing
    return np.memmap(path, type.dtype, "r", start + begin, type.shape)
