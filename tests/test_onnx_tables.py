"""Tables in ONNX Runtime: updated in place or by rows, and the same in every run on two threads.

ScatterND(reduction="add"), which would be the obvious lowering of all of these, is a data race there; the control shows
that the test of determinism finds it.
"""

import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from dlrm_caffe2.backend import ONNX
from dlrm_caffe2.engine import onnxruntime as engine_module
from dlrm_caffe2.engine.in_place import updates_in_place
from dlrm_caffe2.engine.onnxruntime import OnnxEngine
from dlrm_caffe2.export import train_model
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net, inline
from dlrm_caffe2.onnx.sparse import overwritable
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec import toml
from spec.data.random import random_batch
from spec.parameters import initial_parameters, initial_state, state_shapes, trained_parameters

UPDATE = make_operator("ScatterWeightedSum", ["w", "one", "i", "g", "rate"], ["w"])
BLOBS = {"w": np.arange(12, dtype=np.float32).reshape(6, 2), "one": np.float32([1]), "rate": np.float32([-0.5]),
         "i": np.array([4, 1, 4]), "g": np.float32([[2, 4]] * 3)}
UPDATED = np.float32([[0, 1], [1, 1], [4, 5], [6, 7], [6, 5], [10, 11]])


@pytest.fixture
def engine():
    engine = OnnxEngine()
    yield engine
    engine.close()


def flat_model(*operators):
    net = NetDef(name="net", op=operators, external_output=["w"])
    inputs = {name: Axes(array.dtype, tuple(f"{name}.{axis}" for axis in range(array.ndim)))
              for name, array in BLOBS.items()}
    sizes = {f"{name}.{axis}": length for name, array in BLOBS.items() for axis, length in enumerate(array.shape)}
    return inline(export_net(net, {}, inputs, sizes=sizes))


def test_a_table_is_overwritten_only_after_all_that_reads_it():
    look = make_operator("Gather", ["w", "i"], ["y"])
    after = make_operator("ScatterWeightedSum", ["w", "one", "i", "y", "rate"], ["w"])
    assert overwritable(flat_model(UPDATE), {"w": "w.new"}) == {"w"}
    assert overwritable(flat_model(look, after), {"w": "w.new"}) == {"w"}
    assert not overwritable(flat_model(look, UPDATE), {"w": "w.new"})
    assert not overwritable(flat_model(UPDATE, UPDATE), {"w": "w.new"})


def test_this_onnx_runtime_updates_in_place():
    assert updates_in_place(2)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("read_too", [True, False])
def test_a_table_is_updated_where_it_is(engine: OnnxEngine, monkeypatch, in_place, read_too):
    """Or from here, where it must not or cannot be overwritten; what reads it sees the old rows."""
    monkeypatch.setattr(engine_module, "updates_in_place", lambda threads: in_place)
    engine.feed(BLOBS)
    reader = [make_operator("Gather", ["w", "i"], ["y"])] if read_too else []
    engine.create(NetDef(name="step", op=[*reader, UPDATE], external_output=["w"]))
    found = engine.run("step", {"i": BLOBS["i"]}, ["y", "w"] if read_too else ["w"])
    np.testing.assert_array_equal(found["w"], UPDATED)
    if read_too:
        np.testing.assert_array_equal(found["y"], BLOBS["w"][BLOBS["i"]])
    np.testing.assert_array_equal(BLOBS["w"].ravel(), np.arange(12))
    engine.feed({"w": BLOBS["w"]})
    np.testing.assert_array_equal(engine.run("step", {"i": BLOBS["i"]}, ["w"])["w"], UPDATED)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_training_is_the_same_by_rows(kind, monkeypatch):
    spec = toml.load("tiny").with_optimizer(kind, 0.1)
    kept = []
    for in_place in (True, False):
        monkeypatch.setattr(engine_module, "updates_in_place", lambda threads, answer=in_place: answer)
        model = ONNX.create(spec, initial_parameters(spec))
        losses = [model.train_step(random_batch(spec, 50, 0, number)) for number in range(3)]
        kept.append({"losses": np.array(losses)} | model.parameters() | model.optimizer_state())
        model.close()
    for name, array in kept[0].items():
        np.testing.assert_array_equal(array, kept[1][name], err_msg=name)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_step_in_a_file_by_rows(kind):
    """What is assigned to the rows makes the whole new table, bit by bit; and a table is sorted once."""
    spec = toml.load("tiny").with_optimizer(kind, 0.1)
    before = initial_parameters(spec) | initial_state(spec)
    feeds = random_batch(spec, 50, 0, 0).arrays() | before
    found = []
    for by_rows in (False, True):
        model = train_model(spec, by_rows)
        onnx.checker.check_model(model, full_check=True)
        sorts = [node for node in nodes_of(inline(model).graph)
                 if node.op_type == "TopK" and not node.name.startswith("BatchGather")]
        learned = sum(table.pooling == "weighted_learned" for table in spec.tables) if kind == "sgd" else 0
        assert len(sorts) == len(spec.tables) + learned
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found.append(dict(zip(names, session.run(names, feeds), strict=True)))
    whole, rows = found
    assert any(name.endswith(".new_values") for name in rows)
    for name in (*trained_parameters(spec), *state_shapes(spec)):
        if f"{name}.new_values" in rows:
            changed = before[name].copy()
            parameter = name if f"{name}.new_rows" in rows else name.removesuffix(".moment")
            changed[rows[f"{parameter}.new_rows"]] = rows[f"{name}.new_values"]
            np.testing.assert_array_equal(changed, whole[f"{name}.new"])
        else:
            np.testing.assert_array_equal(rows[f"{name}.new"], whole[f"{name}.new"])


