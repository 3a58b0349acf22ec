"""Nets as ONNX models: each operator's lowering, whole models, their files, and the engine that runs them."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from operator_cases import Case, cases, make_case
from test_operators import judge, run_aten

from dlrm_caffe2 import export
from dlrm_caffe2.engine.onnxruntime import OnnxEngine
from dlrm_caffe2.export import Axes, export_net, export_onnx, initial_blobs, inline
from dlrm_caffe2.model import gradient_net, init_net, predict_net
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import records
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import toml
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.parameters import initial_parameters
from spec.reference import evaluate
from spec.tensors import trace_names

LOWERED = sorted(type for type, operator in records().items() if operator.onnx)


def case_model(case: Case) -> onnx.ModelProto:
    """One operator; all its inputs are the model's, of sizes that the model does not know."""
    inputs, sizes = {}, {}
    for name, array in case.blobs.items():
        axes = tuple(f"{name}.{axis}" for axis in range(array.ndim))
        inputs[name] = Axes(array.dtype, axes)
        sizes |= zip(axes, array.shape, strict=True)
    net = NetDef(name="case", op=[case.definition], external_output=case.definition.output)
    return export_net(net, {}, inputs, sizes=sizes)


def check(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def in_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray], threads: int = 1) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def in_reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feeds)


def fails_in_reference(flat: onnx.ModelProto, case: Case) -> bool:
    """ONNX's reference cannot flatten a tensor without elements."""
    return any(node.op_type == "Flatten" for node in flat.graph.node) and not all(x.size for x in case.inputs)


def judge_lowering(case: Case) -> None:
    """ONNX Runtime on both forms, and ONNX's reference, against the formula; types and shapes against the kernel."""
    model = case_model(case)
    flat = inline(model)
    assert not flat.functions and {imported.domain for imported in flat.opset_import} == {""}
    kernel = run_aten(case)
    for form in (model, flat):
        check(form)
        runs = [in_onnxruntime(form, case.blobs)]
        if not fails_in_reference(flat, case):
            runs.append(in_reference(form, case.blobs))
        for outputs in runs:
            judge(case, outputs)
            assert [(y.dtype, y.shape) for y in outputs] == [(y.dtype, y.shape) for y in kernel]


@pytest.mark.parametrize("type", LOWERED)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lowering(type: str, data: st.DataObject):
    judge_lowering(data.draw(cases(type)))


def test_every_operator_is_lowered():
    assert set(LOWERED) == set(records())


def bags(type: str, lengths: list[int], seed: int = 0, rows: int = 50, dtype: type = np.int64) -> Case:
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    weights = [rng.normal(size=count).astype(np.float32)] if "Weighted" in type else []
    return make_case(type, [rng.normal(size=(rows, 3)).astype(np.float32), *weights,
                            rng.integers(0, rows, count).astype(dtype), np.array(lengths, np.int32)])


