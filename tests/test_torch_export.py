"""The PyTorch modules as an ONNX model: valid, right for any batch, deterministic; and the backend that runs it."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from conformance.case import make_case
from conformance.run import run_case
from dlrm_torch import export
from dlrm_torch.export import export_onnx, forward_model, write_model
from dlrm_torch.onnx_backend import BACKEND
from spec import exported as exported_files
from spec import pooling, toml
from spec.batch import Batch
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.model import MLP, Interaction, Table
from spec.parameters import initial_parameters
from spec.reference import evaluate
from spec.tensors import batch_names, trace_names

POOLINGS = ("sum", "mean", "weighted_fixed", "weighted_learned")

VARIANTS = {
    "tiny": {},
    "self interaction": {"interaction": Interaction(self_interaction=True)},
    "cat": {"interaction": Interaction(kind="cat")},
    "sigmoid": {"bottom": MLP(widths=(16, 8), activation="sigmoid"), "top": MLP(widths=(16, 1), activation="sigmoid")},
    "one layer, one table": {"bottom": MLP(widths=(8,)), "top": MLP(widths=(1,)), "tables": (Table(rows=5),)},
    "ragged": {"tables": tuple(Table(rows=100, pooling=pooling, lookups=(0, 9)) for pooling in POOLINGS)},
    "one-hot": {"tables": tuple(Table(rows=7, pooling=pooling) for pooling in POOLINGS)},
    "fixed": {"tables": tuple(Table(rows=7, pooling=pooling, lookups=5) for pooling in POOLINGS)},
}


def variant(name):
    return toml.load("tiny").model_copy(update=VARIANTS[name])


def check(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def session_of(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds_of(batch: Batch) -> dict[str, np.ndarray]:
    return {name: array for name, array in batch.arrays().items() if name != "label"}


def shapes(values) -> dict[str, list]:
    return {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in values}


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory: pytest.TempPathFactory):
    """A spec, its parameters, the written model that predicts, and the one with all activations."""
    spec = variant(request.param)
    parameters = initial_parameters(spec, 3)
    folder = tmp_path_factory.mktemp("exported")
    (path,) = export_onnx(spec, parameters, folder)
    traced = folder / "trace.onnx"
    write_model(forward_model(spec), parameters, traced, trace_names(spec, gradients=False), {})
    return spec, parameters, path, traced


def test_files_are_valid_and_named_after_the_spec(exported):
    spec, parameters, path, traced = exported
    assert path.name == "model.torch.onnx"
    for file, outputs in ((path, ("probability",)), (traced, trace_names(spec, gradients=False))):
        model = onnx.load(file)
        check(model)
        assert model.ir_version == 8 and not model.functions
        assert [(imported.domain, imported.version) for imported in model.opset_import] == [("", 18)]
        assert tuple(value.name for value in model.graph.output) == outputs
        assert tuple(value.name for value in model.graph.input) == batch_names(spec)[:-1]
        assert all(value.doc_string for value in (*model.graph.input, *model.graph.output))
        found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert found.keys() - {"interaction.pairs"} == parameters.keys()
        for name, array in parameters.items():
            np.testing.assert_array_equal(found[name], array)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert toml.loads(metadata["spec"], "metadata") == spec and metadata["digest"] == spec.digest
        assert metadata["parameters"] == "not recorded" and "B" in json.loads(metadata["axes"])
        named = shapes((*model.graph.input, *model.graph.value_info, *model.graph.output))
        assert named["dense"] == ["B", spec.dense_features] and named["probability"] == ["B", 1]
        for number, table in enumerate(spec.tables):
            k = table.fixed_lookups
            assert named[f"tables.{number}.indices"] == [
                f"tables.{number}.lookups" if k is None else "B" if k == 1 else f"{k}*B"]
            assert named[f"tables.{number}.lengths"] == ["B"]
            assert named[f"tables.{number}.pooled"] == ["B", spec.embedding_dim]
        kinds = {node.op_type for node in model.graph.node}
        assert ("Loop" in kinds) == any(table.fixed_lookups is None for table in spec.tables)
        assert not any(attribute.name == "reduction" for node in model.graph.node for attribute in node.attribute)
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_one_file_takes_any_batch_and_agrees_with_the_reference(exported):
    spec, parameters, path, traced = exported
    predicts, traces = session_of(path), session_of(traced)
    names = trace_names(spec, gradients=False)
    for size in (1, 2, 37):
        batch = random_batch(spec, size, 0, size)
        found = dict(zip(names, traces.run(list(names), feeds_of(batch)), strict=True))
        expected = evaluate(spec, parameters, batch, gradients=False).tensors
        for name in names:
            assert found[name].dtype == np.float32 and found[name].shape == expected[name].value.shape
            assert (abs(found[name] - expected[name].value) <= expected[name].reach).all(), name
        (probability,) = predicts.run(None, feeds_of(batch))
        assert (abs(probability - expected["probability"].value) <= expected["probability"].reach).all()
    empty = {name: array[:0] for name, array in feeds_of(batch).items()}
    assert predicts.run(None, empty)[0].shape == (0, 1)


def test_onnx_own_reference_agrees(exported):
    spec, parameters, path, _ = exported
    batch = random_batch(spec, 5, 0, 1)
    expected = evaluate(spec, parameters, batch, gradients=False).tensors["probability"]
    (found,) = ReferenceEvaluator(onnx.load(path)).run(None, feeds_of(batch))
    assert (abs(found - expected.value) <= expected.reach).all()


BAGS = {
    "one empty bag": [0], "all empty": [0] * 5, "one bag of one": [1], "one-hot": [1] * 9,
    "empty at both ends": [0, 3, 0, 0, 2, 0], "a full tile": [16], "a tile and one": [17, 0, 16], "two turns": [256],
    "three turns": [257, 1, 0], "skewed": [1, 700, 0, 3, 90], "one giant bag": [0, 1, 100_000, 2],
}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory):
    """A model of ragged tables of 100 rows, one of each pooling, and its file, which returns what they pool."""
    spec = variant("ragged")
    pooled = [f"tables.{number}.pooled" for number in range(len(spec.tables))]
    parameters = initial_parameters(spec, 1)
    path = tmp_path_factory.mktemp("ragged") / "model.onnx"
    write_model(forward_model(spec), parameters, path, pooled, {})
    return spec, parameters, path


def bags_of(spec, lengths, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths, np.int32)
    indices = tuple(rng.integers(0, table.rows, lengths.sum()) for table in spec.tables)
    return Batch(np.zeros((len(lengths), spec.dense_features), np.float32), indices,
                 (lengths,) * len(spec.tables), np.zeros((len(lengths), 1), np.float32))


def judge_bags(spec, parameters, batch: Batch, outputs) -> None:
    for number, (table, found) in enumerate(zip(spec.tables, outputs, strict=True)):
        expected = pooling.forward(table, parameters[f"tables.{number}.weight"],
                                   parameters.get(f"tables.{number}.pooling"), batch.indices[number],
                                   batch.lengths[number])
        assert found.shape == expected.value.shape
        assert (abs(found - expected.value) <= expected.reach).all(), table.pooling
        assert not found[batch.lengths[number] == 0].any()


def test_bags_of_any_sizes_in_one_session(ragged):
    spec, parameters, path = ragged
    session = session_of(path)
    for lengths in BAGS.values():
        batch = bags_of(spec, lengths)
        judge_bags(spec, parameters, batch, session.run(None, feeds_of(batch)))


def test_pooling_is_the_same_in_every_run_on_two_threads(ragged):
    """Where ScatterND(reduction=add) loses updates: 100 rows, 100,000 indices."""
    spec, parameters, path = ragged
    session = session_of(path, threads=2)
    rng = np.random.default_rng(0)
    batch = bags_of(spec, rng.multinomial(100_000, rng.dirichlet(np.full(500, 0.3))))
    first = session.run(None, feeds_of(batch))
    judge_bags(spec, parameters, batch, first)
    for _ in range(20):
        for a, b in zip(first, session.run(None, feeds_of(batch)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_wrong_number_of_indices_is_no_silent_result(ragged):
    spec, _, path = ragged
    feeds = feeds_of(bags_of(spec, [2, 3]))
    feeds["tables.0.indices"] = feeds["tables.0.indices"][:-1]
    with pytest.raises(Exception, match="out of data bounds"):
        session_of(path).run(None, feeds)


def test_the_same_bytes_each_time(tmp_path: Path):
    spec = toml.load("tiny")
    files = [export_onnx(spec, initial_parameters(spec), tmp_path / name)[0].read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert str(Path(export.__file__).parent).encode() not in files[0]


def test_equal_parameters_stay_initializers_of_their_own(tmp_path: Path):
    """PyTorch's optimiser would merge them."""
    spec = toml.load("tiny")
    zeros = {name: array * 0 for name, array in initial_parameters(spec).items()}
    (path,) = export_onnx(spec, zeros, tmp_path)
    assert zeros.keys() <= {tensor.name for tensor in onnx.load(path).graph.initializer}


