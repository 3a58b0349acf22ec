"""DLRM as NetDefs, the backends that run them, and the .pb files on genuine Caffe2 alone."""

import subprocess
import sys
from dataclasses import replace
from itertools import takewhile

import legacy
import numpy as np
import pytest

from conformance.case import make_case
from conformance.run import run_case
from dlrm_caffe2 import model as nets
from dlrm_caffe2.backend import ATEN, ONNX, NetModel
from dlrm_caffe2.check import check_net
from dlrm_caffe2.engine.aten import AtenEngine
from dlrm_caffe2.engine.caffe2 import Caffe2Engine
from dlrm_caffe2.net import read_net, write_net
from spec.backend import Availability, load_backend
from spec.batch import Batch
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.model import MLP, Interaction, Loss, Table
from spec.parameters import (
    fixed_parameters,
    initial_parameters,
    initial_state,
    parameter_shapes,
    state_shapes,
    trained_parameters,
)
from spec.tensors import batch_names, trace_names
from spec.toml import load

OPTIMIZERS = ["sgd", "adagrad", "rowwise_adagrad"]

VARIANTS = {
    "tiny": {},
    "mse": {"loss": Loss(kind="mse")},
    "bce_logits": {"loss": Loss(kind="bce_logits")},
    "wbce": {"loss": Loss(kind="wbce", weights=(0.3, 1.7))},
    "wbce clipped": {"loss": Loss(kind="wbce", weights=(0.3, 1.7), clip=0.45)},
    "bce clipped": {"loss": Loss(clip=0.45)},
    "self interaction": {"interaction": Interaction(self_interaction=True)},
    "cat": {"interaction": Interaction(kind="cat")},
    "sigmoid": {"bottom": MLP(widths=(16, 8), activation="sigmoid"), "top": MLP(widths=(16, 1), activation="sigmoid")},
    "one layer, one table": {"bottom": MLP(widths=(8,)), "top": MLP(widths=(1,)), "tables": (Table(rows=5),)},
    "many duplicates": {"tables": tuple(Table(rows=2, pooling=pooling, lookups=(0, 9)) for pooling in (
        "sum", "mean", "weighted_fixed", "weighted_learned"))},
}


def variant(name):
    return load("tiny").model_copy(update=VARIANTS[name])


def under(kind):
    return load("tiny").with_optimizer(kind, 0.05)


def batch_of(spec, number=0, size=32):
    return random_batch(spec, size, seed=9, number=number)


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)


# The nets


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_net_names_all_that_it_reads_and_makes(name, kind):
    spec = variant(name).with_optimizer(kind, 0.1)
    init = nets.init_net(spec, initial_parameters(spec))
    check_net(init, [])
    made = set(init.external_output)
    for make in (nets.predict_net, nets.gradient_net, nets.train_net):
        net = make(spec)
        check_net(net, net.external_input)
        assert set(net.external_input) <= made | set(batch_names(spec))
    assert made == {*parameter_shapes(spec), *state_shapes(spec), *nets.constants(spec)}


def test_names_and_ends_of_the_nets():
    spec = load("tiny").with_optimizer("adagrad", 0.1)
    predict, gradient, train = nets.predict_net(spec), nets.gradient_net(spec), nets.train_net(spec)
    init = nets.init_net(spec, initial_parameters(spec))
    assert [net.name for net in (init, predict, gradient, train)] == [
        "tiny_init", "tiny_predict", "tiny_gradient", "tiny_train"]
    assert not init.external_input and "label" not in predict.external_input
    assert list(predict.external_output) == ["probability"]
    assert list(predict.external_input[:3]) == ["dense", "tables.0.indices", "tables.0.lengths"]
    assert set(train.external_output) == {"loss", *trained_parameters(spec), *state_shapes(spec)}
    inputs = set(gradient.external_input)
    assert set(gradient.external_output) == set(nets.trace_blobs(spec).values()) - inputs


