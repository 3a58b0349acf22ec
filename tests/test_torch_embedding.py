"""PyTorch's embedding bags against a loop over samples in float64, and the storage that the tables share."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from dlrm_torch.embedding import EmbeddingBags
from dlrm_torch.lookups import Lookups
from spec.model import Table

POOLINGS = ["sum", "mean", "weighted_fixed", "weighted_learned"]
BAGS = {
    1: [[4], [0], [4], [5]],
    2: [[1, 1], [0, 5], [5, 1], [2, 2]],
    (0, 4): [[], [3, 3, 0], [], [1, 2, 3, 3]],
}
EMPTY = [[], [], [], []]
SAMPLES, ROWS = 4, 6


def make(*tables, dim=3):
    """The tables with random parameters, float64. Each table is (pooling, lookups)."""
    bags = EmbeddingBags([Table(rows=ROWS, pooling=pooling, lookups=lookups) for pooling, lookups in tables], dim)
    bags = bags.double()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in bags.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    return bags


def tensors(*tables):
    """indices and lengths of each table, given its bags."""
    return ([torch.tensor([row for bag in bags for row in bag], dtype=torch.int64) for bags in tables],
            [torch.tensor([len(bag) for bag in bags], dtype=torch.int32) for bags in tables])


def check(bags, tables):
    """`bags` pool the bags in `tables`, and pass gradients back, as a loop does."""
    rng = np.random.default_rng(1)
    dim = bags[0].weight.shape[1]
    pooled = bags(*tensors(*tables))
    dys = [rng.normal(size=(len(its), dim)) for its in tables]
    torch.autograd.backward(pooled, [torch.from_numpy(dy) for dy in dys])
    for bag, its, got, dy in zip(bags, tables, pooled, dys, strict=True):
        weight, pooling = bag.weight.detach().numpy(), bag.table.pooling
        factor = bag.pooling.detach().numpy() if bag.table.weighted else np.ones(len(weight))
        y, dw, dfactor = np.zeros_like(dy), np.zeros_like(weight), np.zeros(len(weight))
        for sample, rows in enumerate(its):
            scale = 1 / len(rows) if pooling == "mean" and rows else 1
            for row in rows:
                y[sample] += scale * factor[row] * weight[row]
                dw[row] += scale * factor[row] * dy[sample]
                dfactor[row] += dy[sample] @ weight[row]
        np.testing.assert_allclose(got.detach().numpy(), y, rtol=1e-14, atol=1e-15)
        if bag.weight.requires_grad:
            grad = bag.weight.grad
            assert grad.is_sparse and sorted({row for rows in its for row in rows}) == grad._indices()[0].tolist()
            np.testing.assert_allclose(grad.to_dense().numpy(), dw, rtol=1e-14, atol=1e-14)
        else:
            assert bag.weight.grad is None
        if pooling == "weighted_learned":
            np.testing.assert_allclose(bag.pooling.grad.to_dense().numpy(), dfactor, rtol=1e-14, atol=1e-14)
        elif pooling == "weighted_fixed":
            assert bag.pooling.grad is None


@pytest.mark.parametrize("its, lookups", [(its, lookups) for lookups, its in BAGS.items()] + [(EMPTY, (0, 4))])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_and_its_gradient(pooling, its, lookups):
    check(make((pooling, lookups)), [its])


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("backwards", [False, True])
def test_tables_of_every_kind_side_by_side(dim, backwards):
    kinds = [(pooling, lookups) for pooling in POOLINGS for lookups in BAGS][::-1 if backwards else 1]
    check(make(*kinds, dim=dim), [BAGS[lookups] for _, lookups in kinds])


def test_tables_of_one_row_in_a_batch_of_one():
    tables = [Table(rows=1), Table(rows=1, lookups=3), Table(rows=1, lookups=(0, 2))]
    bags = EmbeddingBags(tables, 2).double()
    for bag in bags:
        bag.weight.data.fill_(0.7)
    check(bags, [[[0]], [[0, 0, 0]], [[]]])


def test_a_frozen_table_gets_no_gradient_beside_one_that_does():
    bags = make(("sum", 1), ("sum", 1), ("sum", 2))
    bags[0].weight.requires_grad_(False)
    check(bags, [BAGS[1], BAGS[1], BAGS[2]])


def test_mean_multiplies_by_the_rounded_reciprocal():
    """In float32 x / 3 and x * (1 / 3) differ for some x; the spec wants the second."""
    bags = make(("mean", 3)).float()
    x = np.float32(5)
    with torch.no_grad():
        bags[0].weight.zero_()
        bags[0].weight[0] = float(x)
    assert x / np.float32(3) != x * (np.float32(1) / np.float32(3))
    (pooled,) = bags(*tensors([[0, 1, 2]]))
    assert (pooled.detach().numpy() == x * (np.float32(1) / np.float32(3))).all()


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_of_a_row_gradient_are_its_parts(block):
    lookups = Lookups(torch.tensor([5, 2, 2, 0, 5, 5, 9]), torch.tensor([3, 0, 4]))
    gradient = torch.tensor([[1.0], [7.0], [10.0]])
    blocks = list(lookups.row_gradient_blocks(gradient, block))
    assert all(len(part.rows) <= block for part in blocks)
    assert torch.cat([part.rows for part in blocks]).tolist() == [0, 2, 5, 9]
    assert torch.cat([part.values for part in blocks]).tolist() == [[10.0], [2.0], [21.0], [10.0]]


def moved(bags):
    return bags.float().double()


def reloaded(bags):
    bags.load_state_dict({name: x.clone() for name, x in bags.state_dict().items()}, assign=True)
    return bags


def transposed(bags):
    """Memory that lies column by column."""
    for bag in bags:
        bag.weight.data = bag.weight.detach().T.contiguous().T
    return bags


def size(bags):
    """Bytes of the parameters; the storage once for each of the 160 tables would be far more."""
    return sum(x.numel() * x.element_size() for x in bags.parameters())


def saved(bags):
    file = io.BytesIO()
    torch.save(bags.state_dict(), file)
    assert file.tell() < 10 * size(bags)
    file.seek(0)
    bags.load_state_dict(torch.load(file))
    return bags


def pickled(bags):
    data = pickle.dumps(bags)
    assert len(data) < 10 * size(bags)
    return pickle.loads(data)


@pytest.mark.parametrize("change", [moved, reloaded, transposed, saved, pickled, copy.deepcopy])
def test_tables_share_one_storage_again_whatever_was_done_to_them(change):
    kinds = [("sum", 1), ("weighted_learned", 2), ("weighted_fixed", 1), ("mean", (0, 4))] * 40
    bags = change(make(*kinds))
    check(bags, [BAGS[lookups] for _, lookups in kinds])
    for name in ("weight", "pooling"):
        whole = bags.shared(name)
        parts = [(number, getattr(bag, name)) for number, bag in enumerate(bags) if hasattr(bag, name)]
        for number, part in parts:
            whole[number * ROWS] = number
            assert (part[0] == number).all() and part.data_ptr() == whole[number * ROWS].data_ptr()


def test_a_table_of_one_row_with_odd_strides_finds_its_place():
    bags = EmbeddingBags([Table(rows=1), Table(rows=2), Table(rows=1)], 3).double()
    for number, bag in enumerate(bags):
        bag.weight.data = torch.full((3, bag.table.rows), float(number), dtype=torch.float64).T
    check(bags, [[[0]], [[1]], [[0]]])
    assert bags.shared("weight")[:, 0].tolist() == [0, 1, 1, 2]


def test_tables_that_moved_can_be_trained_whoever_looks_first():
    bags = moved(make(("sum", 1), ("sum", 2)))
    with torch.inference_mode():
        bags.shared("weight")
    assert not any(parameter.is_inference() for parameter in bags.parameters())


def test_a_copy_shares_nothing_with_its_original():
    bags = make(("sum", 1), ("sum", 2))
    twin = copy.deepcopy(bags)
    twin.shared("weight").zero_()
    assert all((bag.weight != 0).any() for bag in bags)
