"""The float64 reference against finite differences of its own forward pass, and against plain formulas."""

import itertools

import numpy as np
import pytest

from conformance.case import make_case
from spec import pooling
from spec.model import ModelSpec
from spec.parameters import initial_state, moment_name, state_shapes
from spec.reference import evaluate
from spec.rounding import C, Tracked, U, exact, fully_connected, near, recorded, relu, relu_gradient, summed
from spec.tensors import slice_names, trace_names
from spec.update import update

LOSSES = [{"kind": "mse"}, {"kind": "bce"}, {"kind": "bce", "clip": 0.45}, {"kind": "bce_logits"},
          {"kind": "wbce", "weights": [0.5, 3.0]}]
INTERACTIONS = [{"kind": "dot"}, {"kind": "dot", "self_interaction": True}, {"kind": "cat"}]


def small_spec(loss=None, interaction=None, activation="relu", optimizer="sgd"):
    tables = [{"rows": 5, "pooling": pooling, "lookups": [0, 4]}
              for pooling in ("sum", "mean", "weighted_fixed", "weighted_learned")]
    return ModelSpec.model_validate({
        "name": "small", "dense_features": 3, "embedding_dim": 4, "batch_size": 7,
        "bottom": {"widths": [6, 4], "activation": activation}, "top": {"widths": [5, 1], "activation": activation},
        "interaction": interaction or {"kind": "dot"}, "loss": loss or {"kind": "bce"}, "tables": tables,
        "optimizer": {"kind": optimizer, "learning_rate": 0.1}})


def dense_gradient(result, name, shape):
    """A parameter's whole gradient, also where it is kept as rows."""
    if name in result.rows:
        full = np.zeros(shape)
        full[result.rows[name].rows] = result.rows[name].gradient.value
        return full
    return result.tensors[f"{name}_grad"].value


@pytest.mark.parametrize(("loss", "interaction", "activation"), [
    *((loss, INTERACTIONS[0], "relu") for loss in LOSSES),
    *((LOSSES[1], interaction, "sigmoid") for interaction in INTERACTIONS)])
def test_gradients_are_finite_differences_of_the_loss(loss, interaction, activation):
    spec = small_spec(loss, interaction, activation)
    case = make_case(spec, steps=1, seed=3)
    batch = case.batches[0]
    wide = {name: value.astype(np.float64) for name, value in case.parameters.items()}
    result = evaluate(spec, wide, batch)
    step = 1e-6
    for name, value in wide.items():
        if name == "tables.2.pooling":  # fixed
            assert name not in result.rows
            continue
        gradient = dense_gradient(result, name, value.shape)
        for place in itertools.islice(np.ndindex(value.shape), 0, None, 3):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * step
                ends.append(float(evaluate(spec, wide | {name: moved}, batch, gradients=False).tensors["loss"].value))
            assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-9), (name, place)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_evaluation_holds_every_name_of_the_trace_and_no_other(loss, interaction):
    spec = small_spec(loss, interaction)
    case = make_case(spec, steps=1)
    result = evaluate(spec, case.parameters, case.batches[0])
    names = {*result.tensors, *(name for parameter in result.rows for name in slice_names(parameter))}
    assert names == set(trace_names(spec))
    forward = evaluate(spec, case.parameters, case.batches[0], gradients=False)
    assert not [name for name in forward.tensors if name.endswith("_grad")] and not forward.rows


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad"])
def test_updates_follow_the_written_rules(optimizer):
    spec = small_spec(optimizer=optimizer)
    case = make_case(spec, steps=1, seed=1)
    state = {name: np.full(shape, 0.25, np.float32) for name, shape in state_shapes(spec).items()}
    result = evaluate(spec, case.parameters, case.batches[0])
    rate, eps = float(np.float32(0.1)), float(np.float32(1e-10))
    updated = update(spec, case.parameters, state, result)
    assert {name for name in updated if not name.endswith(".moment")} == set(case.parameters) - {"tables.2.pooling"}
    assert {name for name in updated if name.endswith(".moment")} == set(state)
    for name, w in case.parameters.items():
        if name == "tables.2.pooling":
            continue
        g = dense_gradient(result, name, w.shape)
        touched = np.zeros(len(w), bool)
        touched[result.rows[name].rows if name in result.rows else slice(None)] = True
        if optimizer == "sgd":
            new = w - rate * g
        else:
            square = g**2
            if optimizer == "rowwise_adagrad" and name.startswith("tables.") and g.ndim == 2:
                square = square.mean(1)
            h = state[moment_name(name)] + square
            np.testing.assert_allclose(updated[moment_name(name)].new.value, h[touched], rtol=1e-14)
            new = w - rate * g / (np.sqrt(h[:, None] if h.ndim < w.ndim else h) + eps)
        np.testing.assert_allclose(updated[name].new.value, new[touched], rtol=1e-13, atol=1e-16)


