"""Reading facebookresearch/dlrm's scripts: names, numbers, recordings. No checkout is needed."""

import json
import types

import numpy as np
import pytest
from click.testing import CliRunner

from spec.batch import Batch
from spec.parameters import initial_parameters
from tools import facebookresearch as tool
from tools import facebookresearch_hook as hook

OUTPUT = """\
world size: 1, current rank: 0, local rank: 0
time/loss/accuracy (if enabled):
Finished training it 1/3 of epoch 0, -1.00 ms/it, loss 0.025266
Finished training it 2/3 of epoch 0, 12.34 ms/it, loss 0.179439 (10:05)
Testing at - 2/3 of epoch 0, loss 0.5, accuracy 1.000 %, best 1.000 %
Finished training it 3/3 of epoch 0, -1.00 ms/it, loss 12.081175
"""

PYTORCH = {"0:bot_l.0.weight": "bottom.0.weight", "0:bot_l.2.bias": "bottom.1.bias", "0:top_l.4.weight": "top.2.weight",
           "0:emb_l.11.weight": "tables.11.weight", "0:v_W_l.3": "tables.3.pooling", "0:offsets.1": "tables.1.offsets",
           "0:indices.1": "tables.1.indices", "0:dense": "dense", "0:target": "label"}
CAFFE2 = {"0:bot:::fc1_w": "bottom.0.weight", "0:bot:::fc2_b": "bottom.1.bias", "0:top:::fc3_w": "top.2.weight",
          "0:emb:::sls11_w": "tables.11.weight", "0:emb:::sls3_v": "tables.3.pooling",
          "0:emb:::sls1_l": "tables.1.lengths", "0:emb:::sls1_i": "tables.1.indices", "0:dense_in": "dense",
          "0:target": "label", "0:const_one": None, "0:interaction_tril_indices": None}


def model(name):
    return next(spec for spec in tool.MODELS if spec.name == name)


def training(**changes):
    batch = Batch(np.ones((2, 4), np.float32), (np.array([1, 3, 0]),), (np.array([2, 1], np.int32),),
                  np.zeros((2, 1), np.float32))
    arrays = {"weight": np.zeros(2, np.float32)}
    return tool.Training(arrays | changes, (batch,), ("0.5",))


def test_losses_are_read_with_their_digits():
    assert tool.printed_losses(OUTPUT) == ("0.025266", "0.179439", "12.081175")


@pytest.mark.parametrize("key, ours", [*PYTORCH.items(), *CAFFE2.items()])
def test_names(key, ours):
    assert tool.spec_name(key.removeprefix("0:")) == ours


def test_a_pytorch_recording():
    recorded = {"1:offsets.0": np.array([0, 2, 2]), "1:indices.0": np.array([5, 7, 1, 4]),
                "1:dense": np.ones((3, 2), np.float32), "1:target": np.ones((3, 1), np.float32),
                "11:dense": np.zeros((3, 2), np.float32)}
    named = tool.spec_arrays(recorded, 1)
    assert named.keys() == {"tables.0.lengths", "tables.0.indices", "dense", "label"}
    assert named["tables.0.lengths"].tolist() == [2, 0, 2] and named["tables.0.lengths"].dtype == np.int32
    assert named["tables.0.indices"].tolist() == [5, 7, 1, 4]
    assert named["dense"].all()


def test_a_caffe2_recording():
    recorded = {"0:emb:::sls0_l": np.array([2, 0, 2], np.int32), "0:emb:::sls0_i": np.array([5, 7, 1, 4]),
                "0:dense_in": np.ones((3, 2), np.float32), "0:target": np.array([[1], [0], [1]], np.int32),
                "0:optim_it": np.array([0])}
    named = tool.spec_arrays(recorded, 0)
    assert named.keys() == {"tables.0.lengths", "tables.0.indices", "dense", "label"}
    assert named["label"].dtype == np.float32 and named["label"].tolist() == [[1], [0], [1]]


@pytest.mark.parametrize("loss, printed, units", [
    (0.0252663, "0.025266", 0), (0.0252666, "0.025266", 1), (0.0252646, "0.025266", 1), (0.0252641, "0.025266", 2),
    (1.0, "1.000000", 0), (0.9999994, "1.000000", 1), (float("nan"), "0.025266", float("inf"))])
def test_units_of_the_last_printed_digit(loss, printed, units):
    assert tool.units_apart(loss, printed) == units


def test_a_comparison_counts_both_ways():
    good = tool.compare("torch", [0.1, 0.2000006], "PyTorch", ["0.100000", "0.200000"])
    assert (good.steps, good.same, good.near, good.agrees) == (2, 1, 2, True)
    assert good.farthest == pytest.approx(0.6)
    assert not tool.compare("torch", [0.1, 0.2000016], "PyTorch", ["0.100000", "0.200000"]).agrees
    assert not tool.compare("torch", [0.1, float("nan")], "PyTorch", ["0.100000", "0.200000"]).agrees
    with pytest.raises(ValueError):
        tool.compare("torch", [0.1], "PyTorch", ["0.100000", "0.200000"])


def test_flags_say_what_the_spec_says():
    words = tool.flags(model("clip"), 20)
    assert {"--arch-mlp-bot=13-64-16", "--arch-mlp-top=64-32-1", "--arch-embedding-size=1000-50-300-7",
            "--arch-sparse-feature-size=16", "--arch-interaction-itself", "--loss-threshold=0.4", "--data-size=2560",
            "--mini-batch-size=128", "--num-indices-per-lookup=10", "--round-targets=True"} <= set(words)
    assert "--weighted-pooling=learned" in tool.flags(model("weighted"), 1)
    tiny = " ".join(tool.flags(model("tiny"), 3))
    assert "--mini-batch-size=2 --data-size=6" in tiny
    assert "round-targets" not in tiny and "itself" not in tiny and "weighted" not in tiny


