"""PyTorch's embedding bags against a loop over samples in float64."""

import numpy as np
import pytest
import torch

from dlrm_torch.embedding import EmbeddingBag
from spec.model import Table

ROWS, DIM = 6, 3
BAGS = {
    1: [[4], [0], [4], [5]],
    2: [[1, 1], [0, 5], [5, 1], [2, 2]],
    (0, 4): [[], [3, 3, 0], [], [5], [1, 2, 3, 3]],
}
EMPTY = [[], [], []]


def make(pooling, lookups):
    bag = EmbeddingBag(Table(rows=ROWS, pooling=pooling, lookups=lookups), DIM).double()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in bag.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    return bag


def tensors(bags):
    return (torch.tensor([row for bag in bags for row in bag], dtype=torch.int64),
            torch.tensor([len(bag) for bag in bags], dtype=torch.int32))


@pytest.mark.parametrize("bags, lookups", [(bags, lookups) for lookups, bags in BAGS.items()] + [(EMPTY, (0, 4))])
@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted_fixed", "weighted_learned"])
def test_pooling_and_its_gradient(pooling, bags, lookups):
    bag = make(pooling, lookups)
    weight = bag.weight.detach().numpy()
    factor = bag.pooling.detach().numpy() if pooling.startswith("weighted") else np.ones(ROWS)
    dy = np.random.default_rng(1).normal(size=(len(bags), DIM))
    y, dw, dfactor = np.zeros((len(bags), DIM)), np.zeros((ROWS, DIM)), np.zeros(ROWS)
    for sample, rows in enumerate(bags):
        scale = 1 / len(rows) if pooling == "mean" and rows else 1
        for row in rows:
            y[sample] += scale * factor[row] * weight[row]
            dw[row] += scale * factor[row] * dy[sample]
            dfactor[row] += dy[sample] @ weight[row]

    pooled = bag(*tensors(bags))
    np.testing.assert_allclose(pooled.detach().numpy(), y, rtol=1e-14, atol=1e-15)
    pooled.backward(torch.from_numpy(dy))
    assert bag.weight.grad.is_sparse
    np.testing.assert_allclose(bag.weight.grad.to_dense().numpy(), dw, rtol=1e-14, atol=1e-14)
    if pooling == "weighted_learned":
        assert bag.pooling.grad.is_sparse
        np.testing.assert_allclose(bag.pooling.grad.to_dense().numpy(), dfactor, rtol=1e-14, atol=1e-14)
    elif pooling == "weighted_fixed":
        assert bag.pooling.grad is None


def test_mean_multiplies_by_the_rounded_reciprocal():
    """In float32 x / 3 and x * (1 / 3) differ for some x; the spec wants the second."""
    bag = make("mean", 3).float()
    x = np.float32(5)
    with torch.no_grad():
        bag.weight.zero_()
        bag.weight[0] = float(x)
    assert x / np.float32(3) != x * (np.float32(1) / np.float32(3))
    pooled = bag(*tensors([[0, 1, 2]])).detach().numpy()
    assert (pooled == x * (np.float32(1) / np.float32(3))).all()