def test_large_parameters_are_written_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = toml.load("tiny")
    parameters = initial_parameters(spec, 3)
    feeds = feeds_of(random_batch(spec, 20, 0, 0))
    (embedded,) = export_onnx(spec, parameters, tmp_path / "embedded")
    monkeypatch.setattr(exported_files, "EMBEDDED_BYTES", 1000)
    data, path = export_onnx(spec, parameters, tmp_path / "external")
    assert (data.name, path.name) == ("model.safetensors", "model.torch.onnx")
    onnx.checker.check_model(path, full_check=True)
    np.testing.assert_array_equal(session_of(path).run(None, feeds)[0], session_of(embedded).run(None, feeds)[0])
    model = BACKEND.create(spec, parameters)
    batch = random_batch(spec, 20, 0, 0)
    np.testing.assert_array_equal(model.predict(batch), session_of(path).run(None, feeds)[0])
    model.close()


def test_bad_folders_and_parameters_are_refused(tmp_path: Path):
    spec = toml.load("tiny")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a writable folder"):
        export_onnx(spec, initial_parameters(spec), tmp_path / "file")
    with pytest.raises(InputError, match=r"bottom\.0\.bias: expected a parameter, found none"):
        parameters = initial_parameters(spec)
        del parameters["bottom.0.bias"]
        export_onnx(spec, parameters, tmp_path)


