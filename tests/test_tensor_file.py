"""Safetensors files: read and written as the format's own package does, and refused where they are not whole."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spec import tensor_file
from spec.errors import InputError
from spec.tensor_file import ArrayType

ARRAYS = {
    "odd": np.arange(3, dtype=np.uint8), "half": np.float16([[1.5, -2]]), "empty": np.empty((0, 4), np.float32),
    "table": np.arange(4000, dtype=np.float32).reshape(1000, 4), "scalar": np.array(7, np.int64),
    "flags": np.array([True, False]), "wide": np.linspace(0, 1, 5), "grüße": np.int32([-1]),
}
TYPES = {name: ArrayType(array.dtype, array.shape) for name, array in ARRAYS.items()}


def same(found, expected=ARRAYS) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_the_package_reads_what_is_written(tmp_path: Path):
    path = tmp_path / "out" / "file.safetensors"
    written = tensor_file.write(path, TYPES, ARRAYS.__getitem__, {"who": "me"})
    same(load_file(path))
    same(written.arrays)
    content = path.read_bytes()
    for name, offset in written.offsets.items():
        array = ARRAYS[name]
        assert content[offset:offset + array.nbytes] == array.tobytes() and offset % array.itemsize == 0
    assert written.offsets["scalar"] % 4096 == 0 or written.offsets["wide"] % 4096 == 0
    assert not written.arrays["table"].flags.writeable


def test_what_the_package_writes_is_read(tmp_path: Path):
    save_file(ARRAYS, tmp_path / "file.safetensors", {"who": "me"})
    same(tensor_file.read(tmp_path / "file.safetensors").arrays)


def header(entry: dict) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(("content", "found"), [
    (b"", "0 bytes, too few for the header"),
    (b"\x80\x02ccollections", "too few for the header"),
    ((2).to_bytes(8, "little") + b"[]", "not"),
    ((3).to_bytes(8, "little") + b"{x}", "property name"),
    (header(GOOD) + b"1234567", r"float32\[2\] is at 69 to 77"),
    (header(GOOD | {"dtype": "F8_E4M3"}) + b"12345678", "dtype F8_E4M3"),
    (header(GOOD | {"data_offsets": [0, 4]}) + b"12345678", r"float32\[2\]"),
    (header({"dtype": "F32"}), "shape"),
])
def test_bad_files_are_refused(tmp_path: Path, content: bytes, found: str):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=found) as caught:
        tensor_file.read(path)
    assert str(caught.value).startswith(f"{path}: expected a whole safetensors file") and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"none.safetensors: expected a readable safetensors file, found No such file"):
        tensor_file.read(tmp_path / "none.safetensors")


def test_nothing_half_written_stays(tmp_path: Path):
    with pytest.raises(KeyError):
        tensor_file.write(tmp_path / "file", TYPES, {}.__getitem__)
    assert not list(tmp_path.iterdir())
