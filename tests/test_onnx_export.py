"""Nets as ONNX models, and their files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_models import adds_by_scattering, check, in_onnxruntime, in_reference

from dlrm_caffe2.backend import ONNX
from dlrm_caffe2.export import export_onnx, train_model
from dlrm_caffe2.initial import initial_blobs
from dlrm_caffe2.model import constants, init_net, predict_net, train_net
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.onnx import convert
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net, inline
from dlrm_caffe2.operators import record
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import exported, toml
from spec.batch import Batch
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.exported import Source
from spec.parameters import initial_parameters, initial_state, state_shapes, trained_parameters
from spec.reference import evaluate
from spec.tensors import batch_names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """The spec, its parameters, and the paths that `export_onnx` has written: two of either net."""
    spec = toml.load("tiny")
    parameters = initial_parameters(spec, 3)
    return spec, parameters, export_onnx(spec, parameters, tmp_path_factory.mktemp("exported"))


def batch_feeds(spec, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    arrays = random_batch(spec, size, seed, 0).arrays()
    del arrays["label"]
    return arrays


def step_feeds(spec, parameters: dict[str, np.ndarray], batch: Batch) -> dict[str, np.ndarray]:
    return batch.arrays() | parameters | initial_state(spec)


def test_files_are_valid_and_keep_the_names(tiny):
    spec, parameters, paths = tiny
    assert [path.name for path in paths] == ["model.onnx", "model.inlined.onnx", "train.onnx", "train.inlined.onnx"]
    net = predict_net(spec)
    for path in paths[:2]:
        model = onnx.load(path)
        check(model)
        assert model.ir_version == 8
        assert {imported.domain: imported.version for imported in model.opset_import}[""] == 18
        assert [value.name for value in model.graph.output] == ["probability"]
        assert {value.name for value in model.graph.input} == batch_feeds(spec, 1).keys()
        assert {value.name for value in model.graph.initializer} == parameters.keys() | {"interaction.pairs"}
    functions = onnx.load(paths[0])
    assert [list(node.input) for node in functions.graph.node] == [list(operator.input) for operator in net.op]
    assert [list(node.output) for node in functions.graph.node] == [list(operator.output) for operator in net.op]
    assert {node.domain for node in functions.graph.node} == {"caffe2"}
    shapes = {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
              for value in (*functions.graph.input, *functions.graph.value_info, *functions.graph.output)}
    assert shapes["dense"] == ["B", spec.dense_features]
    for number, table in enumerate(spec.tables):
        expected = {None: f"tables.{number}.lookups", 1: "B", 3: "3*B"}[table.fixed_lookups]
        assert shapes[f"tables.{number}.indices"] == [expected]
    assert shapes["tables.0.pooled"] == ["B", spec.embedding_dim]
    assert shapes["probability"] == ["B", 1]


def test_files_explain_themselves(tmp_path: Path):
    """The spec, where the parameters come from, what each named axis counts, and what each input and output is."""
    spec = toml.load("tiny").with_optimizer("adagrad", 0.1)
    paths = export_onnx(spec, initial_parameters(spec), tmp_path, Source("seed 0"))
    for path, parameters in zip(paths, [*["seed 0"] * 2, *["inputs of the model"] * 2], strict=True):
        model = onnx.load(path)
        assert "tiny" in model.doc_string
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert toml.loads(found["spec"], "metadata") == spec and found["digest"] == spec.digest
        assert found["parameters"] == parameters
        values = (*model.graph.input, *model.graph.output)
        named = {axis.dim_param for value in values for axis in value.type.tensor_type.shape.dim if axis.dim_param}
        assert named <= json.loads(found["axes"]).keys()
        assert all(value.doc_string for value in values)
    texts = {value.name: value.doc_string for value in (*model.graph.input, *model.graph.output)}
    assert f"0 to {spec.tables[0].rows - 1}" in texts["tables.0.indices"]
    assert texts["tables.0.weight.moment"].endswith("tables.0.weight") and "state" in texts["tables.0.weight.moment"]
    assert "tables.0.weight" in texts["tables.0.weight.new"] and "bottom MLP" in texts["bottom.1.bias"]


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_step_in_a_file(kind: str):
    """From a batch, parameters and state to the loss and what has become of them: as the engine that keeps them."""
    spec = toml.load("tiny").with_optimizer(kind, 0.1)
    model, parameters = train_model(spec), initial_parameters(spec, 3)
    trained = (*trained_parameters(spec), *state_shapes(spec))
    assert [value.name for value in model.graph.output] == ["loss", *(f"{name}.new" for name in trained)]
    assert {value.name for value in model.graph.input} == {
        *batch_names(spec), *parameters, *state_shapes(spec)}
    assert {value.name for value in model.graph.initializer} == constants(spec).keys()
    shapes = {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
              for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    assert shapes["tables.0.weight.new"] == shapes["tables.0.weight"]
    assert shapes["bottom.1.activation_grad"] == ["B", spec.embedding_dim]
    net = train_net(spec)
    assert [node.op_type.split("_")[0] for node in model.graph.node] == [operator.type for operator in net.op]
    flat = inline(model)
    for form in (model, flat):
        check(form)
    session = ONNX.create(spec, parameters)
    for size in (1, 33):
        batch = random_batch(spec, size, 0, size)
        feeds = batch.arrays() | session.parameters() | session.optimizer_state()
        loss, *after = in_onnxruntime(model, feeds)
        for found, other in zip((loss, *after), in_onnxruntime(flat, feeds), strict=True):
            np.testing.assert_array_equal(found, other)
        for found, other in zip((loss, *after), in_reference(model, feeds), strict=True):
            np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-5)
        assert session.train_step(batch) == loss
        kept = session.parameters() | session.optimizer_state()
        for name, found in zip(trained, after, strict=True):
            np.testing.assert_allclose(kept[name], found, rtol=1e-6, atol=1e-6, err_msg=name)
    session.close()


def test_files_take_any_batch_and_agree_with_the_reference(tiny):
    spec, parameters, paths = tiny
    models = [onnx.load(path) for path in paths[:2]]
    for size in (1, 2, 37):
        batch = random_batch(spec, size, 0, size)
        feeds = {name: array for name, array in batch.arrays().items() if name != "label"}
        expected = evaluate(spec, parameters, batch, gradients=False).tensors["probability"]
        functions, inlined = (in_onnxruntime(model, feeds)[0] for model in models)
        np.testing.assert_array_equal(functions, inlined)
        for found in (functions, in_reference(models[0], feeds)[0]):
            assert (abs(found - expected.value) <= expected.reach).all()
    empty = {name: array[:0] for name, array in feeds.items()}
    assert in_onnxruntime(models[0], empty)[0].shape == (0, 1)


@pytest.mark.parametrize("name", [name for name in toml.preset_names() if name != "tiny"])
def test_presets_are_valid_models(name: str, tmp_path: Path):
    spec = toml.load(name).capped(50)
    paths = export_onnx(spec, initial_parameters(spec), tmp_path)
    models = [onnx.load(path) for path in paths]
    for model in models:
        check(model)
        assert not adds_by_scattering(model)
    functions, inlined = (in_onnxruntime(model, batch_feeds(spec, 3))[0] for model in models[:2])
    np.testing.assert_array_equal(functions, inlined)
    feeds = step_feeds(spec, initial_parameters(spec), random_batch(spec, 3, 0, 0))
    for one, other in zip(*(in_onnxruntime(model, feeds) for model in models[2:]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_large_initializers_are_written_beside_the_models(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec, parameters, paths = tiny
    monkeypatch.setattr(exported, "EMBEDDED_BYTES", 1000)
    written = export_onnx(spec, parameters, tmp_path)
    assert [path.name for path in written] == ["model.safetensors", "model.onnx", "model.inlined.onnx", "train.onnx",
                                                "train.inlined.onnx"]
    feeds = batch_feeds(spec, 20)
    expected = in_onnxruntime(onnx.load(paths[0]), feeds)[0]
    for path in written[1:3]:
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, feeds)[0], expected)
        loaded = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
        for name, array in parameters.items():
            np.testing.assert_array_equal(loaded[name], array)


def test_nothing_is_written_to_a_folder_that_cannot_be(tiny, tmp_path: Path):
    spec, parameters, _ = tiny
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a writable folder"):
        export_onnx(spec, parameters, tmp_path / "file")


def test_operators_without_a_lowering_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert, "record", lambda type: replace(record(type), onnx=None))
    net = NetDef(name="net", op=[make_operator("Relu", ["x"], ["y"])])
    with pytest.raises(InputError, match=r"net 'net': .*found Relu"):
        export_net(net, {}, {"x": Axes(np.dtype(np.float32), ("B",))})


def test_every_version_of_a_blob_has_a_name():
    net = NetDef(name="twice", op=[
        make_operator("Relu", ["x"], ["x"]), make_operator("Scale", ["x"], ["x"], scale=2.0),
        make_operator("Sum", ["x", "x.1"], ["y"]), make_operator("Scale", ["y"], ["y"], scale=3.0)],
        external_output=["x", "y"])
    axes = Axes(np.dtype(np.float32), ("B",))
    model = export_net(net, {}, {"x": axes, "x.1": axes})
    check(model)
    assert [list(node.output) for node in model.graph.node] == [["x.1_"], ["x.new"], ["y.1"], ["y"]]
    x, other = np.array([-1, 5], np.float32), np.array([1, 0], np.float32)
    found = in_onnxruntime(model, {"x": x, "x.1": other})
    np.testing.assert_array_equal(found, [[0, 10], [3, 30]])


def test_types_that_do_not_fit_are_refused():
    net = NetDef(name="misfit", op=[make_operator("FC", ["x", "w", "b"], ["y"])], external_output=["y"])
    blobs = {"w": np.ones((2, 3), np.float32), "b": np.ones(2, np.float32)}
    with pytest.raises(EngineError, match=r"net 'misfit', operator 0 \(FC\): .*K = 4.*K = 3"):
        export_net(net, blobs, {"x": Axes(np.dtype(np.float32), ("B", 4))})


def test_initial_blobs_are_those_of_the_init_net(tiny):
    spec, parameters, _ = tiny
    net = init_net(spec, parameters)
    blobs = initial_blobs(net)
    assert list(blobs) == list(net.external_output)
    for name, array in parameters.items():
        assert blobs[name].dtype == np.float32
        np.testing.assert_array_equal(blobs[name], array)
    assert blobs["interaction.pairs"].dtype == np.int64
    with pytest.raises(EngineError, match=r"operator 0 \(Relu\)"):
        initial_blobs(NetDef(name="net", op=[make_operator("Relu", ["x"], ["y"])], external_input=["x"]))
