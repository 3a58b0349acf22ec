"""What stands for slow operators of genuine Caffe2 (`dlrm_caffe2/engine/faster.py`), held against them."""

import numpy as np
import pytest

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.toml import load

pytestmark = pytest.mark.engine


def test_the_faster_gradient_is_that_of_relu_gradient(caffe2_engine):
    """Bit by bit, at and beside the kink and for gradients without bounds."""
    extremes = np.array([0, -0.0, 1e-45, 1, np.inf, -np.inf, np.nan, -1e30], np.float32)
    y, dy = (each.ravel() for each in np.meshgrid(np.array([0, -0.0, 1e-45, 1e-38, 1, np.inf], np.float32), extremes))
    net = NetDef(name="slow", op=[make_operator("ReluGradient", ["y", "dy"], ["dx"])])
    fast = caffe2_engine.faster(load("tiny"), net)
    assert [operator.type for operator in (*net.op, *fast.op)] == ["ReluGradient", "ATen"]
    found = []
    for each in (net, fast):
        caffe2_engine.feed({"y": y, "dy": dy})
        caffe2_engine.run_once(each)
        found.append(caffe2_engine.fetch(["dx"])["dx"].view(np.uint32))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("width", [1, 3, 64])
def test_the_faster_rowwise_adagrad_is_that_of_its_operator(caffe2_engine, width):
    rng = np.random.default_rng(width)
    rows = rng.permutation(50)[:20].astype(np.int64)
    given = {"t.weight": rng.standard_normal((50, width)), "h": rng.random(50), "g": rng.standard_normal((20, width)),
             "rate": np.array([-0.1])}
    given["g"][:3] = 0
    given["h"][rows[:2]] = 0
    update = make_operator("RowWiseSparseAdagrad", ["t.weight", "h", "rows", "g", "rate"], ["t.weight", "h"],
                           epsilon=1e-8, distinct_rows=1)
    net = NetDef(name="slow", op=[update])
    fast = caffe2_engine.faster(load("tiny").model_copy(update={"embedding_dim": width}), net)
    assert "RowWiseSparseAdagrad" not in {operator.type for operator in fast.op}
    found = []
    for each in (net, fast):
        caffe2_engine.feed({"rows": rows} | {name: array.astype(np.float32) for name, array in given.items()})
        caffe2_engine.run_once(each)
        found.append(caffe2_engine.fetch(["t.weight", "h"]))
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, rtol=1e-6, atol=1e-7)


def test_rows_that_may_repeat_are_left_to_rowwise_adagrad(caffe2_engine):
    net = NetDef(name="n", op=[make_operator("RowWiseSparseAdagrad", ["t.weight", "h", "rows", "g", "rate"],
                                             ["t.weight", "h"], epsilon=1e-8)])
    assert caffe2_engine.faster(load("tiny"), net) == net
