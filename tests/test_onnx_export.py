"""Nets as ONNX models: each operator's lowering, whole models, their files, and the engine that runs them."""

import json
from dataclasses import replace
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

from dlrm_caffe2.backend import ONNX
from dlrm_caffe2.engine.onnxruntime import OnnxEngine
from dlrm_caffe2.export import export_onnx, train_model
from dlrm_caffe2.initial import initial_blobs
from dlrm_caffe2.model import constants, init_net, predict_net, train_net
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.onnx import convert
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net, inline
from dlrm_caffe2.operators import record, records
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import exported, toml
from spec.backend import load_backend
from spec.batch import Batch
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.exported import Source
from spec.parameters import initial_parameters, initial_state, state_shapes, trained_parameters
from spec.reference import evaluate
from spec.tensors import batch_names, trace_names

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


def adds_by_scattering(part: onnx.ModelProto | onnx.GraphProto | onnx.FunctionProto) -> bool:
    """Whether a ScatterND or ScatterElements anywhere has a reduction."""
    if isinstance(part, onnx.ModelProto):
        return any(map(adds_by_scattering, (part.graph, *part.functions)))
    attributes = [attribute for node in part.node for attribute in node.attribute]
    return (any(attribute.name == "reduction" for attribute in attributes)
            or any(adds_by_scattering(attribute.g) for attribute in attributes if attribute.HasField("g")))


def judge_lowering(case: Case) -> None:
    """ONNX Runtime on both forms, and ONNX's reference, against the formula; types and shapes against the kernel."""
    model = case_model(case)
    flat = inline(model)
    assert not flat.functions and {imported.domain for imported in flat.opset_import} == {""}
    kernel = run_aten(case)
    for form in (model, flat):
        check(form)
        assert not adds_by_scattering(form)
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


def bags(type: str, lengths: list[int], seed: int = 0, rows: int = 50, dtype: type = np.int64,
         **arguments: int) -> Case:
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    weights = [rng.normal(size=count).astype(np.float32)] if "Weighted" in type else []
    return make_case(type, [rng.normal(size=(rows, 3)).astype(np.float32), *weights,
                            rng.integers(0, rows, count).astype(dtype), np.array(lengths, np.int32)], **arguments)


LOOKUPS = ["SparseLengthsSum", "SparseLengthsMean", "SparseLengthsWeightedSum"]

