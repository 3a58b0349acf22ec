"""Tables of one lookup for each sample: gathered, and to the same bits as with bags."""

import numpy as np
import pytest

import dlrm_caffe2.backend as backends
from dlrm_caffe2.engine import aten, caffe2
from dlrm_caffe2.engine.one_hot import without_bags
from dlrm_caffe2.model import predict_net, train_net
from spec import toml
from spec.batch import Batch
from spec.data.random import random_batch
from spec.model import ModelSpec, Table
from spec.parameters import initial_parameters
from spec.tensors import batch_names

TABLES = (Table(rows=9, lookups=1), Table(rows=9, pooling="mean", lookups=1), Table(rows=9, lookups=2),
          Table(rows=9, pooling="weighted_learned", lookups=1), Table(rows=9, pooling="mean", lookups=(0, 3)))
ENGINES = [pytest.param("CAFFE2", marks=pytest.mark.engine), "ATEN"]


def spec_of(kind: str) -> ModelSpec:
    return toml.load("tiny").model_copy(update={"tables": TABLES}).with_optimizer(kind, 0.1)


def trained(backend: str, spec: ModelSpec, batch: Batch) -> dict[str, np.ndarray]:
    model = getattr(backends, backend).create(spec, initial_parameters(spec))
    try:
        losses = [np.float32(model.train_step(batch)) for _ in range(3)]
        return model.parameters() | model.optimizer_state() | {"losses": losses, "predicted": model.predict(batch)}
    finally:
        model.close()


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("backend", ENGINES)
def test_training_has_the_bits_that_it_has_with_bags(backend: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    spec, nets = spec_of(kind), []
    batch = random_batch(spec, 20, seed=0, number=0)  # 9 rows: some are looked up several times
    monkeypatch.setattr(aten, "without_bags", lambda net: nets.append(net) or net)
    monkeypatch.setattr(caffe2, "without_bags", lambda net: nets.append(net) or net)
    with_bags = trained(backend, spec, batch)
    assert len(nets) == 2
    monkeypatch.undo()
    for name, array in trained(backend, spec, batch).items():
        np.testing.assert_array_equal(array, with_bags[name], err_msg=name)


def test_no_bags_are_left_of_criteos_tables():
    spec = toml.load("criteo-kaggle").capped(9)
    for net in (predict_net(spec), train_net(spec)):
        found = without_bags(net)
        assert sum(operator.type == "Gather" for operator in found.op) == 26
        assert not [operator.type for operator in found.op if operator.type.startswith("SparseLengths")]
        assert not [name for name in found.external_input if name.endswith(".lengths")]
        assert (found.name, list(found.external_output)) == (net.name, list(net.external_output))
        assert set(net.external_input) - set(found.external_input) == {
            name for name in batch_names(spec) if name.endswith(".lengths")}
    assert len(train_net(spec).op) - len(without_bags(train_net(spec)).op) == 26


def test_other_tables_keep_theirs():
    spec = toml.load("tiny").model_copy(update={"tables": TABLES[2:]})
    net = train_net(spec)
    assert without_bags(net) == net