def test_first_adagrad_step_of_an_undecided_sign_may_go_either_way():
    """From h = 0 the step is rate * sign(g); a gradient within reach of 0 must allow both."""
    spec = small_spec(optimizer="adagrad")
    case = make_case(spec, steps=1)
    result = evaluate(spec, case.parameters, case.batches[0])
    name = "top.1.bias"
    result.tensors[f"{name}_grad"] = Tracked(np.array([1e-9]), np.array([1e-8**2]))
    updated = update(spec, case.parameters, initial_state(spec), result)[name]
    assert updated.kinks == 1
    other_side = case.parameters[name] + 0.0999  # rate * sign, less what eps = 1e-10 takes off
    assert abs(other_side - updated.new.value) <= updated.new.reach
    assert updated.new.reach < 0.25


def test_fully_connected_variance_covers_float32_but_not_a_mistake():
    """200 random float32 products: the errors stay inside C sigma, and their size is that of sigma."""
    random = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        x, w, b = (random.standard_normal(shape).astype(np.float32) for shape in ((4, 300), (5, 300), (5,)))
        y = fully_connected(exact(x), w.astype(np.float64), b.astype(np.float64))
        running = b.copy()[None].repeat(4, 0)
        for k in range(300):  # one after the other: the worst order that an engine might use
            running += x[:, k, None] * w[None, :, k]
        worst = max(worst, float((np.abs(running - y.value) / y.reach).max()))
    assert 0.01 < worst < 1


def test_sum_of_one_sign_is_covered():
    """A running float32 sum of ReLU outputs errs like n^1.5, which n u^2 sum t^2 alone would not cover."""
    terms = (np.random.default_rng(1).random(20_000, np.float32) + 1).astype(np.float32)
    total = np.cumsum(terms, dtype=np.float32)[-1]
    exactly = terms.astype(np.float64).sum()
    squares = (terms.astype(np.float64) ** 2).sum()
    assert abs(total - exactly) <= C * np.sqrt(summed(len(terms) - 1, squares, exactly))


def test_relu_gradient_near_zero_takes_the_flipped_mask_in():
    z = Tracked(np.array([1e-8, -1e-8, 1.0, -1.0, 0.0]), np.array([1e-16, 1e-16, 1e-16, 1e-16, 0.0]))
    dy = Tracked(np.full(5, 3.0), np.zeros(5))
    assert near(z, 0).tolist() == [True, True, False, False, False]
    dz = relu_gradient(z, dy)
    assert dz.value.tolist() == [3.0, 0.0, 3.0, 0.0, 0.0]
    assert (dz.reach[:2] >= 3.0).all() and not dz.reach[2:].any()
    assert relu(z).reach[3] == 0


def test_equal_terms_of_a_bag_drift_and_the_bound_covers_it():
    """A running float32 sum of one row, again and again: its errors are all of one sign."""
    table = small_spec().tables[0]
    weight = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    indices = np.zeros(5000, np.int64)
    expected = pooling.forward(table, weight, None, indices, np.array([5000], np.int32))
    error = np.abs(np.add.accumulate(weight[indices], axis=0, dtype=np.float32)[-1] - expected.value[0])
    without = C * np.sqrt(summed(4999, 5000 * weight.astype(np.float64)**2, expected.value[0]))
    assert (error > without).any() and (error <= expected.reach[0]).all()
    distinct = pooling.forward(table, weight, None, np.arange(9), np.array([9], np.int32))
    independent = summed(8, (weight.astype(np.float64) ** 2).sum(0), distinct.value[0])
    assert np.allclose(distinct.variance, independent, rtol=1e-12)


def test_row_weights_may_be_summed_over_lookups_first():
    """Products that cancel in every lookup, of a row that one bag holds often: the sums over lookups drift apart."""
    table = small_spec().tables[0].model_copy(update={"pooling": "weighted_learned"})
    weight, pooling_weight = np.array([[1.3651, 1.4226]], np.float32), np.ones(1, np.float32)
    dy, times = np.array([[5.9990675, -5.7566]], np.float32), 1000
    _, learned = pooling.backward(table, weight, pooling_weight, np.zeros(times, np.int64),
                                  np.array([times], np.int32), recorded(dy))
    (expected,), (reach,) = learned.gradient.value, learned.gradient.reach
    sums = np.add.accumulate(np.repeat(dy, times, 0), axis=0, dtype=np.float32)[-1]
    products = np.add.accumulate(np.full(times, dy[0] @ weight[0]), dtype=np.float32)[-1]
    drifts_of_dots = U * times * abs(expected)
    assert drifts_of_dots < abs(sums @ weight[0] - expected) <= reach
    assert abs(products - expected) <= reach