RAGGED = {
    "no bags": [], "one empty bag": [0], "all empty": [0] * 5, "one bag of one": [1], "one-hot": [1] * 9,
    "empty at both ends": [0, 3, 0, 0, 2, 0], "a full tile": [16], "a tile and one": [17, 0, 16], "two turns": [256],
    "three turns": [257, 1, 0], "one giant bag": [0, 1, 5000, 2], "skewed": [1, 700, 0, 3, 90],
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("type", LOOKUPS)
def test_ragged_bags(type: str, dtype: type, lengths: list[int]):
    judge_lowering(bags(type, lengths, dtype=dtype))


def test_one_model_takes_bags_of_any_sizes():
    model = case_model(bags("SparseLengthsSum", [2, 0, 1]))
    for seed, lengths in enumerate(RAGGED.values()):
        case = bags("SparseLengthsSum", lengths, seed)
        judge(case, in_onnxruntime(model, case.blobs))


@pytest.mark.parametrize("k", [1, 2, 50])
@pytest.mark.parametrize("type", LOOKUPS)
def test_bags_of_a_fixed_size(type: str, k: int):
    """One model for any number of bags, without sorting them out; it refuses bags of other sizes."""
    model = case_model(bags(type, [k] * 3, fixed_lookups=k))
    kinds = {node.op_type for node in inline(model).graph.node}
    assert {"Loop", "ScatterND", "MatMul"}.isdisjoint(kinds) and ("ReduceSum" in kinds) == (k > 1)
    for size in (0, 1, 100):
        case = bags(type, [k] * size, fixed_lookups=k)
        judge(case, in_onnxruntime(model, case.blobs))
        judge(case, in_reference(model, case.blobs))
    for lengths in ([k - 1, k + 1], [0] + [k] * 3 + [2 * k], [k + 1, k, k - 1]):
        case = bags(type, lengths)
        for run in (in_onnxruntime, in_reference):
            with pytest.raises(Exception, match=r"(?i)shape|squeeze"):
                run(model, case.blobs)


def test_relu_gradient_is_zero_where_the_output_is_whatever_comes_back():
    """Also an infinity or NaN, which times 0 would be NaN."""
    y, dy = np.float32([0, 0, 0, 0, 1, 1, 1, 1]), np.float32([np.inf, -np.inf, np.nan, 1] * 2)
    case = make_case("ReluGradient", [y, dy])
    for run in (in_onnxruntime, in_reference):
        for form in (case_model(case), inline(case_model(case))):
            np.testing.assert_array_equal(run(form, case.blobs)[0], np.where(y > 0, dy, 0))


def heavy(type: str) -> Case:
    """100,000 indices into 100 rows of 64: there ScatterND(reduction=add) loses updates on two threads. Into 1000 rows
    for what takes a turn for each time that a row is listed."""
    rng, count, width = np.random.default_rng(0), 100_000, 64
    rows = 1000 if type.endswith("SparseAdagrad") else 100
    table, values = (rng.normal(size=(size, width)).astype(np.float32) for size in (rows, count))
    indices = rng.integers(0, rows, count)
    if type.startswith("SparseLengths"):
        lengths = rng.multinomial(count, rng.dirichlet(np.full(500, 0.3))).astype(np.int32)
        if "Gradient" in type:
            dy = rng.normal(size=(500, width)).astype(np.float32)
            return make_case(type, [dy, lengths, indices])
        return make_case(type, [table, indices, lengths])
    if type == "UnsortedSegmentSum":
        return make_case(type, [values, indices.astype(np.int32)])
    if type == "ScatterWeightedSum":
        return make_case(type, [table, np.float32([1]), indices, values, np.float32([-0.1])])
    if type.endswith("SparseAdagrad"):
        moment = np.zeros(rows if type.startswith("RowWise") else (rows, width), np.float32)
        return make_case(type, [table, moment, indices, values, np.float32([-0.1])], 2, epsilon=1e-5)
    assert type == "BatchGatherGradient"
    return make_case(type, [np.zeros((width, rows), np.float32), indices, np.ascontiguousarray(values.T)])


@pytest.mark.parametrize("type", ["SparseLengthsSum", "SparseLengthsIndicesInGradientSumGradient",
                                  "UnsortedSegmentSum", "ScatterWeightedSum", "SparseAdagrad", "RowWiseSparseAdagrad",
                                  "BatchGatherGradient"])
def test_sums_are_the_same_in_every_run_on_two_threads(type: str):
    case = heavy(type)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(case_model(case).SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    first = session.run(None, case.blobs)
    judge(case, first)
    for _ in range(19):
        for again, output in zip(session.run(None, case.blobs), first, strict=True):
            np.testing.assert_array_equal(again, output)


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
    assert {"FC/FusedGemm", "SparseLengthsSum/Gather"} <= seconds.keys()
    assert all(0 <= value < 1 for value in seconds.values())


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


def test_engine_passes_constants_that_would_not_fit_into_a_model(tiny, monkeypatch):
    spec, parameters, _ = tiny
    batch = random_batch(spec, 9, 0, 0)
    backend = load_backend("caffe2-onnx")
    expected = backend.create(spec, parameters).trace(batch)
    monkeypatch.setattr("dlrm_caffe2.engine.onnxruntime._MOST_CONSTANTS", 1000)
    found = backend.create(spec, parameters).trace(batch)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_sizes_that_are_equal_once_are_not_taken_to_be_equal(engine: OnnxEngine):
    net = NetDef(name="net", op=[make_operator("Gather", ["w", name], [f"{name}.rows"]) for name in "ab"],
                 external_output=["a.rows", "b.rows"])
    w = np.eye(5, dtype=np.float32)
    sizes = {"a": 3, "b": 3}
    model = export_net(net, {"w": w}, {name: Axes(np.dtype(np.int64), (name,)) for name in "ab"}, sizes=sizes)
    assert not any(axis.dim_param for value in model.graph.output for axis in value.type.tensor_type.shape.dim)
    engine.feed({"w": w, "a": np.arange(3), "b": np.arange(3)})
    engine.create(net)
    for a, b in ((3, 3), (2, 5), (4, 0)):
        found = engine.run("net", {"a": np.arange(a), "b": np.arange(b)}, ["a.rows", "b.rows"])
        assert [len(rows) for rows in found.values()] == [a, b]


def test_engine_keeps_what_a_net_updates(engine: OnnxEngine):
    """Also for a net that had the blob as a constant before."""
    w = np.array([1, 2], np.float32)
    engine.feed({"w": w, "by": np.float32([3])})
    engine.create(NetDef(name="read", op=[make_operator("Copy", ["w"], ["y"])], external_output=["y"]))
    np.testing.assert_array_equal(engine.run("read", {}, ["y"])["y"], w)
    engine.create(NetDef(name="grow", op=[make_operator("Mul", ["w", "by"], ["w"])], external_output=["w"]))
    np.testing.assert_array_equal(engine.run("grow", {}, ["w"])["w"], 3 * w)
    engine.run("grow", {})
    for found in (engine.fetch(["w"])["w"], engine.run("read", {}, ["y"])["y"]):
        np.testing.assert_array_equal(found, 9 * w)
    assert engine.profile("grow", {})
    engine.feed({"w": w, "by": np.float32([5])})
    np.testing.assert_array_equal(engine.run("grow", {}, ["by", "w"])["w"], 5 * w)
    np.testing.assert_array_equal(engine.run("read", {}, ["y"])["y"], 5 * w)


def test_a_run_that_fails_updates_nothing(engine: OnnxEngine):
    engine.feed({"w": np.ones((2, 3), np.float32), "i": np.array([0]), "g": np.ones((1, 3), np.float32),
                 "one": np.float32([1])})
    engine.create(NetDef(name="step", op=[
        make_operator("ScatterWeightedSum", ["w", "one", "i", "g", "one"], ["w"])], external_output=["w"]))
    with pytest.raises(EngineError, match="net 'step' in ONNX Runtime"):
        engine.run("step", {"i": np.array([2])})
    np.testing.assert_array_equal(engine.fetch(["w"])["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(engine.run("step", {"i": np.array([1])}, ["w"])["w"], [[1] * 3, [2] * 3])


def test_engine_errors(engine: OnnxEngine, monkeypatch: pytest.MonkeyPatch):
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
    monkeypatch.setattr(convert, "record", lambda type: replace(record(type), onnx=None))
    with pytest.raises(EngineError, match="found Relu"):
        engine.create(NetDef(name="other", op=[make_operator("Relu", ["w"], ["y"])], external_output=["y"]))
