"""The embedded engine and the validity check of nets."""

import numpy as np
import pytest

from dlrm_caffe2.check import check_net
from dlrm_caffe2.engine.aten import AtenEngine
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec.errors import EngineError


def net(*operators: OperatorDef, name: str = "net", **fields) -> NetDef:
    return NetDef(name=name, op=operators, **fields)


DOUBLE = make_operator("Scale", ["x"], ["y"], scale=2.0)
COUNT = make_operator("Iter", ["it"], ["it"])


@pytest.fixture
def engine():
    engine = AtenEngine()
    yield engine
    engine.close()


@pytest.mark.parametrize(("bad", "message"), [
    (net(DOUBLE, name=""), "name"),
    (net(DOUBLE, make_operator("Softmax", ["y"], ["z"])), r"net 'net', operator 1 \(Softmax\): .*expected one of"),
    (net(make_operator("Relu", ["x", "x"], ["y"])), r"operator 0 \(Relu\): .*inputs"),
    (net(make_operator("Relu", ["absent"], ["y"])), r"operator 0 \(Relu\): input 'absent'"),
    (net(make_operator("Relu", ["y"], ["z"]), DOUBLE), r"operator 0 \(Relu\): input 'y'"),
    (net(DOUBLE, external_input=["it"]), r"operator 0 \(Scale\): input 'x' .*external_input"),
    (net(DOUBLE, external_output=["y", "z"]), "external output 'z'"),
])
def test_invalid_net(engine: AtenEngine, bad: NetDef, message: str):
    engine.feed({"x": np.ones(2, np.float32)})
    for use in (lambda: check_net(bad, {"x"}), lambda: engine.create(bad), lambda: engine.run_once(bad)):
        with pytest.raises(EngineError, match=message):
            use()


def test_valid_net_needs_no_engine():
    good = net(DOUBLE, make_operator("Relu", ["y"], ["z"]), external_input=["x"], external_output=["z"])
    assert [node.type for node in check_net(good, good.external_input)] == ["Scale", "Relu"]


def test_kept_net_runs_again_and_again(engine: AtenEngine):
    engine.feed({"x": np.zeros(2, np.float32), "it": np.zeros(1, np.int64)})
    engine.create(net(DOUBLE, COUNT))
    for step in (1, 2):
        fetched = engine.run("net", {"x": np.full(step, 3, np.float32)}, ["y", "it"])  # the batch may grow
        np.testing.assert_array_equal(fetched["y"], np.full(step, 6, np.float32))
        assert fetched["it"] == step
    with pytest.raises(EngineError, match="'net' exists already"):
        engine.create(net(DOUBLE))


def test_what_an_operator_accepts_is_asked_again_where_sizes_depend_on_values(engine: AtenEngine):
    """There are as many sums as distinct indices, though everything that is fed keeps its type."""
    sums = [make_operator("Unique", ["i"], ["distinct", "places"]),
            make_operator("UnsortedSegmentSum", ["values", "places"], ["sums"]),
            make_operator("Sum", ["sums", "three"], ["y"])]
    engine.feed({"i": np.array([1, 2, 3]), "values": np.ones(3, np.float32), "three": np.ones(3, np.float32)})
    engine.create(net(*sums))
    for _ in range(3):
        np.testing.assert_array_equal(engine.run("net", {"i": np.array([5, 9, 7])}, ["y"])["y"], [2, 2, 2])
    for _ in range(2):
        with pytest.raises(EngineError, match=r"operator 2 \(Sum\): .*expected shape \[2\], found \[3\]"):
            engine.run("net", {"i": np.array([5, 9, 5])})
    np.testing.assert_array_equal(engine.run("net", {"i": np.array([5, 9, 7])}, ["y"])["y"], [2, 2, 2])


def test_what_is_accepted_is_asked_again_whoever_changed_a_type(engine: AtenEngine):
    """Runs that change nothing settle a net; after each of these it has to ask."""
    engine.feed({"x": np.ones(2, np.float32), "three": np.ones(3, np.float32)})
    engine.run_once(net(make_operator("Scale", ["x"], ["made"])))
    engine.create(net(make_operator("Sum", ["x", "made"], ["y"])))
    engine.create(net(make_operator("Copy", ["three"], ["made"]), name="other"))
    engine.create(net(make_operator("Scale", ["x"], ["made"]), name="back"))

    def settle() -> None:
        for _ in range(4):
            engine.run("net", {"x": np.ones(2, np.float32)})

    def refused() -> None:
        with pytest.raises(EngineError, match="expected shape"):
            engine.run("net", {})

    settle()
    engine.run("other", {})
    refused()
    engine.run("back", {})
    settle()
    engine.feed({"x": np.ones(3, np.float32)})
    refused()
    engine.feed({"x": np.ones(2, np.float32), "z": np.ones(1, np.float32)})
    settle()
    engine.feed({"x": np.ones(3, np.float32)})
    refused()
    engine.feed({"x": np.ones(2, np.float32)})
    settle()
    engine.run_once(net(make_operator("Copy", ["three"], ["made"]), name="once"))
    refused()