RAGGED = {
    "no bags": [], "one empty bag": [0], "all empty": [0] * 5, "one bag of one": [1], "one-hot": [1] * 9,
    "empty at both ends": [0, 3, 0, 0, 2, 0], "a full tile": [16], "a tile and one": [17, 0, 16], "two turns": [256],
    "three turns": [257, 1, 0], "one giant bag": [0, 1, 5000, 2], "skewed": [1, 700, 0, 3, 90],
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("type", ["SparseLengthsSum", "SparseLengthsMean", "SparseLengthsWeightedSum"])
def test_ragged_bags(type: str, dtype: type, lengths: list[int]):
    judge_lowering(bags(type, lengths, dtype=dtype))


def test_one_model_takes_bags_of_any_sizes():
    model = case_model(bags("SparseLengthsSum", [2, 0, 1]))
    for seed, lengths in enumerate(RAGGED.values()):
        case = bags("SparseLengthsSum", lengths, seed)
        judge(case, in_onnxruntime(model, case.blobs))


def test_sum_is_the_same_in_every_run_on_two_threads():
    """Where ScatterND(reduction=add) loses updates: 100 rows, 100,000 indices."""
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(100_000, rng.dirichlet(np.full(500, 0.3)))
    case = bags("SparseLengthsSum", lengths.tolist(), rows=100)
    model = case_model(case)
    first = in_onnxruntime(model, case.blobs, threads=2)
    judge(case, first)
    for _ in range(5):
        np.testing.assert_array_equal(in_onnxruntime(model, case.blobs, threads=2)[0], first[0])


def test_no_lowering_adds_by_scattering():
    files = [case_model(bags(type, [2, 0])) for type in LOWERED if type.startswith("SparseLengths")]
    for model in files:
        for function in model.functions:
            for node in function.node:
                assert not any(attribute.name == "reduction" for attribute in node.attribute)
    assert files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """The spec, its parameters, and the paths that `export_onnx` has written."""
    spec = toml.load("tiny")
    parameters = initial_parameters(spec, 3)
    return spec, parameters, export_onnx(spec, parameters, tmp_path_factory.mktemp("exported"))


def batch_feeds(spec, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    arrays = random_batch(spec, size, seed, 0).arrays()
    del arrays["label"]
    return arrays


def test_files_are_valid_and_keep_the_names(tiny):
    spec, parameters, paths = tiny
    assert [path.name for path in paths] == ["model.onnx", "model.inlined.onnx"]
    net = predict_net(spec)
    for path in paths:
        model = onnx.load(path)
        check(model)
        assert model.ir_version == 8
        assert {imported.domain: imported.version for imported in model.opset_import}[""] == 18
        assert [value.name for value in model.graph.output] == ["probability"]
        assert {value.name for value in model.graph.input} == batch_feeds(spec, 1).keys()
        assert {value.name for value in model.graph.initializer} == parameters.keys() | {"interaction.pairs"}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert toml.loads(metadata["spec"], "metadata") == spec and metadata["digest"] == spec.digest
        assert all(value.doc_string for value in model.graph.input)
    functions = onnx.load(paths[0])
    assert [list(node.input) for node in functions.graph.node] == [list(operator.input) for operator in net.op]
    assert [list(node.output) for node in functions.graph.node] == [list(operator.output) for operator in net.op]
    assert {node.domain for node in functions.graph.node} == {"caffe2"}
    shapes = {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
              for value in (*functions.graph.input, *functions.graph.value_info, *functions.graph.output)}
    assert shapes["dense"] == ["B", spec.dense_features]
    assert shapes["tables.0.indices"] == ["tables.0.lookups"]
    assert shapes["tables.0.pooled"] == ["B", spec.embedding_dim]
    assert shapes["probability"] == ["B", 1]


def test_files_take_any_batch_and_agree_with_the_reference(tiny):
    spec, parameters, paths = tiny
    models = [onnx.load(path) for path in paths]
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
    for path in paths:
        check(onnx.load(path))
    feeds = batch_feeds(spec, 3)
    functions, inlined = (in_onnxruntime(onnx.load(path), feeds)[0] for path in paths)
    np.testing.assert_array_equal(functions, inlined)


def test_large_initializers_are_written_beside_the_models(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec, parameters, paths = tiny
    monkeypatch.setattr(export, "EMBEDDED_BYTES", 1000)
    written = export_onnx(spec, parameters, tmp_path)
    assert [path.name for path in written] == ["model.data", "model.onnx", "model.inlined.onnx"]
    feeds = batch_feeds(spec, 20)
    expected = in_onnxruntime(onnx.load(paths[0]), feeds)[0]
    for path in written[1:]:
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


def test_operators_without_a_lowering_are_named(tiny):
    spec, parameters, _ = tiny
    net = gradient_net(spec)
    with pytest.raises(InputError, match=r"found .*FCGradient, .*ReluGradient"):
        export_net(net, parameters, {name: Axes(np.dtype(np.float32), ("B",)) for name in net.external_input})


def test_a_blob_written_twice_is_refused():
    net = NetDef(name="twice", op=[make_operator("Relu", ["x"], ["x"])], external_output=["x"])
    with pytest.raises(InputError, match="'x' overwritten by Relu"):
        export_net(net, {}, {"x": Axes(np.dtype(np.float32), ("B",))})


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


@pytest.fixture
def engine():
    engine = OnnxEngine()
    yield engine
    engine.close()


def test_engine_computes_every_activation(engine: OnnxEngine, tiny):
    spec, parameters, _ = tiny
    net = predict_net(spec)
    engine.run_once(init_net(spec, parameters))
    batch = random_batch(spec, 9, 0, 0)
    feeds = {name: array for name, array in batch.arrays().items() if name != "label"}
    engine.feed(feeds)
    engine.create(net)
    names = trace_names(spec, gradients=False)
    found = engine.run(net.name, feeds, names)
    assert tuple(found) == names
    for name, tensor in evaluate(spec, parameters, batch, gradients=False).tensors.items():
        if name in names:
            assert (abs(found[name] - tensor.value) <= tensor.reach).all(), name
    np.testing.assert_array_equal(engine.run(net.name, feeds, ["probability"])["probability"], found["probability"])
    seconds = engine.profile(net.name, feeds)
    assert {"Gather", "ScatterND"} <= seconds.keys() and all(0 <= value < 1 for value in seconds.values())


def test_engine_runs_with_parameters_fed_anew(engine: OnnxEngine):
    net = NetDef(name="scaled", op=[make_operator("Mul", ["x", "w"], ["y"])], external_input=["x", "w"],
                 external_output=["y"])
    x, w = np.arange(3, dtype=np.float32), np.array([2], np.float32)
    engine.feed({"x": x, "w": w})
    engine.create(net)
    np.testing.assert_array_equal(engine.run("scaled", {"x": x}, ["y", "w"])["y"], 2 * x)
    engine.feed({"w": w + 1})
    np.testing.assert_array_equal(engine.run("scaled", {"x": x}, ["y"])["y"], 3 * x)
    w[:] = 0
    np.testing.assert_array_equal(engine.fetch(["w"])["w"], [3])


def test_engine_errors(engine: OnnxEngine):
    with pytest.raises(EngineError, match="'w' does not exist"):
        engine.fetch(["w"])
    with pytest.raises(EngineError, match="net 'net' does not exist"):
        engine.run("net", {})
    net = NetDef(name="net", op=[make_operator("Gather", ["w", "i"], ["y"])], external_output=["y"])
    with pytest.raises(EngineError, match="input 'w' is neither"):
        engine.create(net)
    engine.feed({"w": np.ones((2, 3), np.float32), "i": np.array([0])})
    engine.create(net)
    with pytest.raises(EngineError, match="exists already"):
        engine.create(net)
    with pytest.raises(EngineError, match=r"net 'net' in ONNX Runtime: .*out of data bounds"):
        engine.run("net", {"i": np.array([2])}, ["y"])
    train = NetDef(name="train", op=[make_operator("ReluGradient", ["w", "w"], ["dx"])], external_output=["dx"])
    with pytest.raises(EngineError, match="found ReluGradient"):
        engine.create(train)
