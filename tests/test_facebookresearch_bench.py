"""The timing of facebookresearch's scripts, and the baselines, without a checkout."""

import io
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dlrm_torch.backend import BACKEND
from dlrm_torch.baselines import FBGEMM, PLAIN
from dlrm_torch.floor import FLOOR
from spec import toml
from spec.data import open_batches
from spec.errors import InputError
from spec.parameters import initial_parameters
from tools import facebookresearch_bench as tool
from tools.bench.floor import flop
from tools.bench.group import Timing
from tools.facebookresearch_gate import Gate

LINE = "Finished training it {}/1000 of epoch 0, {}.00 ms/it, loss 0.2\n"


def test_the_gate_answers_with_the_scripts_own_times():
    requests = io.StringIO("".join(json.dumps({"do": "run", "iterations": k}) + "\n" for k in (1, 2, 1)))
    replies = io.StringIO()
    gate = Gate(requests, replies)
    gate.write("time/loss/accuracy (if enabled):\n")
    for number, milliseconds in enumerate((900, 10, 20, 30)):  # the first, from before any request, counts for none
        text = LINE.format(number, milliseconds)
        gate.write(text[:20])
        gate.write(text[20:])
    assert [json.loads(line)["seconds"] for line in replies.getvalue().splitlines()] == [[0.01], [0.02, 0.03]]
    assert gate.wanted == 1


SCRIPT = """
import sys
print("using CPU...")
for number in range(1000000):
    print("Finished training it %d/1000000 of epoch 0, %.2f ms/it, loss 0.1" % (number, number), flush=True)
"""


def test_a_script_stands_still_between_requests(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    with tool.WorkerProcess("theirs", 1, [sys.executable, "-I", "-B", str(tool.GATE),
                                          str(tmp_path / "script.py")]) as process:
        assert process.ask("run", mode="training", batches=[], iterations=2)["seconds"] == [0.001, 0.002]
        before = process.processor_seconds()
        assert process.ask("run", mode="training", batches=[], iterations=1)["seconds"] == [0.003]
        assert process.processor_seconds() - before < 0.1
        pid = process.pid
    assert not os.path.exists(f"/proc/{pid}")


def test_a_script_that_fails_is_said_with_its_last_words(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit('no such option')")
    with tool.WorkerProcess("theirs", 1, [sys.executable, str(tool.GATE), str(tmp_path / "script.py")]) as process, \
            pytest.raises(tool.EngineError, match=r"theirs: the process died with status 1: no such option"):
        process.ask("run", mode="training", batches=[], iterations=2)


def test_flags_run_endlessly_with_times():
    words = tool.script_flags(toml.load("criteo-kaggle").with_optimizer("rowwise_adagrad", 0.1))
    assert {"--print-time", "--print-freq=1", "--num-indices-per-lookup=1", "--optimizer=rwsadagrad",
            f"--num-batches={tool.ITERATIONS}"} <= set(words)
    assert "--num-indices-per-lookup=100" in tool.script_flags(toml.load("paper-benchmark"))


def test_the_fastest_opponent_counts():
    timings = {name: Timing(name, rounds=[seconds] * 5) for name, seconds in
               {"torch": 1.0, "their Caffe2": 4.0, "their Caffe2, async": 2.0, "fbgemm": 0.0}.items()}
    timings["fbgemm"].rounds = []
    outcome = tool._outcome(tool.Target("torch", ("their Caffe2", "their Caffe2, async"), 0.45), timings)
    assert outcome["against"] == "their Caffe2, async" and outcome["ratio"] == [0.5, 0.5, 0.5] and not outcome["met"]
    assert tool._outcome(tool.Target("torch", ("fbgemm",), 0.45), timings)["met"] is None


def test_no_checkout_is_one_line(tmp_path):
    run = subprocess.run([sys.executable, "-m", "tools.facebookresearch_bench", tmp_path], capture_output=True,
                         text=True)
    assert run.returncode == 2 and "expected a checkout of facebookresearch/dlrm" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fbgemm_gpu's own imports
@pytest.mark.parametrize("baseline, optimizer", [(PLAIN, "sgd"), (FBGEMM, "sgd"), (FBGEMM, "rowwise_adagrad")])
def test_baselines_train_the_same_model(baseline, optimizer):
    if not baseline.available().ok:
        pytest.skip(baseline.available().remedy)
    spec = toml.load("paper-benchmark").capped(50).with_optimizer(optimizer, 1e-3)
    parameters = initial_parameters(spec)
    models = [each.create(spec, parameters) for each in (BACKEND, baseline)]
    batches = list(itertools.islice(open_batches("random", spec, 16), 3))
    losses = [[model.train_step(batch) for batch in batches] for model in models]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][0] != losses[0][1]
    ours, theirs = (model.predict(batches[0]) for model in models)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3)


def test_baselines_refuse_what_they_do_not_have():
    spec = toml.load("tiny")
    with pytest.raises(InputError, match="sum pooling"):
        PLAIN.create(spec, initial_parameters(spec))


@pytest.mark.parametrize("preset", ["paper-benchmark", "criteo-kaggle"])
def test_the_floor_multiplies_what_a_step_does_and_writes_every_row_back(preset: str, monkeypatch: pytest.MonkeyPatch):
    spec = toml.load(preset).capped(50)
    parameters = initial_parameters(spec)
    model, batch = FLOOR.create(spec, parameters), next(open_batches("random", spec, 16))
    for training in (False, True):
        with FlopCounterMode(display=False) as counter:
            (model.train_step if training else model.predict)(batch)
        assert counter.get_total_flops() == flop(spec, 16, training)
    storage = model._tables.shared("weight").zero_()
    model._zeros_11E = torch.ones(1, 1, spec.embedding_dim)
    model.train_step(batch)
    looked_up = np.concatenate([np.isin(np.arange(table.rows), indices)
                                for table, indices in zip(spec.tables, batch.indices, strict=True)])
    np.testing.assert_array_equal(storage.numpy(), np.repeat(looked_up[:, None], spec.embedding_dim, 1))
