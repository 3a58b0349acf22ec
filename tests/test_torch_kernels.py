"""The compiled loops of dlrm_torch/kernels.py against NumPy in float64, at widths that fill no vector, one, or more."""

import numpy as np
import pytest
import torch

from dlrm_torch import kernels
from dlrm_torch.compiled import kernels_for
from dlrm_torch.lookups import Lookups
from dlrm_torch.loss import clip_and_weights, loss_and_gradient
from spec.model import Loss

WIDTHS = [1, 5, 16, 20, 64]


def random(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def close(found, expected):
    np.testing.assert_allclose(found.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def lookups(rng, tables, samples, rows, ragged, dtype):
    """Of `rows` rows each table; some of them many times, and of the bags some empty."""
    lengths = rng.integers(0, 5, (tables, samples)) if ragged else np.ones((tables, samples), int)
    its = np.concatenate([number * rows + rng.integers(0, rows, n.sum()) for number, n in enumerate(lengths)])
    its, lengths = torch.from_numpy(its).to(dtype), torch.from_numpy(lengths.flatten()).to(dtype)
    return Lookups(its, lengths if ragged else None), lengths


def bag_of(lengths):
    return torch.arange(len(lengths)).repeat_interleave(lengths.long())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ragged, dtype, factors, weights", [
    (False, torch.int64, False, False), (True, torch.int32, False, False), (True, torch.int64, True, True),
    (False, torch.int32, True, True)])
