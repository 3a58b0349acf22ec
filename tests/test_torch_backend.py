"""The backend `torch` through spec.backend's protocol."""

import subprocess
import sys

import numpy as np
import pytest

from dlrm_torch.backend import BACKEND
from dlrm_torch.step import AutogradStep
from spec.backend import PARTS, load_backend
from spec.batch import Batch
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.parameters import (
    fixed_parameters,
    initial_parameters,
    initial_state,
    is_sparse,
    moment_name,
    parameter_shapes,
    trained_parameters,
)
from spec.tensors import slice_names, trace_names
from spec.toml import load

U = 2.0**-24
KINDS = ["sgd", "adagrad", "rowwise_adagrad"]


def make(kind="sgd"):
    spec = load("tiny").with_optimizer(kind, 0.1)
    return spec, BACKEND.create(spec, initial_parameters(spec))


def batch_of(spec, number=0):
    return random_batch(spec, 32, seed=9, number=number)


def snapshot(model):
    return model.parameters() | model.optimizer_state()


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)


def test_is_registered_and_available():
    assert load_backend("torch") is BACKEND
    assert BACKEND.name == "torch" and BACKEND.trains and BACKEND.available().ok


def test_loading_the_backend_loads_no_torch():
    code = ("import sys; from dlrm_torch.backend import BACKEND; assert BACKEND.available().ok; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_missing_torch_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr("dlrm_torch.backend.find_spec", lambda name: None)
    assert not BACKEND.available().ok
    with pytest.raises(EngineError, match="pip install torch"):
        make()


def test_engine_names_what_runs():
    import torch
    _, model = make()
    assert model.engine == f"PyTorch {torch.__version__} eager, cpu, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = load("tiny")
    with pytest.raises(InputError, match=f"device '{device}'"):
        BACKEND.create(spec, initial_parameters(spec), device)


@pytest.mark.parametrize("method", ["predict", "trace", "train_step", "profile"])
def test_bad_batches_are_refused_before_anything_changes(method):
    spec, model = make()
    before = snapshot(model)
    good = batch_of(spec)
    indices = (good.indices[0].copy(), *good.indices[1:])
    indices[0][3] = 40
    with pytest.raises(InputError, match=r"tables\.0\.indices\[3\]"):
        getattr(model, method)(Batch(good.dense, indices, good.lengths, good.label))
    assert_same(before, snapshot(model))


def test_parameters_are_copies_of_those_given():
    spec = load("tiny").with_optimizer("adagrad", 0.1)
    given = initial_parameters(spec)
    model = BACKEND.create(spec, given)
    for array in (*given.values(), *snapshot(model).values()):
        array.fill(7)
    assert_same(initial_parameters(spec) | initial_state(spec), snapshot(model))


@pytest.mark.parametrize("kind", KINDS)
def test_predict_trace_and_profile_change_nothing(kind):
    spec, model = make(kind)
    model.train_step(batch_of(spec))
    before = snapshot(model)
    batch = batch_of(spec, 1)
    arrays = {name: array.copy() for name, array in batch.arrays().items()}
    probability = model.predict(batch)
    traced = model.trace(batch)
    seconds = model.profile(batch)
    assert_same(before, snapshot(model))
    assert probability.dtype == np.float32 and probability.shape == (32, 1)
    np.testing.assert_array_equal(probability, traced["probability"])
    assert seconds["fc/aten.addmm"] > 0 and all(value >= 0 for value in seconds.values())
    for array in traced.values():
        array.fill(0)  # none of them is the batch's own memory
    assert_same(arrays, batch.arrays())


def test_profile_tells_what_each_operator_works_for():
    spec, model = make("adagrad")
    training, inference = (model.profile(batch_of(spec), training) for training in (True, False))
    parts = {key.partition("/")[0] for key in training}
    assert parts == set(PARTS) and {key.partition("/")[0] for key in inference} == parts - {"loss", "optimizer"}
    assert {"fc/aten.addmm", "fc/aten.mm", "activation/dlrm.reverse_relu", "interaction/dlrm.dot_products",
            "embedding/aten.embedding_bag", "interaction/dlrm.dot_gradient", "optimizer/dlrm.adagrad_rows",
            "optimizer/aten._foreach_sqrt"} <= set(training)
    assert not any("backward" in key for key in inference)


def test_trace_has_the_types_and_shapes_of_the_spec():
    spec, model = make()
    batch = batch_of(spec)
    traced = model.trace(batch)
    assert tuple(traced) == trace_names(spec)
    for name, array in traced.items():
        assert array.dtype == (np.int64 if name.endswith("_indices") else np.float32), name
    assert traced["loss"].shape == ()
    shapes = parameter_shapes(spec)
    for name in trained_parameters(spec):
        if is_sparse(name):
            rows, values = (traced[part] for part in slice_names(name))
            assert set(rows) == set(batch.indices[int(name.split(".")[1])])
            assert values.shape == (len(rows), *shapes[name][1:])
        else:
            assert traced[f"{name}_grad"].shape == shapes[name]


def occurrences(batch, name, parameters, traced):
    """The sum of magnitudes in the gradient of a table's rows, and how many there are at the most: the step may add up
    a row's gradients in another order than the trace, or add them to the row one by one."""
    table, part = name.split(".")[1:]
    indices, lengths = batch.indices[int(table)], batch.lengths[int(table)]
    gauge = np.zeros(parameters[name].shape)
    if part == "weight":
        pooled = np.abs(traced[f"tables.{table}.pooled_grad"])[np.repeat(np.arange(batch.size), lengths)]
        weights = np.abs(parameters.get(f"tables.{table}.pooling", np.ones(len(gauge))))
        np.add.at(gauge, indices, pooled * weights[indices, None])
    return gauge, np.bincount(indices).max()


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_applies_the_gradients_of_the_trace(kind):
    """float64 rule on the float32 gradients that the model traced just before; the bound is first-order.

    By autograd, as in the trace: the step that is written out may round a gradient otherwise.
    """
    spec, model = make(kind)
    model._step = AutogradStep(model.module, model._optimizer)
    rate, eps = spec.optimizer.learning_rate, spec.optimizer.eps
    for number in range(5):
        batch = batch_of(spec, number)
        before, traced = snapshot(model), model.trace(batch)
        assert model.train_step(batch) == traced["loss"]
        after = snapshot(model)
        assert before.keys() == after.keys()
        for name in fixed_parameters(spec):
            np.testing.assert_array_equal(before[name], after[name])
        for name in trained_parameters(spec):
            w = before[name].astype(np.float64)
            g, terms = w * 0, 1
            if is_sparse(name):
                rows, values = (traced[part] for part in slice_names(name))
                np.add.at(g, rows, values)
                gauge, terms = occurrences(batch, name, before, traced)
                gauge = np.maximum(gauge, np.abs(g))
                untouched = np.setdiff1d(np.arange(len(w)), rows)
                np.testing.assert_array_equal(after[name][untouched], before[name][untouched])
            else:
                g = traced[f"{name}_grad"].astype(np.float64)
                gauge = np.abs(g)
            root, width = 1.0, 1
            if kind != "sgd":
                h = before[moment_name(name)].astype(np.float64)
                squares, width = g**2, w.shape[-1]
                cross = np.abs(g) * gauge
                if h.ndim < w.ndim:
                    squares, cross = squares.mean(1), cross.mean(1)
                h = h + squares
                error = np.abs(after[moment_name(name)] - h)
                assert (error <= U * (2 * h + (width + 2) * squares + 2 * terms * cross)).all(), name
                root = np.sqrt(h) + eps
                root = root[:, None] if h.ndim < w.ndim else root
            step = rate * g / root
            error = np.abs(after[name] - (w - step))
            bound = U * (np.abs(w) + (terms + 8) * np.abs(step) + 2 * width * terms * rate * gauge / root)
            if kind == "sgd":
                bound = U * (terms + 4) * (np.abs(w) + rate * gauge)  # rounds the row at every occurrence
            assert (error <= bound).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_bits(kind):
    """Repeated rows included: nothing is added in an order that threads decide."""
    runs = []
    for _ in range(2):
        spec, model = make(kind)
        losses = [model.train_step(random_batch(spec, 3000, seed=9, number=number)) for number in range(3)]
        runs.append(snapshot(model) | {"losses": np.array(losses)})
    assert_same(*runs)


def test_read_only_and_strided_arrays_are_accepted():
    spec, model = make()
    batch = batch_of(spec)
    dense = np.repeat(batch.dense, 2, axis=0)[::-2]
    label = batch.label.copy()
    label.setflags(write=False)
    odd = Batch(dense, batch.indices, batch.lengths, label)
    straight = Batch(dense.copy(), batch.indices, batch.lengths, batch.label)
    np.testing.assert_array_equal(model.predict(odd), model.predict(straight))
    assert model.train_step(odd) > 0


def test_close_is_idempotent():
    _, model = make()
    model.close()
    model.close()
