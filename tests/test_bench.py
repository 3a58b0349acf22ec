"""The benchmark: statistics, plan, names of operators, floor, and one small run from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from conformance.case import OPTIMIZERS
from dlrm_caffe2.model import predict_net, train_net
from spec import toml
from spec.backend import PARTS
from spec.data.random import random_batch
from spec.errors import EngineError
from spec.model import Loss
from tools.bench import ceilings, floor, operators, plan, statistics
from tools.bench.process import WorkerProcess
from tools.cli import main

DLRM = Path(sys.executable).parent / "dlrm"


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *(str(argument) for argument in arguments)])


def noisy(median, rounds=25, seed=0):
    return list(median * np.random.default_rng(seed).lognormal(0, 0.05, rounds))


def test_spread_is_median_and_quartiles():
    assert statistics.spread([5, 1, 2, 4, 3]) == (3, 2, 4)
    with pytest.raises(ValueError):
        statistics.spread([])


def test_ratios_of_what_is_equal_and_what_is_not():
    same = statistics.paired_ratio(noisy(1, seed=1), noisy(1, seed=2))
    assert same.low < 1 < same.high
    slower = statistics.ratio(noisy(1.5, seed=1), noisy(1, seed=2))
    assert 1.3 < slower.low < slower.value < slower.high < 1.7
    sample = noisy(1)
    assert statistics.paired_ratio(sample, sample) == (1, 1, 1)


def test_pairing_removes_what_disturbs_both():
    disturbance = np.random.default_rng(3).uniform(1, 3, 25)
    a, b = 1.2 * disturbance, 1.0 * disturbance
    paired, unpaired = statistics.paired_ratio(a, b), statistics.ratio(a, b)
    assert paired.high - paired.low < 1e-9 < 0.2 < unpaired.high - unpaired.low
    assert paired.value == pytest.approx(1.2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """95 % of the time: of 200 draws 180 at the least (a binomial of 0.95 has less once in 1000)."""
    hits = 0
    for seed in range(200):
        draws = np.random.default_rng(seed).lognormal(0, 0.1, (2, 31))
        interval = statistics.ratio(1.3 * draws[0], draws[1])
        hits += interval.low <= 1.3 <= interval.high
    assert hits >= 180


def test_growth_of_known_curves():
    sizes = [1, 2, 4, 8]
    square = statistics.growth(sizes, [size**2 for size in sizes])
    assert square.exponent == pytest.approx(2) and square.deviation > 0.2
    line = statistics.growth(sizes, [3 + 2 * size for size in sizes])
    assert (line.fixed, line.slope) == pytest.approx((3, 2)) and line.deviation < 1e-9 and line.exponent < 1
    assert statistics.growth(sizes, [5, 5, 5, 5]).exponent == pytest.approx(0)
    with pytest.raises(ValueError):
        statistics.growth([2, 2], [1, 1])


def test_every_operator_of_our_nets_has_a_part():
    spec = toml.load("tiny")
    losses = [Loss(kind="mse"), Loss(kind="bce", clip=0.1), Loss(kind="wbce", weights=(1.0, 2.0)),
              Loss(kind="bce_logits")]
    specs = [toml.load(name) for name in toml.preset_names()]
    specs += [spec.model_copy(update={"loss": loss}) for loss in losses]
    specs += [spec.with_optimizer(kind, 0.1) for kind in OPTIMIZERS]
    types = {operator.type for spec in specs for make in (train_net, predict_net) for operator in make(spec).op}
    assert len(types) > 30 and not operators.unmapped(dict.fromkeys(types, 1.0))


def test_no_time_is_lost_in_the_breakdown():
    seconds = {"fc/aten.mm": 1.0, "FCGradient": 2.0, "SparseLengthsSum/Gather": 4.0, "onnxruntime/Cast": 8.0,
               "aten.mystery": 16.0, "optimizer/aten.add_": 32.0}
    parts = operators.breakdown(seconds)
    assert parts["fc"] == 3 and parts["embedding"] == 4 and parts["optimizer"] == 32 and parts["other"] == 24
    assert sum(parts.values()) == sum(seconds.values())
    assert operators.unmapped(seconds) == ["aten.mystery", "onnxruntime/Cast"]
    assert set(operators.TITLES) == {*PARTS, "other"}


def test_the_floor_of_the_papers_benchmark():
    """29.5 GFLOP a training step, as counted by hand for 512-512-64 and 100-1024-1024-1024-1 at 2048 samples."""
    spec = toml.load("paper-benchmark")
    forward = 2 * 2048 * (512 * 512 + 512 * 64 + 100 * 1024 + 2 * 1024 * 1024 + 1024)
    assert floor.flop(spec, 2048, training=False) == forward
    assert floor.flop(spec, 2048, training=True) == 3 * forward - 2 * 2048 * 512 * 512
    assert floor.Work(4.0, 6.0).seconds(gemm=2.0, gather=3.0) == 4.0


def test_bytes_count_a_repeated_row_once_in_the_update():
    spec = toml.load("tiny")
    batch = random_batch(spec, 32, 0, 0)
    read = 4 * 8 * sum(len(indices) for indices in batch.indices)
    distinct = sum(len(set(indices.tolist())) for indices in batch.indices)
    assert floor.moved_bytes(spec, batch, training=False) == read
    assert floor.moved_bytes(spec, batch, training=True) == read + 8 * 8 * distinct
    assert floor.moved_bytes(spec.with_optimizer("adagrad", 0.1), batch, training=True) == read + 8 * 16 * distinct


def test_a_plan_has_every_combination():
    tiny, rmc1 = toml.load("tiny"), toml.load("rmc1").capped(100)
    groups = plan.make_groups([tiny, rmc1], ["training", "inference"], [], [1, 2])
    assert [(group.spec.name, group.threads) for group in groups] == [
        ("tiny", 1), ("tiny", 2), ("rmc1", 1), ("rmc1", 2)]
    assert groups[0].settings == (("inference", 32), ("training", 32))
    (group,) = plan.make_groups([tiny], ["training"], [8, 16], [1])
    assert group.settings == (("training", 8), ("training", 16))


@pytest.mark.parametrize("axis", plan.SWEEPS)
def test_a_sweep_grows_one_thing(axis):
    spec = toml.load("rmc1").capped(1000)
    points = plan.sweep_points(spec, axis, 64)
    values = [point.value for point, _, _ in points]
    assert len(points) == len(plan.FACTORS) and all(b == 2 * a for a, b in pairwise(values))
    same = next((grown, size) for (point, grown, size), factor in zip(points, plan.FACTORS, strict=True) if factor == 1)
    assert same[1] == 64 and same[0].layer_sizes == spec.layer_sizes and len(same[0].tables) == len(spec.tables)
    for _, grown, _ in points:
        assert type(spec).model_validate(grown.model_dump()) == grown


def test_turns_fit_their_time():
    effort = plan.Effort(seconds=0.5)
    assert effort.turn(0.1) == 5 and effort.turn(10) == 2 and effort.turn(1e-9) == 500
    assert plan.Effort(iterations=7).turn(10) == 7


def test_no_room_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr("spec.memory._memory", lambda: 2**30)
    result = invoke("paper-benchmark", "--backend", "torch", "--no-ceilings")
    assert result.exit_code == 2 and "3 copies of the parameters" in result.stderr and "--max-rows" in result.stderr


def test_a_failed_request_leaves_the_worker_usable_and_a_dead_worker_is_said():
    with WorkerProcess("torch", 1) as process:
        with pytest.raises(EngineError, match="torch: FileNotFoundError"):
            process.ask("run", mode="inference", batches=["nowhere.npz"], iterations=1)
        assert process.ask("ceiling", name="numpy", rows=100, width=4)["gemm"] > 0
        assert process.peak_memory() > 2**20 and process.processor_seconds() > 0
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="torch: the process died of signal 9"):
            process.ask("ceiling", name="numpy", rows=100, width=4)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run of two backends, and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    result = invoke("tiny", "--backend", "torch", "--backend", "caffe2-aten", "--backend", "torch-onnx", "--threads", 1,
                    "--rounds", 3, "--seconds", 0.01, "--no-ceilings", "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), result.output


def test_a_run_from_end_to_end(report):
    content, printed = report
    assert [(result["mode"], result["threads"]) for result in content["results"]] == [("inference", 1), ("training", 1)]
    for result in content["results"]:
        assert result["flop"] > 0 and result["bytes"] > 0 and result["floor"] is None
        for backend in result["backends"]:
            if (result["mode"], backend["backend"]) == ("training", "torch-onnx"):
                assert backend["status"] == "cannot train" and backend["median"] is None
                continue
            assert backend["status"] == "timed" and backend["verdict"]["conforms"], backend
            assert len(backend["rounds"]) == 3 and min(backend["rounds"]) > 0
            assert backend["quartiles"][0] <= backend["median"] <= backend["quartiles"][1]
            assert backend["memory"] > 2**20 and backend["engine"] in printed + backend["engine"]
            assert sum(backend["breakdown"].values()) == pytest.approx(sum(backend["operators"].values()))
            assert backend["breakdown"]["fc"] > 0 and backend["breakdown"]["embedding"] > 0
            assert backend["backend"] in printed
    training = content["results"][1]["backends"]
    assert training[0]["ratio"] == [1, 1, 1] and training[0]["breakdown"]["optimizer"] > 0
    assert {"cpu", "cores", "load_before", "load_after", "date", "environment"} <= content["machine"].keys()


@pytest.mark.parametrize("name", ["numpy", "torch", pytest.param("caffe2", marks=pytest.mark.engine)])
def test_every_library_multiplies_and_gathers(name):
    """Slower than any processor that runs this, faster than any that there is."""
    assert name in ceilings.ceiling_names()
    found = ceilings.measure_ceiling(name, 1000, 16, seconds=0.01)
    assert found["library"] and 1e8 < found["gemm"] < 1e14 and 1e6 < found["gather"] < 1e13


def test_a_backend_that_does_not_conform_gets_no_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "bench.json"
    result = invoke("tiny", "--backend", "torch", "--backend", "faulty:SIGN", "--threads", 1, "--rounds", 2,
                    "--seconds", 0.01, "--mode", "training", "--no-ceilings", "--json", path)
    assert result.exit_code == 1, result.output
    right, wrong = json.loads(path.read_text())["results"][0]["backends"]
    assert right["status"] == "timed" and wrong["status"] == "does not conform"
    assert wrong["rounds"] == [] and wrong["median"] is None and "top.0.weight" in wrong["reason"]


def test_a_missing_engine_is_said_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DLRM_CAFFE2_VENV", str(tmp_path / "nowhere"))
    result = invoke("tiny", "--backend", "caffe2", "--threads", 1, "--rounds", 2, "--seconds", 0.01, "--no-ceilings")
    assert "caffe2: missing: genuine Caffe2 is not installed" in result.output
    assert "dlrm engine install" in result.output


@pytest.mark.parametrize("arguments, message", [
    (["tinny"], "did you mean 'tiny'?"),
    (["tiny", "--backend", "torch", "--baseline", "caffe2"], "baseline 'caffe2': expected one of torch"),
    (["tiny", "--backend", "torch", "--json", "/"], "expected a file name"),
    ([], "expected a preset or a .toml file"),
])
def test_bad_input_is_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_process_and_writes_nothing(number, status, tmp_path):
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen([DLRM, "bench", "tiny", "--backend", "torch", "--rounds", "100000", "--no-ceilings",
                                "--json", tmp_path / "bench.json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"TMPDIR": str(tmp_path / "temporary")})
    deadline, workers = time.monotonic() + 60, []
    while not workers and time.monotonic() < deadline:
        time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status, stderr
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