def test_registered_names_lead_to_the_backend_and_the_exporter():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for group, expected in {"dlrm.backends": BACKEND, "dlrm.exporters": export_onnx}.items():
        module, attribute = project["entry-points"][group]["torch-onnx"].split(":")
        assert getattr(import_module(module), attribute) is expected


# The backend


@pytest.mark.parametrize("preset", ["tiny", "criteo-kaggle", "paper-benchmark"])
def test_backend_conforms(preset: str):
    result = run_case(make_case(toml.load(preset).capped(1000), batch_size=64, steps=0), [BACKEND])
    assert result.conforms and not result.backends[0].trains
    assert result.backends[0].elements > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in toml.preset_names()
                                    if name not in ("tiny", "criteo-kaggle", "paper-benchmark")])
def test_backend_conforms_on_the_other_presets(preset: str):
    assert run_case(make_case(toml.load(preset).capped(100), batch_size=8, steps=0), [BACKEND]).conforms


def test_backend_only_predicts_and_changes_nothing():
    spec = toml.load("tiny")
    given = initial_parameters(spec)
    model = BACKEND.create(spec, given)
    for array in given.values():
        array.fill(7)
    batch = random_batch(spec, 9, 0, 0)
    assert "ONNX Runtime" in model.engine and "PyTorch" in model.engine
    probability, traced = model.predict(batch), model.trace(batch)
    assert tuple(traced) == trace_names(spec, gradients=False)
    np.testing.assert_allclose(probability, traced["probability"], rtol=0, atol=1e-6)
    seconds = model.profile(batch)
    assert {"fc/FusedGemm", "embedding/Gather", "interaction/Concat"} <= seconds.keys()
    assert all(0 <= value < 1 for value in seconds.values())
    with pytest.raises(NotImplementedError):
        model.train_step(batch)
    with pytest.raises(NotImplementedError):
        model.optimizer_state()
    for name, array in initial_parameters(spec).items():
        np.testing.assert_array_equal(model.parameters()[name], array)
    with pytest.raises(InputError, match=r"tables\.0\.indices\[0\]"):
        model.predict(Batch(batch.dense, (batch.indices[0] + 40, *batch.indices[1:]), batch.lengths, batch.label))
    model.close()
    model.close()


def test_backend_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    spec = toml.load("tiny")
    with pytest.raises(InputError, match="device 'cuda'"):
        BACKEND.create(spec, initial_parameters(spec), "cuda")
    monkeypatch.setattr("dlrm_torch.onnx_backend.find_spec", lambda name: None if name == "onnxscript" else name)
    assert BACKEND.available().remedy == "pip install onnxscript"
    with pytest.raises(EngineError, match="not installed: onnxscript"):
        BACKEND.create(spec, initial_parameters(spec))


def test_a_failing_exporter_is_an_engine_error(monkeypatch: pytest.MonkeyPatch):
    import torch

    def fail(*args, **kwargs):
        raise torch.onnx.errors.OnnxExporterError("no such thing\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(EngineError, match=r"torch\.onnx\.export of PyTorch .*: no such thing$"):
        forward_model(toml.load("tiny"))


def test_loading_the_backend_loads_no_framework_and_exporting_says_nothing(tmp_path: Path):
    code = ("import sys; from dlrm_torch.onnx_backend import BACKEND; assert BACKEND.available().ok\n"
            "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
            "from pathlib import Path; from dlrm_torch.export import export_onnx; from spec.toml import load\n"
            "from spec.parameters import initial_parameters\n"
            f"export_onnx(load('tiny'), initial_parameters(load('tiny')), Path({str(tmp_path)!r}))")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
