"""Lookups sorted while a batch is loaded, and the train net that is fed with them."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.case import make_case
from conformance.run import run_case
from dlrm_caffe2 import backend as backends
from dlrm_caffe2.check import check_net
from dlrm_caffe2.engine import caffe2
from dlrm_caffe2.model import train_net
from dlrm_caffe2.presorted import sorted_lookups
from spec.batch import Batch
from spec.data.random import random_batch
from spec.model import Table
from spec.parameters import initial_parameters
from spec.toml import load
from tools.bench.operators import unmapped

ADAGRADS = ["adagrad", "rowwise_adagrad"]


def sort(spec, batch, blocks=1):
    with ThreadPoolExecutor(2) as threads:
        return sorted_lookups(spec, batch, dict.fromkeys(range(len(spec.tables)), blocks), threads)


def spec_of(*tables):
    return load("tiny").model_copy(update={"tables": tables})


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=8), st.integers(1, 4))
def test_every_row_gets_its_own_lookups(bags, blocks):
    spec = spec_of(Table(rows=2**31, lookups=(0, 5)), Table(rows=2**31, lookups=(0, 5), pooling="mean"))
    indices = np.array([index for bag in bags for index in bag], np.int64)
    lengths = np.array([len(bag) for bag in bags], np.int32)
    samples = np.repeat(np.arange(len(bags)), lengths)
    batch = Batch(np.zeros((len(bags), spec.dense_features), np.float32), (indices,) * 2, (lengths,) * 2,
                  np.zeros((len(bags), 1), np.float32))
    blobs = sort(spec, batch, blocks)

    rows, counts, order = (blobs[f"tables.1.indices.{part}"] for part in ("unique", "counts", "order"))
    ends = np.cumsum(counts)
    np.testing.assert_array_equal(rows, np.unique(indices))
    assert len(order) == len(indices) == (ends[-1] if len(ends) else 0)
    for row, places in zip(rows, np.split(order, ends[:-1]), strict=False):
        np.testing.assert_array_equal(places, np.flatnonzero(indices == row))
    np.testing.assert_array_equal(blobs["tables.0.indices.samples"], samples[order])
    assert [blobs[f"tables.1.indices.{part}"].dtype for part in ("unique", "counts", "order")] == [
        np.int64, np.int32, np.int32]

    parts = {"unique", "counts"} | ({"block_rows", "block_lookups"} if blocks > 1 else set())
    assert set(blobs) == {f"tables.0.indices.{part}" for part in (*parts, "samples")} | {
        f"tables.1.indices.{part}" for part in (*parts, "order")}
    if blocks > 1:
        sizes, lookups = (blobs[f"tables.1.indices.{part}"] for part in ("block_rows", "block_lookups"))
        assert len(sizes) == blocks and max(sizes) == -(-len(rows) // blocks) and sum(sizes) == len(rows)
        np.testing.assert_array_equal(lookups, [part.sum() for part in np.split(counts, np.cumsum(sizes)[:-1])])


@pytest.mark.parametrize("kind", ["sgd", *ADAGRADS])
def test_the_net_reads_the_sorted_lookups_and_sorts_nothing(kind):
    spec = load("tiny").with_optimizer(kind, 0.1)
    net = train_net(spec, dict.fromkeys(range(len(spec.tables)), 2))
    check_net(net, net.external_input)
    assert set(sort(spec, random_batch(spec, 4, seed=0, number=0), blocks=2)) == {
        blob for blob in net.external_input if ".indices." in blob}
    types = {operator.type for operator in net.op}
    assert not types & {"Unique", "UnsortedSegmentSum", "SparseLengthsIndicesInGradientSumGradient"}
    assert net.external_output == train_net(spec).external_output


@pytest.mark.parametrize("kind", ["sgd", *ADAGRADS])
def test_distinct_rows_are_promised_of_the_sorted_tables_alone(kind):
    """A promise that is broken would lose updates in ONNX."""
    spec = spec_of(*(Table(rows=9, pooling="weighted_learned", lookups=2) for _ in range(2))).with_optimizer(kind, 0.1)
    promised = {operator.output[0] for operator in train_net(spec, {1: 2}).op
                if any(argument.name == "distinct_rows" and argument.i for argument in operator.arg)}
    assert promised == {"tables.1.weight", "tables.1.pooling"}


@pytest.mark.parametrize(("backend", "sorted_tables"), [
    ("ATEN", {}), ("ONNX", {0: 1, 1: 1}), pytest.param("CAFFE2", {1: 1}, marks=pytest.mark.engine)])
def test_sgd_needs_no_sorting_but_some_engines_are_faster_with_it(backend, sorted_tables, monkeypatch):
    calls = []
    monkeypatch.setattr(backends, "sorted_lookups", lambda *given: calls.append(given) or sorted_lookups(*given))
    spec = spec_of(Table(rows=9, lookups=1), Table(rows=9, lookups=(1, 3)))
    model = getattr(backends, backend).create(spec, initial_parameters(spec))
    model.train_step(random_batch(spec, 4, seed=0, number=0))
    model.close()
    assert [blocks for _, _, blocks, _ in calls] == [sorted_tables]


@pytest.mark.parametrize("backend", [pytest.param("CAFFE2", marks=pytest.mark.engine), "ATEN", "ONNX"])
def test_the_net_that_sorts_by_itself_conforms_too(backend, monkeypatch):
    """What train_net.pb and train.onnx hold."""
    monkeypatch.setattr(backends, "train_net", lambda spec, presorted: train_net(spec))
    spec = spec_of(*(Table(rows=3, pooling=pooling, lookups=(0, 9)) for pooling in (
        "sum", "mean", "weighted_fixed", "weighted_learned")))
    (result,) = run_case(make_case(spec, steps=3, optimizers=["sgd", *ADAGRADS]), [getattr(backends, backend)]).backends
    assert result.status == "conforms", (result.reason, result.worst)


@pytest.mark.engine
def test_large_sums_are_made_in_blocks(monkeypatch):
    """Of some of them a batch may have no row."""
    monkeypatch.setattr(caffe2, "BLOCK_BYTES", 64)
    spec = spec_of(*(Table(rows=30, pooling=pooling, lookups=(0, 9)) for pooling in (
        "sum", "mean", "weighted_fixed", "weighted_learned")))
    case = make_case(spec, batch_size=4, steps=3, optimizers=["sgd", *ADAGRADS])
    (result,) = run_case(case, [backends.CAFFE2], repeats=True).backends
    assert result.status == "conforms", (result.reason, result.worst)


@pytest.mark.parametrize(("kind", "fetched"), [("sgd", 1), ("rowwise_adagrad", 1), ("adagrad", 0)])
def test_the_blocks_of_a_table_are_updated_one_after_another(kind, fetched):
    """Each operator depends on the one before: nothing is left to schedule. SparseAdagrad fetches rows ahead itself."""
    spec = spec_of(Table(rows=9, lookups=2), Table(rows=9, lookups=2)).with_optimizer(kind, 0.1)
    net = train_net(spec, {0: 3, 1: 3})
    first = max(number for number, operator in enumerate(net.op) if operator.type.endswith("Gradient")) + 1
    chain = [operator for operator in net.op[first:] if "tables.0.weight" in str(operator)]
    assert len(chain) == 3 * (2 + fetched)
    for before, after in pairwise(chain):
        assert set(before.output) & set(after.input) or {*before.input, *before.output} & set(after.output)


@pytest.mark.engine
def test_the_profile_knows_what_the_operators_on_blocks_are_for(monkeypatch):
    monkeypatch.setattr(caffe2, "BLOCK_BYTES", 64)
    spec = spec_of(Table(rows=30, lookups=(0, 9))).with_optimizer("rowwise_adagrad", 0.1)
    model = backends.CAFFE2.create(spec, initial_parameters(spec))
    batch = random_batch(spec, 4, seed=0, number=0)
    model.train_step(batch)
    keys = model.profile(batch).keys()
    model.close()
    assert {"embedding/Split", "optimizer/SparseLengthsSum", "optimizer/DotProduct", "SparseLengthsSum"} <= keys
    assert not unmapped(dict.fromkeys(keys, 0.0))
