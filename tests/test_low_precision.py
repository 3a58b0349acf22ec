"""Tables in fewer bits: how far off a number may be, what genuine Caffe2 makes of them, and the exported files."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx_runtimes import RUNTIMES
from test_onnx_reach import IN

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.onnx import low_precision
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import exported, toml
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.low_precision import DTYPES, dequantize, quantize, row_scales
from spec.parameters import initial_parameters
from spec.reference import evaluate
from tools.cli import main

KINDS = tuple(DTYPES)
FILES = {"onnx": "model.{}.onnx", "torch-onnx": "model.torch.{}.onnx"}


def table(rows: int = 3000, width: int = 24) -> np.ndarray:
    """Rows of all sizes, shifted or not; some constant, some zero."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(rows, width)) * 10.0 ** rng.uniform(-4, 4, (rows, 1)) + rng.choice([0, 5.0], (rows, 1))
    values[::50] = values[::50, :1]
    values[::70] = 0
    return values.astype(np.float32)


def read_back(x: np.ndarray, kind: str) -> np.ndarray:
    scales = row_scales("t", x, kind)
    stored = quantize(x, scales, kind)
    assert stored.dtype == DTYPES[kind] and stored.shape == x.shape
    return dequantize(stored, scales)


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_is_off_by_more_than_half_a_step(kind: str):
    x = table()
    exact, extent = x.astype(np.float64), np.ptp(x.astype(np.float64), 1, keepdims=True)
    greatest = abs(exact).max(1, keepdims=True)
    half = {"fp16": np.maximum(abs(exact) * 2.0**-11, 2.0**-25), "int8": greatest / 254, "uint8-rowwise": extent / 510}
    rounding = 0 if kind == "fp16" else 4 * 2.0**-24 * (greatest + extent)
    error = abs(read_back(x, kind) - exact)
    assert (error <= half[kind] + rounding).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", ["int8", "uint8-rowwise"])
def test_constant_and_empty_rows_are_exact(kind: str):
    x = np.float32([[0, 0, 0], [3, 3, 3], [-7, -7, -7], [1e-42, 1e-42, 1e-42]])
    np.testing.assert_allclose(read_back(x, kind), x, rtol=1e-7, atol=1e-37)
    assert read_back(np.empty((0, 3), np.float32), kind).shape == (0, 3)


@pytest.mark.parametrize(("kind", "row"), [
    *((kind, [0, bad, 1]) for kind in KINDS for bad in (np.nan, np.inf)),
    ("fp16", [0, 70000, 1]), ("uint8-rowwise", [-3e38, 3e38, 0])])
def test_what_cannot_be_stored_is_refused(kind: str, row: list[float]):
    with pytest.raises(InputError, match=rf"^t\[1\]: expected finite numbers that fit into {kind}, found"):
        row_scales("t", np.float32([[1, 2, 3], row]), kind)


def test_huge_rows_that_fit():
    x = np.float32([[-3e38, 3e38, 1]])
    assert (abs(read_back(x, "int8").astype(np.float64) - x) <= 3e38 / 254 * 1.001).all()


@pytest.mark.engine
def test_genuine_caffe2_stores_and_reads_the_same_bits(caffe2_engine):
    x = table()
    scales = row_scales("t", x, "uint8-rowwise")
    stored = quantize(x, scales, "uint8-rowwise")
    caffe2_engine.feed({"x": x})
    caffe2_engine.run_once(NetDef(name="n", op=[
        make_operator("FloatToRowwiseQuantized8Bits", ["x"], ["q", "s"]),
        make_operator("Rowwise8BitQuantizedToFloat", ["q", "s"], ["y"])]))
    found = caffe2_engine.fetch(["q", "s", "y"])
    np.testing.assert_array_equal(found["q"], stored)
    np.testing.assert_array_equal(found["s"], scales)
    np.testing.assert_array_equal(found["y"], dequantize(stored, scales))