def test_rows_are_added_to(width, ragged, dtype, factors, weights, threads):
    rng = np.random.default_rng(width)
    tables, samples, rows = 3, 40, 11
    its, lengths = lookups(rng, tables, samples, rows, ragged, dtype)
    storage, row_weights = random(rng, tables * rows, width), random(rng, tables * rows) if weights else None
    factor = random(rng, tables * samples, 1) if factors else None
    whole = random(rng, samples, tables + 2, width)
    gradient_BGE = whole[:, 1:1 + tables]  # a part of what the interaction makes
    expected = storage.double().numpy()
    bags = gradient_BGE.double().transpose(0, 1).flatten(0, 1).numpy()
    for row, bag in zip(its.rows.tolist(), bag_of(lengths).tolist(), strict=True):
        scale = (factor[bag].item() if factors else 1) * (row_weights[row].item() if weights else 1)
        expected[row] += -0.1 * scale * bags[bag]
    kernels.add_to_rows(storage, its.rows, its.ends if ragged else None, factor, row_weights, gradient_BGE, -0.1)
    close(storage, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("ragged, dtype, factors, weights", [
    (False, torch.int64, False, False), (True, torch.int32, False, False), (True, torch.int64, True, True)])
def test_adagrad(width, rowwise, ragged, dtype, factors, weights, threads):
    rng = np.random.default_rng(width)
    tables, samples, rows = 2, 900, 700  # more distinct rows than one turn has
    its, lengths = lookups(rng, tables, samples, rows, ragged, dtype)
    storage, row_weights = random(rng, tables * rows, width), random(rng, tables * rows) if weights else None
    moment = random(rng, tables * rows, *([] if rowwise else [width])).square()
    factor = random(rng, tables * samples, 1) if factors else None
    gradient = random(rng, tables * samples, width)
    w, h, g = (x.double().numpy() for x in (storage, moment, torch.zeros_like(storage)))
    bags = (gradient if factor is None else gradient * factor).double().numpy()
    np.add.at(g, its.rows.numpy(), bags[bag_of(lengths)])
    if weights:
        g *= row_weights.double().numpy()[:, None]
    h = h + ((g**2).mean(1) if rowwise else g**2)
    root = np.sqrt(h) + 1e-3
    w = w - 0.1 * g / (root[:, None] if rowwise else root)
    untouched = np.setdiff1d(np.arange(tables * rows), its.rows.numpy())
    before = storage[untouched].clone()
    kernels.adagrad_rows(storage, moment, *its.transposed, factor, row_weights, gradient, 0.1, 1e-3)
    close(moment, h)
    close(storage, w)
    assert len(untouched) > 50 and torch.equal(storage[untouched], before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("vectors, itself", [(2, False), (5, True), (27, False)])
def test_dot_interaction(width, vectors, itself, threads):
    rng = np.random.default_rng(width + vectors)
    samples = 70  # several turns, the last one short
    pairs = [(i, j) for i in range(vectors) for j in range(i + 1 if itself else i)]
    columns = torch.zeros(vectors, vectors, dtype=torch.int64)
    for column, (i, j) in enumerate(pairs, width):
        columns[i, j] = columns[j, i] = column
    x = random(rng, samples, vectors, width)
    output = kernels.dot_products(x, columns, width + len(pairs))
    wide = x.double().requires_grad_()
    products = wide @ wide.transpose(1, 2)
    expected = torch.cat([wide[:, 0], *(products[:, i, j, None] for i, j in pairs)], 1)
    close(output, expected.detach())
    padded = random(rng, samples, width + len(pairs) + 3)
    (gradient,) = torch.autograd.grad(expected, wide, padded[:, :-3].double())
    close(kernels.dot_gradient(padded, x, columns), gradient)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("samples", [1, 64, 150])
def test_reversing_relu(width, samples, threads):
    rng = np.random.default_rng(width)
    y = random(rng, samples, width).relu_()
    y[0, 0] = np.nan
    wide = random(rng, samples, 3, width)
    gradient = wide[:, 1]
    before, expected = wide.clone(), torch.ops.aten.threshold_backward(gradient, y, 0)
    sums = kernels.reverse_relu(gradient, y)
    assert torch.equal(gradient, expected)
    assert torch.equal(wide[:, 0], before[:, 0]) and torch.equal(wide[:, 2], before[:, 2])
    close(sums, expected.double().sum(0))


@pytest.mark.parametrize("loss", [Loss(), Loss(clip=0.1), Loss(kind="wbce", weights=(0.3, 2.0)),
                                  Loss(kind="wbce", weights=(0.3, 2.0), clip=0.25)], ids=str)
def test_cross_entropy(loss, threads):
    rng = np.random.default_rng(0)
    samples = 9000  # three turns
    z = 4 * random(rng, samples, 1)
    z[:4, 0] = torch.tensor([-200., 200, -200, 200])  # saturated, with both labels
    p, label = z.sigmoid(), torch.from_numpy(rng.integers(0, 2, (samples, 1)).astype(np.float32))
    label[:4, 0] = torch.tensor([0., 0, 1, 1])
    p[4:8, 0] = torch.tensor([0.1, 0.9, 0.25, 0.75])  # at the bounds
    value, gradient = kernels.cross_entropy(p, label, *clip_and_weights(loss))
    expected, by_p = loss_and_gradient(loss, z, p, label)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.ops.aten.sigmoid_backward(by_p, p), rtol=2e-6, atol=0)
    p[0] = np.nan
    assert np.isnan(kernels.cross_entropy(p, label, *clip_and_weights(loss))[0])


def test_any_number_of_threads_makes_the_same_bits():
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        rng = np.random.default_rng(3)
        its, _ = lookups(rng, 1, 500, 20, True, torch.int32)  # one table: its rows are divided among the threads
        storage = random(rng, 20, 24)
        kernels.add_to_rows(storage, its.rows, its.ends, None, None, random(rng, 500, 1, 24), -0.1)
        made.append(storage)
    torch.set_num_threads(2)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_nothing_looked_up():
    storage = torch.ones(4, 8)
    its = Lookups(torch.zeros(0, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    kernels.add_to_rows(storage, its.rows, its.ends, None, None, torch.ones(3, 1, 8), -0.1)
    kernels.adagrad_rows(storage, torch.ones(4), *its.transposed, None, None, torch.ones(3, 8), 0.1, 1e-3)
    assert (storage == 1).all()


def test_what_the_loops_take():
    assert kernels_for(torch.zeros(1)) is kernels
    assert kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    assert kernels_for(torch.zeros(1, device="meta")) is None