def test_nets_are_made_the_same_each_time():
    code = ("import sys; from spec.toml import load; from dlrm_caffe2.model import train_net; "
            "sys.stdout.buffer.write(train_net(load('tiny').with_optimizer('adagrad', 0.1)).SerializeToString())")
    runs = {subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
                           ).stdout for seed in "123"}
    assert len(runs) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_only_gradients_are_named_like_gradients(name):
    operators = takewhile(lambda o: "loss_autogen_grad" not in o.output, nets.gradient_net(variant(name)).op)
    forward = [blob for operator in operators for blob in (*operator.input, *operator.output)]
    assert "loss" in forward
    assert not any(blob.endswith(("_grad", "_grad_values", "_grad_indices")) for blob in forward)


def test_the_trace_finds_every_tensor_and_no_gradient_of_the_input():
    spec = load("tiny")
    net = nets.gradient_net(spec)
    assert set(nets.trace_blobs(spec)) == set(trace_names(spec))
    made = {blob for o in net.op for blob in o.output}
    assert set(nets.trace_blobs(spec).values()) <= made | set(batch_names(spec))
    assert "dense_grad" not in made
    assert "tables.3.lookup_weights_grad" in made and "tables.2.lookup_weights_grad" not in made


def test_a_tables_indices_are_made_unique_once():
    train = nets.train_net(load("tiny").with_optimizer("adagrad", 0.1))
    unique = [operator.input[0] for operator in train.op if operator.type == "Unique"]
    assert unique == [f"tables.{number}.indices" for number in range(4)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_init_net_makes_what_it_was_given(kind):
    spec = under(kind)
    parameters = initial_parameters(spec, seed=5)
    engine = AtenEngine()
    engine.run_once(nets.init_net(spec, parameters))
    expected = parameters | initial_state(spec) | nets.constants(spec)
    found = engine.fetch(list(expected))
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
    assert_same(expected, found)
    assert found[nets.PAIRS].tolist() == [5, 10, 11, 15, 16, 17, 20, 21, 22, 23]
    assert found["minus_learning_rate"] == np.float32(-0.05)


def test_init_net_refuses_what_protobuf_cannot_hold():
    spec = load("tiny")
    table = np.broadcast_to(np.float32(0), (2**31 // 40 + 1, 8))
    with pytest.raises(InputError, match=r"init_net of 'tiny'.*protobuf's limit.*--max-rows"):
        nets.init_net(spec, {"tables.0.weight": table})


# The backends


@pytest.mark.parametrize("backend", [ATEN, ONNX], ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_conforms_to_the_reference(name, backend):
    """Forward, gradients and three steps of each optimizer against spec/reference.py."""
    (result,) = run_case(make_case(variant(name), steps=3), [backend]).backends
    assert result.status == "conforms", (result.reason, result.worst)


@pytest.mark.parametrize("backend", [ATEN, ONNX], ids=lambda backend: backend.name)
@pytest.mark.parametrize("loss", [Loss(clip=0.3), Loss(kind="wbce", weights=(0.3, 1.7), clip=0.3)])
def test_clip_on_both_sides(loss, backend):
    case = make_case(load("tiny").model_copy(update={"loss": loss}), steps=3)
    logit = ATEN.create(case.spec, case.parameters).trace(case.batches[0])["top.1.preactivation"]
    scale = np.float32(2 / logit.std())
    case.parameters["top.1.bias"] = (case.parameters["top.1.bias"] - np.median(logit)) * scale
    case.parameters["top.1.weight"] *= scale
    probability = ATEN.create(case.spec, case.parameters).predict(case.batches[0])
    assert len(np.unique(np.digitize(probability, [0.3, 0.7]))) == 3, "below, between and above the bounds"
    (result,) = run_case(case, [backend]).backends
    assert result.status == "conforms", (result.reason, result.worst)


@pytest.mark.parametrize("backend", [ATEN, ONNX], ids=lambda backend: backend.name)
def test_a_batch_of_empty_bags(backend):
    """Nothing is looked up: no row and no state of a table changes, and the MLPs still learn."""
    spec = load("tiny").model_copy(update={"tables": (Table(rows=4, lookups=(0, 2)),)}).with_optimizer("adagrad", 0.1)
    model = backend.create(spec, initial_parameters(spec))
    full = batch_of(spec, size=3)
    model.train_step(Batch(full.dense, (np.zeros(0, np.int64),), (np.zeros(3, np.int32),), full.label))
    after = model.parameters()
    np.testing.assert_array_equal(after["tables.0.weight"], initial_parameters(spec)["tables.0.weight"])
    assert not model.optimizer_state()["tables.0.weight.moment"].any()
    assert (after["top.1.bias"] != initial_parameters(spec)["top.1.bias"]).all()


@pytest.fixture(params=["caffe2-aten", "caffe2-onnx", pytest.param("caffe2", marks=pytest.mark.engine)])
def backend(request):
    return load_backend(request.param)


@pytest.fixture
def make(backend):
    """spec -> model, closed at the end."""
    made = []

    def make(spec, parameters=None):
        made.append(backend.create(spec, initial_parameters(spec) if parameters is None else parameters))
        return made[-1]
    yield make
    for model in made:
        model.close()
        model.close()


def snapshot(model):
    return model.parameters() | model.optimizer_state()


def test_protocol(make):
    spec = under("rowwise_adagrad")
    model, batch = make(spec), batch_of(spec)
    before = snapshot(model)
    assert_same(initial_parameters(spec) | initial_state(spec), before)

    trace = model.trace(batch)
    assert tuple(trace) == trace_names(spec)
    for name, array in trace.items():
        assert array.dtype == (np.int64 if name.endswith("_indices") else np.float32), name
    assert trace["loss"].shape == ()
    np.testing.assert_array_equal(trace["tables.3.pooling_grad_indices"], batch.indices[3])
    assert trace["tables.3.pooling_grad_values"].shape == batch.indices[3].shape

    probability = model.predict(batch)
    assert probability.shape == (32, 1)
    np.testing.assert_array_equal(probability, trace["probability"])
    assert_same(before, snapshot(model))

    loss = model.train_step(batch)
    assert isinstance(loss, float) and loss == pytest.approx(float(trace["loss"]), rel=2**-22)  # added up otherwise
    after = snapshot(model)
    assert all((after[name] != before[name]).any() for name in (*trained_parameters(spec), *state_shapes(spec)))
    assert all((after[name] == before[name]).all() for name in fixed_parameters(spec))


def test_batches_may_differ_in_size(make):
    spec = under("adagrad")
    model = make(spec)
    losses = [model.train_step(batch_of(spec, size=size)) for size in (32, 1, 7, 32)]
    assert np.isfinite(losses).all()
    assert model.predict(batch_of(spec, size=5)).shape == (5, 1)


def test_profile_is_undone_and_names_operator_types(make, backend):
    spec = under("adagrad")
    model, batch = make(spec), batch_of(spec)
    model.train_step(batch)
    before = snapshot(model)
    seconds = model.profile(batch)
    caffe2 = {"FC", "FCGradient", "SparseLengthsSum", "Adagrad", "SparseAdagrad"}
    assert ({"FCGradient/Gemm", "SparseLengthsSum/Gather"} if backend is ONNX else caffe2) <= seconds.keys()
    assert all(value >= 0 for value in seconds.values()) and sum(seconds.values()) > 0
    predicting = model.profile(batch, training=False)
    assert not any("Gradient" in key or "Adagrad" in key for key in predicting)
    types = [{key.split("/")[0] for key in measured} for measured in (predicting, seconds)]
    assert "FC" in types[0] and types[0] < types[1]
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", ["predict", "trace", "train_step", "profile"])
def test_a_bad_batch_is_refused_and_changes_nothing(make, method):
    spec = under("sgd")
    model, good = make(spec), batch_of(spec)
    model.train_step(good)
    before = snapshot(model)
    outside = good.indices[0].copy()
    outside[3] = -1
    with pytest.raises(InputError, match=r"tables\.0\.indices\[3\]"):
        getattr(model, method)(replace(good, indices=(outside, *good.indices[1:])))
    assert_same(before, snapshot(model))
    model.train_step(good)


def test_arrays_are_copies(make):
    spec = under("adagrad")
    given = initial_parameters(spec)
    model = make(spec, given)
    given["top.1.bias"] += 1
    model.parameters()["top.1.bias"][:] = 7
    model.optimizer_state()["top.1.bias.moment"][:] = 7
    assert_same(initial_parameters(spec) | initial_state(spec), snapshot(model))


def test_what_create_refuses(backend):
    spec = load("tiny")
    parameters = initial_parameters(spec)
    with pytest.raises(InputError, match="device 'tpu': expected cpu"):
        backend.create(spec, parameters, "tpu")
    with pytest.raises(InputError, match=r"top\.1\.bias"):
        backend.create(spec, parameters | {"top.1.bias": np.zeros(2, np.float32)})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = load("tiny")
    with pytest.raises(InputError, match=r"device 'cuda'.*a GPU"):
        ATEN.create(spec, initial_parameters(spec), "cuda")


def test_a_missing_engine_is_said_with_its_remedy():
    missing = replace(ATEN, name="gone", available=lambda: Availability(False, "not installed", "run: install it"))
    spec = load("tiny")
    with pytest.raises(EngineError, match="backend 'gone': not installed; run: install it"):
        missing.create(spec, initial_parameters(spec))


def test_an_engine_that_fails_at_the_start_is_closed():
    class Failing(AtenEngine):
        closed = False

        def feed(self, blobs):
            raise EngineError("out of memory")

        def close(self):
            self.closed = True

    spec, engine = load("tiny"), Failing()
    with pytest.raises(EngineError, match="out of memory"):
        NetModel(spec, initial_parameters(spec), engine)
    assert engine.closed


def test_importing_the_backends_loads_no_framework():
    code = ("import sys; from dlrm_caffe2.backend import ATEN, CAFFE2, ONNX; "
            "[b.available() for b in (ATEN, CAFFE2, ONNX)]; "
            "sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Genuine Caffe2


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_files_run_on_genuine_caffe2_alone(tmp_path, monkeypatch, kind):
    """Loaded with its own caffe2_pb2, run in its own workspace: the bits of our backend."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the bits of a matrix product depend on it
    # With sorted lookups SGD sums a row's gradients before it adds them, which rounds otherwise.
    monkeypatch.setattr(Caffe2Engine, "row_blocks", lambda self, spec, table: 0)
    monkeypatch.setattr(Caffe2Engine, "faster", lambda self, spec, net: net)  # so do the parts of an operator
    backend, spec = load_backend("caffe2"), under(kind)
    batch, parameters = batch_of(spec), initial_parameters(spec)
    content = {}
    for name, net in (("init", nets.init_net(spec, parameters)), ("predict", nets.predict_net(spec)),
                      ("train", nets.train_net(spec))):
        write_net(net, tmp_path / f"{name}.pb")
        assert read_net(tmp_path / f"{name}.pb") == net
        content[name] = (tmp_path / f"{name}.pb").read_bytes()
    names = [*trained_parameters(spec), *state_shapes(spec)]
    inputs = {name: array for name, array in batch.arrays().items() if name != "label"}
    predicted, trained = legacy.run(
        tmp_path, legacy.Job(content["predict"], inputs, ["probability"], content["init"]),
        legacy.Job(content["train"], batch.arrays(), ["loss", *names], content["init"], runs=5))

    model = backend.create(spec, parameters)
    np.testing.assert_array_equal(model.predict(batch), predicted["probability"])
    losses = [model.train_step(batch) for _ in range(5)]
    found = snapshot(model)
    model.close()
    assert losses[-1] == trained["loss"]
    assert_same({name: trained[name] for name in names}, {name: found[name] for name in names})