@pytest.fixture(scope="module", params=KINDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("low")
    command = ["export", "tiny", "--tables", request.param, "--out", folder, "--seed", 3, "--samples", 300,
               "--json", folder / "cost.json", *(part for name in FILES for part in ("--format", name))]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert result.stdout.count(request.param) >= 4
    return request.param, folder


def test_nothing_else_is_left_behind(written):
    kind, folder = written
    assert {path.name for path in folder.iterdir()} == {"cost.json", *(name.format(kind) for name in FILES.values())}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("runtime", IN)
def test_files_compute_with_the_stored_tables(runtime: str, name: str, written):
    """The reference, given what is read back, within its bounds."""
    kind, folder = written
    spec = toml.load("tiny")
    parameters = initial_parameters(spec, 3)
    parameters |= {f"tables.{n}.weight": read_back(parameters[f"tables.{n}.weight"], kind)
                   for n in range(len(spec.tables))}
    session = RUNTIMES[runtime](folder / FILES[name].format(kind))
    for size in (1, 40):
        batch = random_batch(spec, size, 0, size)
        expected = evaluate(spec, parameters, batch, gradients=False).tensors["probability"]
        arrays = {key: array for key, array in batch.arrays().items() if key != "label"}
        assert (abs(session(arrays)["probability"] - expected.value) <= expected.reach).all()


@pytest.mark.parametrize("name", FILES)
def test_rows_are_looked_up_before_they_become_float32(name: str, written):
    kind, folder = written
    model = onnx.load(folder / FILES[name].format(kind))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert not model.functions and {imported.domain for imported in model.opset_import} == {""}
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.startswith("tables.")}
    tables = [key for key in stored if key.endswith(".weight")]
    assert len(tables) == 4
    for key in tables:
        assert onnx.numpy_helper.to_array(stored[key]).dtype == DTYPES[kind]
        readers = [node.op_type for node in model.graph.node if key in node.input]
        assert "Gather" in readers and set(readers) <= {"Gather", "Shape"}


@pytest.mark.parametrize("name", FILES)
def test_the_cost_is_that_of_the_file(name: str, written):
    kind, folder = written
    spec = toml.load("tiny")
    report = next(entry for entry in json.loads((folder / "cost.json").read_text()) if entry["format"] == name)
    parameters = initial_parameters(spec, 3)
    weights = [parameters[f"tables.{n}.weight"] for n in range(len(spec.tables))]
    rows, numbers = sum(map(len, weights)), sum(weight.size for weight in weights)
    per_row = {"fp16": 0, "int8": 4, "uint8-rowwise": 8}[kind]
    stored = DTYPES[kind].itemsize * numbers + per_row * rows
    assert report["table_bytes"] == {"float32": 4 * numbers, "stored": stored}
    errors = np.concatenate([(read_back(weight, kind) - weight).ravel() for weight in weights]).astype(np.float64)
    norm = np.sqrt(sum((weight.astype(np.float64)**2).sum() for weight in weights))
    assert report["table_error"]["max"] == abs(errors).max()
    assert report["table_error"]["relative_rms"] == pytest.approx(np.sqrt((errors**2).sum()) / norm)
    session = RUNTIMES["onnxruntime"](folder / FILES[name].format(kind))
    exact, found = [], []
    for number in range(2):
        batch = random_batch(spec, 256, 3, number)
        exact.append(evaluate(spec, parameters, batch, gradients=False).tensors["probability"].value)
        found.append(session({k: v for k, v in batch.arrays().items() if k != "label"})["probability"])
    difference = (np.concatenate(found).astype(np.float64) - np.concatenate(exact))[:300]
    assert report["samples"] == 300
    assert report["probability"]["max"] == pytest.approx(abs(difference).max(), abs=3e-7)
    assert report["probability"]["rms"] == pytest.approx(np.sqrt((difference**2).mean()), abs=3e-7)


def test_large_tables_are_written_beside_the_model(written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kind, folder = written
    monkeypatch.setattr(exported, "EMBEDDED_BYTES", 1000)
    command = ["export", "tiny", "--tables", kind, "--out", tmp_path, "--seed", "3", "--samples", "9"]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {f"model.{kind}.safetensors", f"model.{kind}.onnx"}
    batch = random_batch(toml.load("tiny"), 20, 0, 0)
    first, second = (low_precision.open_model(place / f"model.{kind}.onnx")(batch.arrays())
                     for place in (folder, tmp_path))
    np.testing.assert_array_equal(first, second)


def test_a_table_that_is_used_otherwise_is_refused(tmp_path: Path):
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N, 3] y)
        <float[2, 3] tables.0.weight = {1, 2, 3, 4, 5, 6}> { y = Add(tables.0.weight, tables.0.weight) }""".replace(
        "tables.0.weight", "table"))
    model.graph.initializer[0].name = "tables.0.weight"
    model.graph.node[0].input[:] = ["tables.0.weight"] * 2
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(EngineError, match=r"table 'tables.0.weight' is not only looked up"):
        low_precision.write(tmp_path / "a.onnx", tmp_path / "b.onnx", "int8")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tables", "int8", "--format", "netdef"], "--tables int8: expected --format onnx or torch-onnx, found netdef"),
    (["--tables", "int8", "--data", "nonsense"], "nonsense"),
    (["--samples", "3"], "are for --tables"), (["--tables", "int4"], "'int4' is not one of"),
])
def test_bad_options(arguments: list[str], message: str, tmp_path: Path):
    result = CliRunner().invoke(main, ["export", "tiny", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()
