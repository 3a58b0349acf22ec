"""Nets that genuine Caffe2 runs in stages."""

from collections import Counter
from itertools import combinations

import pytest

from dlrm_caffe2.engine.stages import stages
from dlrm_caffe2.model import predict_net, train_net
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.toml import load


def nets():
    for preset, optimizer in (("tiny", "adagrad"), ("paper-benchmark", "sgd"), ("rmc2", "rowwise_adagrad")):
        spec = load(preset).with_optimizer(optimizer, 0.1)
        yield predict_net(spec)
        yield train_net(spec)
        yield train_net(spec, dict.fromkeys(range(len(spec.tables)), 3))


@pytest.mark.parametrize("net", list(nets()), ids=lambda net: net.name)
def test_no_operator_overtakes_one_that_it_depends_on(net):
    order = [operator.SerializeToString() for stage in stages(net) for operator in stage.op]
    assert sorted(order) == sorted(operator.SerializeToString() for operator in net.op)
    place = {operator: number for number, operator in enumerate(order)}
    assert len(place) == len(order)
    conflicts = 0
    for first, second in combinations(net.op, 2):
        reads, writes = set(second.input), set(second.output)
        if writes & {*first.input, *first.output} or reads & set(first.output):
            conflicts += 1
            assert place[first.SerializeToString()] < place[second.SerializeToString()]
    assert conflicts


@pytest.mark.parametrize("net", list(nets()), ids=lambda net: net.name)
def test_products_and_operators_on_tables_are_kept_apart(net):
    parts = stages(net)
    assert [part.type for part in parts] == ["dag", "", "dag", ""][:len(parts)]
    for part in parts:
        types = {operator.type for operator in part.op}
        assert part.type or not any(type.startswith(("Sparse", "Scatter", "RowWise")) for type in types)
        assert not part.type or not types & {"FC", "FCGradient", "BatchMatMul"}


def test_a_training_step_of_sorted_lookups_has_three_stages():
    spec = load("paper-benchmark")
    lookups, products, updates = stages(train_net(spec, dict.fromkeys(range(8), 7)))
    counts = Counter(operator.type for operator in lookups.op)
    assert counts["Split"] == 4 * 8 and counts["SparseLengthsSum"] == 8 + 8  # the first blocks' rows are read ahead
    assert Counter(operator.type for operator in updates.op) == {
        "SparseLengthsSum": 8 * (7 + 6), "ScatterWeightedSum": 8 * 7}
    assert "FCGradient" in {operator.type for operator in products.op}


def test_what_is_read_is_not_overwritten_before():
    """The update has no need to wait for the product but that it reads the table."""
    net = NetDef(name="n", type="dag", op=[
        make_operator("FC", ["x", "w", "b"], ["y"]),
        make_operator("ScatterWeightedSum", ["w", "one", "rows", "g", "one"], ["w"])])
    assert [[operator.type for operator in part.op] for part in stages(net)] == [["FC"], ["ScatterWeightedSum"]]


def test_a_net_of_another_type_stays_whole():
    net = NetDef(name="n", op=[make_operator("FC", ["x", "w", "b"], ["y"])])
    assert stages(net) == [net]
