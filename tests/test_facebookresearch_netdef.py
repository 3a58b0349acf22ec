"""The comparison of facebookresearch's nets through ONNX, on blobs that no script has made."""

import numpy as np
import pytest

from spec.rounding import Tracked, exact
from tools.facebookresearch_netdef import CASES, OPTIMIZERS, blob_name, compare

WANTED = {
    "loss": (None, Tracked(np.array([0.5]), np.array([1e-14]))),
    "bottom.0.weight": (None, Tracked(np.ones((2, 2)), np.full((2, 2), 1e-14))),
    "tables.1.weight": (np.array([0, 2]), exact(np.array([[5.0], [6.0]]))),
}
BEFORE = {"emb:::sls1_w": np.float32([[1], [2], [3]])}


def made() -> dict[str, np.ndarray]:
    return {"loss": np.float32(0.5), "bot:::fc1_w": np.ones((2, 2), np.float32), "optim_it": np.array([2]),
            "emb:::sls1_w": np.float32([[5], [2], [6]])}


def test_names_of_the_script():
    assert blob_name("momentum_mlp_bot_3") == "bottom.1.weight.moment"
    assert blob_name("momentum_mlp_top_4") == "top.1.bias.moment"
    assert blob_name("momentum_emb_7") == "tables.7.weight.moment"
    assert (blob_name("prob_click"), blob_name("top:::fc2_b"), blob_name("optim_it")) == (
        "probability", "top.1.bias", None)
    assert {spec.optimizer.kind for spec in CASES} == set(OPTIMIZERS)


def test_what_agrees():
    theirs = made() | {"bot:::fc1_w": np.full((2, 2), 1 + 2e-7, np.float32)}
    result = compare("net", made(), theirs, BEFORE, WANTED)
    assert result.agrees and (result.elements, result.worst) == (7, "bot:::fc1_w")
    assert result.onnx == 0 and 0.1 < result.caffe2 == result.apart < 0.2


@pytest.mark.parametrize(("name", "wrong"), [
    ("loss", np.float32(0.50001)), ("loss", np.float32(np.nan)), ("optim_it", np.array([1])),
    ("emb:::sls1_w", np.float32([[5], [2.5], [6]])), ("emb:::sls1_w", np.float32([[5], [2], [6.001]])),
    ("bot:::fc1_w", np.float32([[1, 1], [1, 1.001]])),
])
def test_what_does_not(name: str, wrong: np.ndarray):
    for ours, theirs in ((made() | {name: wrong}, made()), (made(), made() | {name: wrong})):
        assert not compare("net", ours, theirs, BEFORE, WANTED).agrees
    assert not compare("net", {}, {}, BEFORE, WANTED).agrees
