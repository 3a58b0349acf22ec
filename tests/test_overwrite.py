"""Operators that write over what nothing reads any more: the same bits, and no blob that anyone still needs is lost."""

from collections.abc import Sequence

import numpy as np
import pytest

import dlrm_caffe2.backend as backends
from dlrm_caffe2.engine import aten
from dlrm_caffe2.engine.overwrite import overwrite
from dlrm_caffe2.model import train_net
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import records
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec import toml
from spec.data.random import random_batch
from spec.parameters import initial_parameters

pytest.importorskip("torch")


def outputs(operators: Sequence[OperatorDef], wanted: Sequence[str] = ()) -> list[str]:
    net = NetDef(name="n", op=operators, external_input=["x"], external_output=wanted)
    return [operator.output[0] for operator in overwrite(net).op]


TWICE = make_operator("Scale", ["x"], ["y"], scale=2.0)
RELU = make_operator("Relu", ["y"], ["z"])


@pytest.mark.parametrize(("operators", "wanted", "expected"), [
    ([TWICE, RELU], [], ["y", "y"]),
    ([TWICE, RELU, make_operator("Flatten", ["z"], ["f"]), make_operator("Sigmoid", ["f"], ["s"])], ["s"],
     ["y", "y", "y", "s"]),
    ([TWICE, RELU, make_operator("ReluGradient", ["z", "z"], ["g"])], [], ["y", "y", "g"]),
    ([TWICE, RELU, make_operator("Copy", ["y"], ["c"])], [], ["y", "z", "c"]),
    ([TWICE, RELU], ["y"], ["y", "z"]),
    ([TWICE, RELU], ["z"], ["y", "z"]),
    ([make_operator("Relu", ["x"], ["z"])], [], ["z"]),
    ([TWICE, RELU, make_operator("Sum", ["z", "z"], ["z"])], [], ["y", "z", "z"]),
    ([TWICE, TWICE, RELU], [], ["y", "y", "z"]),
    ([TWICE, make_operator("Copy", ["y"], ["z"])], [], ["y", "z"]),
], ids=["dead", "a chain", "read twice by one", "read later", "its input is wanted", "its output is wanted",
        "from outside", "its output is written again", "its input is written again", "another kernel"])
def test_what_is_written_over(operators, wanted, expected):
    assert outputs(operators, wanted) == expected


def test_a_step_has_the_bits_that_it_has_without(monkeypatch):
    spec = toml.load("tiny")
    batch = random_batch(spec, 20, seed=0, number=0)

    def trained() -> dict[str, np.ndarray]:
        model = backends.ATEN.create(spec, initial_parameters(spec))
        losses = [np.float32(model.train_step(batch)) for _ in range(3)]
        predicted = model.predict(batch)
        return model.parameters() | {"losses": losses, "predicted": predicted}

    found = trained()
    left_alone = []
    monkeypatch.setattr(aten, "overwrite", lambda net: left_alone.append(net) or net)
    expected = trained()
    assert len(left_alone) == 2
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    net = left_alone[0]
    assert [op.output[0] for op in overwrite(net).op if op.type == "Relu"] == [
        op.input[0] for op in net.op if op.type == "Relu"]


def test_every_kernel_that_may_is_known():
    """A kernel that is added here is to be added to the chains above and to `test_kernels_do`."""
    assert {type: operator.overwrites for type, operator in records().items() if operator.overwrites is not None} == {
        "Relu": 0, "Sigmoid": 0, "Flatten": 0, "ReluGradient": 1}


@pytest.mark.parametrize(("type", "position"), [("Relu", 0), ("Sigmoid", 0), ("Flatten", 0), ("ReluGradient", 1)])
def test_kernels_do(type, position):
    """The blob's memory is the input's, and holds what another blob would."""
    inputs = {f"x{number}": np.random.default_rng(number).normal(size=(3, 4, 5)).astype(np.float32)
              for number in range(position + 1)}
    engine = aten.AtenEngine()
    engine.feed(inputs)
    engine.run_once(NetDef(name="n", op=[make_operator(type, list(inputs), ["y"])]))
    place = engine._blobs[f"x{position}"].data_ptr()
    engine.run_once(NetDef(name="n", op=[make_operator(type, list(inputs), [f"x{position}"])]))
    assert engine._blobs[f"x{position}"].data_ptr() == place
    found = engine.fetch(["y", f"x{position}"])
    np.testing.assert_array_equal(found["y"], found[f"x{position}"])
    for number in range(position):
        np.testing.assert_array_equal(engine.fetch([f"x{number}"])[f"x{number}"], inputs[f"x{number}"])


def test_the_train_net_of_a_model_is_left_as_it_is():
    net = train_net(toml.load("tiny"))
    before = net.SerializeToString()
    overwrite(net)
    assert net.SerializeToString() == before
