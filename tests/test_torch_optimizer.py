"""The update rules against a loop in float64 NumPy, over several steps, with rows that occur more than once."""

import numpy as np
import pytest
import torch

from dlrm_torch.optimizer import Optimizer
from spec.model import ModelSpec
from spec.model import Optimizer as Rule
from spec.parameters import initial_parameters, is_sparse, state_shapes, trained_parameters
from spec.toml import load

STEPS = 4


def tiny(kind: str, eps: float = 1e-10) -> ModelSpec:
    return load("tiny").model_copy(update={"optimizer": Rule(kind=kind, learning_rate=0.1, eps=eps)})


def expected(kind, w, h, g, rate, eps, table):
    """One step of one parameter: w, h after it. g is the whole gradient, zero where no row was looked up."""
    if kind == "sgd":
        return w - rate * g, h
    if kind == "rowwise_adagrad" and table and w.ndim == 2:
        h = h + (g**2).sum(1) / w.shape[1]
        return w - rate * g / (np.sqrt(h) + eps)[:, None], h
    h = h + g**2
    return w - rate * g / (np.sqrt(h) + eps), h


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_rules(kind):
    spec = tiny(kind)
    spec = spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"eps": 0.5})})
    rate, eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
    rng = np.random.default_rng(0)
    arrays = {name: initial_parameters(spec)[name].astype(np.float64) for name in trained_parameters(spec)}
    parameters = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in arrays.items()}
    optimizer = Optimizer(spec, parameters)
    assert {name: tuple(h.shape) for name, h in optimizer.state.items()} == state_shapes(spec)
    state = {name: np.zeros(shape) for name, shape in state_shapes(spec).items()}
    moments = {name: state.get(f"{name}.moment") for name in arrays}

    for _ in range(STEPS):
        gradients = {}
        for name, w in arrays.items():
            g = rng.normal(size=w.shape)
            gradients[name] = torch.from_numpy(g)
            if is_sparse(name):
                rows = rng.integers(0, 7, size=12)  # of at least 20 rows: duplicates, and rows never seen
                values = rng.normal(size=(12, *w.shape[1:]))
                g = np.zeros_like(w)
                for row, value in zip(rows, values, strict=True):
                    g[row] += value
                gradients[name] = torch.sparse_coo_tensor(rows[None], values, w.shape, check_invariants=True)
            arrays[name], moments[name] = expected(kind, w, moments[name], g, rate, eps, is_sparse(name))
        optimizer.step(gradients)

    for name, w in arrays.items():
        np.testing.assert_allclose(parameters[name].detach().numpy(), w, rtol=1e-13, atol=1e-15, err_msg=name)
        if kind != "sgd":
            h = optimizer.state[f"{name}.moment"].numpy()
            np.testing.assert_allclose(h, moments[name], rtol=1e-13, err_msg=name)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_a_gradient_of_zero_changes_nothing(kind):
    """eps keeps 0 / 0 away: h is still 0 then."""
    spec = tiny(kind)
    parameters = {name: torch.ones(initial_parameters(spec)[name].shape) for name in trained_parameters(spec)}
    Optimizer(spec, parameters).step({name: torch.zeros_like(w) for name, w in parameters.items()})
    assert all((w == 1).all() for w in parameters.values())


def test_duplicates_are_summed_before_they_are_squared():
    """Two occurrences of g = 1: h is (1 + 1)^2, not 1 + 1; w falls by rate 2 / 2."""
    spec = tiny("adagrad")
    name = "tables.0.weight"
    w = torch.ones(40, 8, dtype=torch.float64)
    optimizer = Optimizer(spec, {name: w})
    optimizer.step({name: torch.sparse_coo_tensor([[3, 3]], torch.ones(2, 8, dtype=torch.float64), w.shape,
                                                  check_invariants=True)})
    assert (optimizer.state[f"{name}.moment"][3] == 4).all()
    np.testing.assert_allclose(w[3].numpy(), 1 - spec.optimizer.learning_rate, rtol=1e-7)
    assert (w[[2, 4]] == 1).all()


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
@pytest.mark.parametrize("columns", [8, 16], ids=["contiguous", "strided"])
def test_a_sparse_gradient_large_enough_for_several_threads(kind, columns):
    """PyTorch adds strided values to a table in another way, and refuses where the table requires a gradient."""
    spec = tiny(kind)
    spec = spec.model_copy(update={"tables": (spec.tables[0].model_copy(update={"rows": 5000}), *spec.tables[1:])})
    rng = np.random.default_rng(0)
    name, w = "tables.0.weight", rng.normal(size=(5000, 8))
    rows, values = rng.integers(0, 5000, size=30_000), rng.normal(size=(30_000, columns))[:, :8]
    g = np.zeros_like(w)
    np.add.at(g, rows, values)
    rate, eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
    new_w, _ = expected(kind, w, 0, g, rate, eps, table=True)

    parameter = torch.from_numpy(w).requires_grad_()
    gradient = torch.sparse_coo_tensor(torch.from_numpy(rows[None]), torch.from_numpy(values), w.shape,
                                       check_invariants=True)
    Optimizer(spec, {name: parameter}).step({name: gradient})
    np.testing.assert_allclose(parameter.detach().numpy(), new_w, rtol=1e-11, atol=1e-12)
