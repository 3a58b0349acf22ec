"""The engine that runs nets in ONNX Runtime."""

from dataclasses import replace

import numpy as np
import pytest

from dlrm_caffe2.engine.onnxruntime import OnnxEngine
from dlrm_caffe2.model import init_net, predict_net
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.onnx import convert
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net
from dlrm_caffe2.operators import record
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import toml
from spec.backend import load_backend
from spec.data.random import random_batch
from spec.errors import EngineError
from spec.parameters import initial_parameters
from spec.reference import evaluate
from spec.tensors import trace_names


@pytest.fixture(scope="module")
def tiny():
    """The spec and its parameters."""
    spec = toml.load("tiny")
    return spec, initial_parameters(spec, 3)


@pytest.fixture
def engine():
    engine = OnnxEngine()
    yield engine
    engine.close()


def test_engine_computes_every_activation(engine: OnnxEngine, tiny):
    spec, parameters = tiny
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
    spec, parameters = tiny
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
