"""The interaction's gradient with one product: that of the two, but for rounding."""

import numpy as np
import pytest

import dlrm_caffe2.backend as backends
from dlrm_caffe2.engine.one_product import one_product
from dlrm_caffe2.model import constants, predict_net, train_net
from dlrm_caffe2.net import outside_blobs
from spec import toml
from spec.data.random import random_batch
from spec.model import ModelSpec
from spec.parameters import initial_parameters, initial_state

ENGINES = [pytest.param(backends.CAFFE2, marks=pytest.mark.engine), backends.ATEN]
GRADIENTS = ["bottom.1.activation_grad", *(f"tables.{number}.pooled_grad" for number in range(4))]


def spec_of(kind: str, self_interaction: bool = False) -> ModelSpec:
    tiny = toml.load("tiny")
    interaction = tiny.interaction.model_copy(update={"kind": kind, "self_interaction": self_interaction})
    return tiny.model_copy(update={"interaction": interaction})


@pytest.mark.parametrize("self_interaction", [False, True])
@pytest.mark.parametrize("backend", ENGINES, ids=lambda backend: backend.name)
def test_the_gradients_are_those_of_two_products(backend, self_interaction):
    spec = spec_of("dot", self_interaction)
    batch = random_batch(spec, 20, seed=0, number=0)
    net = train_net(spec)
    changed, blobs = one_product(spec, net)
    assert set(changed.external_input) == {*net.external_input, *blobs} == {*outside_blobs(changed.op), *blobs}
    assert sum(operator.type == "BatchMatMul" for operator in changed.op) == 2
    assert not {"BatchGatherGradient", "ResizeLike"}.intersection(operator.type for operator in changed.op)
    found = {}
    for run in (net, changed):
        engine = backend.start("cpu")
        engine.feed(initial_parameters(spec) | initial_state(spec) | constants(spec) | batch.arrays() | blobs)
        engine.run_once(run)
        found[run is net] = engine.fetch(GRADIENTS)
        engine.close()
    for name in GRADIENTS:
        # A sum of 4 or 5 products in another order, each of about the size of the largest.
        tolerance = 16 * 2**-24 * np.abs(found[True][name]).max()
        np.testing.assert_allclose(found[False][name], found[True][name], rtol=0, atol=tolerance, err_msg=name)
        assert found[True][name].any()


@pytest.mark.parametrize(("kind", "make"), [("cat", train_net), ("dot", predict_net)])
def test_other_nets_stay_as_they_are(kind, make):
    net = make(spec_of(kind))
    assert one_product(spec_of(kind), net) == (net, {})


@pytest.mark.parametrize("backend", ENGINES, ids=lambda backend: backend.name)
def test_engines_train_with_it(backend, monkeypatch):
    spec, nets = spec_of("dot"), []
    model = backend.create(spec, initial_parameters(spec))
    create = type(model._engine).create
    monkeypatch.setattr(type(model._engine), "create", lambda self, net: nets.append(net) or create(self, net))
    model.train_step(random_batch(spec, 20, seed=0, number=0))
    model.close()
    (net,) = nets
    assert sum(operator.type == "BatchMatMul" for operator in net.op) == 2
