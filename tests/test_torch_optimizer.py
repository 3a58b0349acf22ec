"""The update rules against a loop in float64 NumPy, over several steps, with rows that occur more than once."""

import numpy as np
import pytest
import torch

from dlrm_torch import optimizer
from dlrm_torch.model import DLRM
from dlrm_torch.optimizer import Optimizer
from spec.model import ModelSpec, Table
from spec.model import Optimizer as Rule
from spec.parameters import initial_parameters, is_sparse, state_shapes, trained_parameters
from spec.toml import load

STEPS = 4
KINDS = ["sgd", "adagrad", "rowwise_adagrad"]


def tiny(kind: str, eps: float = 1e-10, **changes) -> ModelSpec:
    return load("tiny").model_copy(update={"optimizer": Rule(kind=kind, learning_rate=0.1, eps=eps), **changes})


def make(spec: ModelSpec) -> tuple[DLRM, dict[str, np.ndarray]]:
    model = DLRM(spec).double()
    arrays = {name: array.astype(np.float64) for name, array in initial_parameters(spec).items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model, arrays


def expected(kind, w, h, g, rate, eps, table):
    """One step of one parameter: w, h after it. g is the whole gradient, zero where no row was looked up."""
    if kind == "sgd":
        return w - rate * g, h
    if kind == "rowwise_adagrad" and table and w.ndim == 2:
        h = h + (g**2).sum(1) / w.shape[1]
        return w - rate * g / (np.sqrt(h) + eps)[:, None], h
    h = h + g**2
    return w - rate * g / (np.sqrt(h) + eps), h


def random_lookups(spec, samples, rng):
    """For each table rows among its first 7, so that they repeat, and lengths."""
    lengths = [np.full(samples, table.fixed_lookups) if table.fixed_lookups else rng.integers(0, 5, samples)
               for table in spec.tables]
    return [rng.integers(0, min(7, table.rows), its.sum())
            for table, its in zip(spec.tables, lengths, strict=True)], lengths


def table_gradients(spec, arrays, indices, lengths, pooled_gradients):
    """The whole gradient of each trained parameter of the tables, lookup by lookup."""
    gradients = {}
    for number, table in enumerate(spec.tables):
        weight, pooling = f"tables.{number}.weight", f"tables.{number}.pooling"
        factor = arrays[pooling] if table.weighted else np.ones(table.rows)
        gradients[weight], learned = np.zeros_like(arrays[weight]), np.zeros(table.rows)
        sample_of = np.repeat(np.arange(len(lengths[number])), lengths[number])
        for row, sample in zip(indices[number], sample_of, strict=True):
            dy = pooled_gradients[number][sample]
            scale = 1 / lengths[number][sample] if table.pooling == "mean" else 1
            gradients[weight][row] += scale * factor[row] * dy
            learned[row] += dy @ arrays[weight][row]
        if table.pooling == "weighted_learned":
            gradients[pooling] = learned
    return gradients


def step(made, model, dense_gradients, indices, lengths, pooled_gradients):
    lookups = model.tables.lookups([torch.from_numpy(its) for its in indices],
                                   [torch.from_numpy(its.astype(np.int32)) for its in lengths])
    grouped = [torch.from_numpy(np.stack([pooled_gradients[number] for number in group.tables], 1))
               for group in model.tables.groups]
    made.step([torch.from_numpy(g) for g in dense_gradients], lookups, grouped)


@pytest.mark.parametrize("kind", KINDS)
def test_rules(kind, monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK_BYTES", 3 * 8 * 8)  # three rows of tiny's tables: several blocks
    tables = [Table(rows=9, pooling=pooling, lookups=lookups)
              for pooling in ("sum", "mean", "weighted_fixed", "weighted_learned") for lookups in (1, 3, (0, 4))]
    spec = tiny(kind, eps=0.5, tables=tuple(tables))
    rate, eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
    rng = np.random.default_rng(0)
    model, arrays = make(spec)
    made = Optimizer(model)
    assert {name: tuple(h.shape) for name, h in made.state.items()} == state_shapes(spec)
    state = {name: np.zeros(shape) for name, shape in state_shapes(spec).items()}

    for _ in range(STEPS):
        indices, lengths = random_lookups(spec, 5, rng)
        pooled_gradients = [rng.normal(size=(5, spec.embedding_dim)) for _ in tables]
        gradients = {name: rng.normal(size=arrays[name].shape) for name in made.dense}
        step(made, model, list(gradients.values()), indices, lengths, pooled_gradients)
        gradients |= table_gradients(spec, arrays, indices, lengths, pooled_gradients)
        assert set(gradients) == set(trained_parameters(spec))
        for name, g in gradients.items():
            h = state.get(f"{name}.moment")
            arrays[name], state[f"{name}.moment"] = expected(kind, arrays[name], h, g, rate, eps, is_sparse(name))

    for name, parameter in model.state_dict().items():
        np.testing.assert_allclose(parameter.numpy(), arrays[name], rtol=1e-12, atol=1e-14, err_msg=name)
    for name, h in made.state.items():
        np.testing.assert_allclose(h.numpy(), state[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_zero_changes_nothing(kind):
    """eps keeps 0 / 0 away: h is still 0 then."""
    spec = tiny(kind)
    model, arrays = make(spec)
    made, rng = Optimizer(model), np.random.default_rng(0)
    step(made, model, [np.zeros_like(arrays[name]) for name in made.dense], *random_lookups(spec, 5, rng),
         [np.zeros((5, spec.embedding_dim)) for _ in spec.tables])
    for name, parameter in model.state_dict().items():
        np.testing.assert_array_equal(parameter.numpy(), arrays[name])


def test_duplicates_are_summed_before_they_are_squared():
    """Two occurrences of g = 1: h is (1 + 1)^2, not 1 + 1; w falls by rate 2 / 2. No other row changes."""
    spec = tiny("adagrad", tables=(Table(rows=40),))
    model, arrays = make(spec)
    made = Optimizer(model)
    step(made, model, [np.zeros_like(arrays[name]) for name in made.dense], [np.array([3, 3])], [np.array([1, 1])],
         [np.ones((2, spec.embedding_dim))])
    name = "tables.0.weight"
    h, w = made.state[f"{name}.moment"].numpy(), model.tables[0].weight.detach().numpy()
    assert (h[3] == 4).all() and (np.delete(h, 3, 0) == 0).all()
    np.testing.assert_allclose(w[3], arrays[name][3] - spec.optimizer.learning_rate, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(w, 3, 0), np.delete(arrays[name], 3, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_large_enough_for_several_threads_and_blocks_gives_the_same_bits_again(kind):
    spec = tiny(kind, tables=(Table(rows=30_000, lookups=(0, 40)), Table(rows=20_000), Table(rows=3)))
    rng = np.random.default_rng(0)
    lengths = [rng.integers(0, 40, 2048), np.ones(2048, np.int64), np.ones(2048, np.int64)]
    indices = [rng.integers(0, table.rows, its.sum()) for table, its in zip(spec.tables, lengths, strict=True)]
    pooled_gradients = [rng.normal(size=(2048, spec.embedding_dim)) for _ in spec.tables]
    results = []
    for _ in range(2):
        model, arrays = make(spec)
        made = Optimizer(model)
        step(made, model, [np.zeros_like(arrays[name]) for name in made.dense], indices, lengths, pooled_gradients)
        results.append({name: x.numpy() for name, x in (model.state_dict() | made.state).items()})
    rate, eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
    for name, g in table_gradients(spec, arrays, indices, lengths, pooled_gradients).items():
        w, _ = expected(kind, arrays[name], 0.0, g, rate, eps, table=True)
        np.testing.assert_allclose(results[0][name], w, rtol=1e-10, atol=1e-11)
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name], err_msg=name)