def test_a_net_that_changes_what_it_reads_asks_in_every_run(engine: AtenEngine):
    engine.feed({"x": np.ones(1, np.float32), "one": np.ones(1, np.float32)})
    engine.create(net(make_operator("Sum", ["x", "one"], ["y"]),
                      make_operator("Concat", ["x", "y"], ["x", "sizes"], axis=0)))
    for _ in range(4):
        assert engine.run("net", {"x": np.ones(1, np.float32)}, ["x"])["x"].shape == (2,)
    with pytest.raises(EngineError, match=r"operator 0 \(Sum\): .*expected shape \[2\], found \[1\]"):
        engine.run("net", {})


def test_weights_of_fc_lie_in_columns_and_are_what_was_fed(engine: AtenEngine):
    """Before and after a net is created that multiplies by them."""
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    engine.feed({"x": np.eye(2, dtype=np.float32), "w": weight, "b": np.zeros(3, np.float32),
                 "dy": np.ones((2, 3), np.float32)})
    engine.create(net(make_operator("FC", ["x", "w", "b"], ["y"]),
                      make_operator("FCGradient", ["x", "w", "dy"], ["dw", "db", "dx"])))
    for factor in (1, 2):
        found = engine.run("net", {}, ["w", "y", "dw", "db", "dx"])
        assert engine._blobs["w"].stride() == engine._blobs["dw"].stride() == (1, 3)
        np.testing.assert_array_equal(found["w"], factor * weight)
        np.testing.assert_array_equal(found["y"], factor * weight.T)
        np.testing.assert_array_equal(found["dw"], np.ones((3, 2)))
        np.testing.assert_array_equal(found["db"], [2, 2, 2])
        np.testing.assert_array_equal(found["dx"], factor * np.tile(weight.sum(0), (2, 1)))
        engine.feed({"w": 2 * weight})


def test_error_names_net_operator_and_blobs_and_the_engine_stays_usable(engine: AtenEngine):
    engine.feed({"x": np.zeros(2, np.float32), "it": np.zeros(1, np.int64)})
    engine.create(net(COUNT, DOUBLE))
    with pytest.raises(EngineError, match=r"net 'net', operator 1 \(Scale\): Scale\(x\) -> y: .*int64"):
        engine.run("net", {"x": np.zeros(2, np.int64)})
    np.testing.assert_array_equal(engine.run("net", {"x": np.ones(1, np.float32)}, ["y"])["y"], [2])


def test_feed_and_fetch_copy(engine: AtenEngine):
    fed, big_endian = np.zeros(2, np.float32), np.arange(3, dtype=">i8")
    engine.feed({"x": fed, "big": big_endian, "transposed": np.arange(6).reshape(2, 3).T})
    fed[:] = 1
    engine.fetch(["x"])["x"][:] = 2
    np.testing.assert_array_equal(engine.fetch(["x"])["x"], [0, 0])
    np.testing.assert_array_equal(engine.fetch(["big"])["big"], [0, 1, 2])
    np.testing.assert_array_equal(engine.fetch(["transposed"])["transposed"], np.arange(6).reshape(2, 3).T)


def test_missing_blob_net_and_unknown_dtype(engine: AtenEngine):
    with pytest.raises(EngineError, match="blob 'nowhere'"):
        engine.fetch(["nowhere"])
    with pytest.raises(EngineError, match="net 'nowhere'"):
        engine.run("nowhere", {})
    with pytest.raises(EngineError, match="blob 'text'"):
        engine.feed({"text": np.array(["a"])})


def test_a_net_whose_blob_a_failed_feed_has_dropped_says_so(engine: AtenEngine):
    engine.feed({"x": np.ones(2, np.float32)})
    engine.create(net(DOUBLE))
    for _ in range(3):
        engine.run("net", {})
    with pytest.raises(EngineError, match="blob 'x'"):
        engine.feed({"x": np.array(["a"])})
    with pytest.raises(EngineError, match="blob 'x' does not exist"):
        engine.run("net", {})


def test_profile_times_each_operator_type_and_runs_once(engine: AtenEngine):
    engine.feed({"x": np.zeros(2, np.float32), "it": np.zeros(1, np.int64)})
    engine.create(net(DOUBLE, make_operator("Scale", ["y"], ["z"], scale=2.0), COUNT))
    seconds = engine.profile("net", {"x": np.ones(2, np.float32)})
    assert set(seconds) == {"Scale", "Iter"} and all(value > 0 for value in seconds.values())
    assert engine.fetch(["it"])["it"] == 1


def test_close_frees_everything_and_may_be_repeated(engine: AtenEngine):
    engine.feed({"x": np.zeros(2, np.float32)})
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="blob 'x'"):
        engine.fetch(["x"])


def test_description_names_what_runs(engine: AtenEngine):
    torch = pytest.importorskip("torch")
    assert engine.description == (f"ATen kernels of PyTorch {torch.__version__}, cpu, "
                                  f"{torch.get_num_threads()} threads")