def nodes_of(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


ROWS, LOOKUPS, WIDTH = 100, 100_000, 64


def heavy():
    """A table, indices that hit each row 1000 times, and a gradient for each of them; and the sums by row."""
    rng = np.random.default_rng(0)
    table, values = (rng.normal(size=(size, WIDTH)).astype(np.float32) for size in (ROWS, LOOKUPS))
    indices = rng.integers(0, ROWS, LOOKUPS)
    exact, gauge = np.zeros((2, ROWS, WIDTH))
    np.add.at(exact, indices, values.astype(np.float64))
    np.add.at(gauge, indices, abs(values.astype(np.float64)))
    return table, indices, values, exact, gauge


def test_an_update_in_place_is_the_same_in_every_run(engine: OnnxEngine):
    table, indices, values, exact, gauge = heavy()
    engine.threads = 2
    engine.feed({"w": table, "one": np.float32([1]), "rate": np.float32([-0.5]), "i": indices, "g": values})
    engine.create(NetDef(name="step", op=[UPDATE], external_output=["w"]))
    found = []
    for _ in range(20):
        engine.feed({"w": table})
        found.append(engine.run("step", {"i": indices}, ["w"])["w"])
    most = np.bincount(indices).max()
    bound = (most + 2) * 2.0**-24 * (abs(table) + 0.5 * gauge)
    assert (abs(found[0] - (table - 0.5 * exact)) <= bound).all()
    for again in found[1:]:
        np.testing.assert_array_equal(again, found[0])


@pytest.mark.parametrize("type", ["SparseAdagrad", "RowWiseSparseAdagrad"])
def test_adagrad_in_place_is_the_same_in_every_run(engine: OnnxEngine, type: str):
    """The gradients of each row are summed first, as in training."""
    table, indices, values, exact, gauge = heavy()
    rowwise = type.startswith("RowWise")
    start = {"w": table, "h": np.full(ROWS if rowwise else table.shape, 0.1, np.float32)}
    engine.threads = 2
    engine.feed({**start, "rate": np.float32([-0.5]), "i": indices, "g": values})
    engine.create(NetDef(name="step", external_output=["w", "h"], op=[
        make_operator("Unique", ["i"], ["rows", "places"]),
        make_operator("UnsortedSegmentSum", ["g", "places"], ["sums"]),
        make_operator(type, ["w", "h", "rows", "sums", "rate"], ["w", "h"], epsilon=1e-5)]))
    found = []
    for _ in range(20):
        engine.feed(start)
        found.append(engine.run("step", {"i": indices}, ["w", "h"]))
    unit = 2.0**-24
    off = np.bincount(indices).max() * unit * gauge  # of the sums
    squares, squares_off = exact**2, 2 * abs(exact) * off + off**2
    if rowwise:
        squares, squares_off = squares.mean(1, keepdims=True), squares_off.mean(1, keepdims=True)
    h = np.float32(0.1).astype(float) + squares
    h_off = squares_off + (WIDTH + 4) * unit * h
    step = -0.5 * exact / (np.sqrt(h) + 1e-5)
    step_off = 0.5 * off / np.sqrt(h) + abs(step) * (h_off / (2 * h) + 8 * unit)
    assert (abs(found[0]["w"] - (table + step)) <= step_off + unit * (abs(table) + abs(step))).all()
    assert (abs(found[0]["h"].reshape(h.shape) - h) <= h_off).all()
    for again in found[1:]:
        for name in start:
            np.testing.assert_array_equal(again[name], found[0][name])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a race takes two cores")
def test_the_control_is_not_the_same_in_every_run():
    """Why no export has ScatterND(reduction="add"): on these sizes it loses updates in 28 of 30 runs (1.32).

    Should this fail, ONNX Runtime has mended it."""
    _, indices, values, exact, gauge = heavy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(parser.parse_model("""
        <ir_version: 8, opset_import: ["": 18]>
        racy (float[N, W] table, int64[K, 1] i, float[K, W] g) => (float[N, W] y) {
            y = ScatterND<reduction = "add">(table, i, g)
        }
    """).SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"table": np.zeros_like(exact, np.float32), "i": indices[:, None], "g": values}
    runs = (session.run(None, feeds)[0] for _ in range(60))
    assert any((abs(y - exact) > np.bincount(indices).max() * 2.0**-24 * gauge).any() for y in runs)
