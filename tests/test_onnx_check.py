"""`dlrm engine check` on ONNX files: what is wrong with one is a single line."""

import re
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import parser

from tools.cli import main

TEXT = '<ir_version: {ir}, opset_import: ["": {opset}]> g (float[B] x) => (float[B] y) {{ y = {op}(x) }}'


def check(*paths: Path) -> str:
    result = CliRunner().invoke(main, ["engine", "check", *map(str, paths)])
    assert result.exit_code == 0, result.output
    return result.output


def refused(path: Path) -> str:
    result = CliRunner().invoke(main, ["engine", "check", str(path)])
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"dlrm: {path}: ")
    return line.removeprefix(f"dlrm: {path}: ")


def written(path: Path, op: str = "Relu", opset: int = 18, ir: int = 8) -> Path:
    path.write_bytes(parser.parse_model(TEXT.format(ir=ir, opset=opset, op=op)).SerializeToString())
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    command = ["export", "tiny", "--out", str(folder), "--format", "onnx", "--external-data"]
    assert CliRunner().invoke(main, command).exit_code == 0
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    for name in ("model.onnx", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    return tmp_path


def test_exported_files_are_taken(exported: Path):
    paths = sorted(exported.glob("*.onnx"))
    lines = check(*paths).splitlines()
    assert len(lines) == 4 and all(line.startswith(f"{path}: ") for line, path in zip(lines, paths, strict=True))
    assert re.search(r"model 'tiny_predict', \d+ nodes of \d+ types, opset 18, \d+ functions, 9 inputs, 1 outputs, "
                     r"[\d.]+ MiB of external data; ONNX Runtime [\d.]+ takes it", lines[paths.index(
                         exported / "model.onnx")])


def test_external_data_that_is_missing_or_truncated(folder: Path):
    path, data = folder / "model.onnx", folder / "model.safetensors"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    assert re.match(r"initializer '\S+': expected \d+ bytes of external data from [\d,]+ on in .*model.safetensors, "
                    r"found \d+; ", refused(path))
    data.unlink()
    assert re.match(r"initializer '\S+': expected external data in .*model.safetensors, found no such file; ",
                    refused(path))


def test_external_data_outside_the_folder(folder: Path):
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entry.value.replace("model.safetensors", "../model.safetensors")
    path.write_bytes(model.SerializeToString())
    assert "expected external data in the model's folder, found '../model.safetensors'" in refused(path)


@pytest.mark.parametrize("content", ["truncated", b"", b"not a model", b"\xff" * 100])
def test_files_that_hold_no_model(folder: Path, content: bytes | str):
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1000] if content == "truncated" else content)
    assert re.match(r"expected an? .*ONNX model", refused(path))


def test_a_missing_file(tmp_path: Path):
    assert refused(tmp_path / "none.onnx").startswith("expected a readable ONNX file, found No such file")


def test_an_unknown_operator(tmp_path: Path):
    assert "No Op registered for Relux" in refused(written(tmp_path / "x.onnx", op="Relux"))


def test_versions_that_the_runtime_refuses(tmp_path: Path):
    newest = onnx.defs.onnx_opset_version()
    for options, word in (({"opset": newest + 1}, str(newest + 1)), ({"ir": onnx.IR_VERSION + 1}, "version")):
        assert word in refused(written(tmp_path / "x.onnx", **options))