def test_the_first_difference_is_named():
    assert tool.first_difference(training(), training()) == ""
    assert tool.first_difference(training(), training(weight=np.array([0, -0.0], np.float32))) == "weight"
    other = training()
    other.batches[0].indices[0][2] = 1
    assert tool.first_difference(training(), other) == "step 0: tables.0.indices"


class Tensor:
    """As much of PyTorch's as the hook uses."""

    def __init__(self, values):
        self.values = np.array(values)

    def detach(self):
        return self

    def numpy(self):
        return self.values


class DLRM_Net:
    weight = Tensor([1.0])

    def state_dict(self):
        return {"bot_l.0.weight": self.weight}


class MSELoss:
    pass


class Linear:
    pass


def test_pytorch_is_recorded_before_each_step():
    callbacks, recorded = [], {}
    hook.record_pytorch(types.SimpleNamespace(register_module_forward_pre_hook=callbacks.append), recorded)
    (before,) = callbacks
    net = DLRM_Net()
    for step in range(2):
        before(net, (Tensor([step]), [Tensor([0, 1])], [Tensor([7, 8])]))
        before(Linear(), (Tensor([9]),))
        before(MSELoss(), (Tensor([9]), Tensor([step + 10])))
        net.weight.values[:] = 2.0  # an update in place must not reach what was recorded
    assert set(recorded) == {f"{step}:{name}" for step in range(2)
                             for name in ("bot_l.0.weight", "dense", "offsets.0", "indices.0", "target")}
    assert recorded["0:bot_l.0.weight"] == 1 and recorded["1:bot_l.0.weight"] == 2
    assert recorded["1:dense"] == 1 and recorded["1:target"] == 11


def test_caffe2_is_recorded_before_and_after_each_step():
    blobs, ran, recorded = {"w": 0, "loss": 0.0}, [], {}

    def run(net):
        ran.append(net)
        blobs.update(w=blobs["w"] + 1, loss=0.5)
        return True

    workspace = types.SimpleNamespace(RunNet=run, CreateNet=lambda net: "created", HasBlob=blobs.__contains__,
                                      FetchBlob=blobs.__getitem__)
    hook.record_caffe2(workspace, recorded)
    operator = types.SimpleNamespace(output=["w", "loss", "w_grad"])
    proto = types.SimpleNamespace(name="DLRM", external_input=["w", "never_fed"], op=[operator],
                                  SerializeToString=lambda: b"net")
    net = types.SimpleNamespace(Proto=lambda: proto)
    assert workspace.CreateNet(net) == "created"
    assert recorded.pop("net>DLRM").tobytes() == b"net"
    for _ in range(2):
        assert workspace.RunNet(net)
    assert ran == [net, net]
    assert recorded == {"0:w": 0, "0>w": 1, "0>loss": 0.5, "1:w": 1, "1>w": 2, "1>loss": 0.5}


def invoke(*arguments):
    return CliRunner().invoke(tool.main, [str(argument) for argument in arguments])


def test_what_is_no_checkout_is_refused(tmp_path):
    for folder, found in ((tmp_path, "no such file in it"), (tmp_path / "none", "no such folder")):
        result = invoke(folder)
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line == (f"facebookresearch: {folder}: expected a checkout of facebookresearch/dlrm, which holds "
                        f"dlrm_s_pytorch.py, found {found}; "
                        "git clone https://github.com/facebookresearch/dlrm and name its folder")


def test_a_script_that_fails_is_named_and_a_missing_engine_too(tmp_path, monkeypatch):
    for script in tool.SCRIPTS.values():
        (tmp_path / script).write_text("raise SystemExit('no such flag')\n")
    monkeypatch.setenv("DLRM_CAFFE2_VENV", str(tmp_path / "none"))
    result = invoke(tmp_path)
    assert result.exit_code == 2
    left_out, failed = result.stderr.splitlines()
    assert "dlrm_s_caffe2.py and backend caffe2 are left out" in left_out and "dlrm engine install" in left_out
    assert "dlrm_s_pytorch.py ended with status 1" in failed and failed.endswith("no such flag")


@pytest.mark.parametrize("wrong", [False, True])
def test_the_verdict_is_the_exit_status(tmp_path, monkeypatch, wrong):
    """Their script is played by the reference of the spec, which prints with 6 decimals."""
    from spec.data import open_batches
    from spec.reference import evaluate

    def played(python, checkout, script, spec, steps):
        parameters, batch = initial_parameters(spec), next(open_batches("random", spec, spec.batch_size))
        loss = evaluate(spec, parameters, batch, gradients=False).tensors["loss"].value.item()
        return tool.Training(parameters, (batch,), ("9.000000" if wrong else f"{loss:.6f}",))

    monkeypatch.setattr(tool, "interpreters", lambda checkout: {"PyTorch": tmp_path})
    monkeypatch.setattr(tool, "run_script", played)
    path = tmp_path / "out.json"
    result = invoke(tmp_path, "--model", "tiny", "--steps", 1, "--json", path)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == (1 if wrong else 0), result.output
    assert json.loads(path.read_text())["agrees"] is not wrong
    assert ("DIFFERS" in result.stdout) is wrong
