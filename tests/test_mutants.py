"""The mutation score: faults are caught and named, correct variants pass, and a blind suite is found out."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rounded import Rounded

from conformance.case import make_case
from conformance.mutants import score
from conformance.mutants.catalogue import MUTANTS
from conformance.mutants.controls import CONTROLS
from conformance.mutants.mutant import Mutant, Mutated
from conformance.mutants.report import PHASES, as_dict, page
from conformance.mutants.rounded import bfloat16, float16_sum, tf32
from conformance.mutants.score import Score, run_mutants
from conformance.run import first_failure
from spec.backend import load_backend
from spec.toml import load, preset_names
from tools.cli import main

TINY = load("tiny")
BY_NAME = {mutant.name: mutant for mutant in (*MUTANTS, *CONTROLS)}
SAMPLE = ("fc-transposed-weight", "interaction-swapped-pairs", "loss-sum", "grad-relu-wrong-side", "grad-missing-mean",
          "grad-duplicates-doubled", "grad-weight-overwrites", "adagrad-eps-inside", "rowwise-sum", "sgd-stale-row",
          "data-one-index", "fc-tf32", "one-gradient", "predict-stale")


def test_the_catalogue_is_whole():
    assert len(MUTANTS) >= 60 and len(BY_NAME) == len(MUTANTS) + len(CONTROLS)
    assert {mutant.phase for mutant in MUTANTS} == set(PHASES)
    for mutant in (*MUTANTS, *CONTROLS):
        ways = [mutant.step, mutant.spec, mutant.batch, mutant.update, mutant.behaviour]
        assert sum(way is not None for way in ways) == 1, mutant.name
        assert mutant.what and (mutant.step is None or mutant.tensor), mutant.name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_is_caught_and_named_from_outside(mutant):
    """In the rounded reference, which no Tamper reaches: nothing behind the fault follows from it."""
    (outcome,) = run_mutants(TINY, [mutant], [Rounded()])
    assert outcome.status == ("equivalent" if outcome.reason else "killed"), outcome
    assert outcome.localised is not False and not outcome.inside, outcome


@pytest.mark.parametrize(("backend", "sample"), [
    ("torch", SAMPLE), ("caffe2-aten", SAMPLE), ("caffe2-onnx", SAMPLE[::4]),
    pytest.param("caffe2", SAMPLE, marks=pytest.mark.engine)])
def test_faults_inside_a_backend_are_caught_and_named(backend, sample):
    outcomes = list(run_mutants(TINY, [BY_NAME[name] for name in sample], [load_backend(backend)]))
    assert [(o.mutant.name, o.status, o.localised, o.inside) for o in outcomes] == [
        (name, "killed", True, True) for name in sample]


@pytest.mark.parametrize("backend", ["torch", "caffe2-aten"])
def test_correct_variants_pass(backend):
    outcomes = list(run_mutants(TINY, CONTROLS, [load_backend(backend)]))
    assert len(outcomes) == len(CONTROLS) and all(o.status == "survived" for o in outcomes), [
        o.summary for o in outcomes if o.status != "survived"]


@pytest.mark.parametrize(("backend", "tensor"), [
    *itertools.product(("torch", "caffe2-aten"), (
        "top.0.preactivation", "tables.1.pooled", "loss", "interaction.features_grad", "bottom.0.weight_grad",
        "tables.3.weight_grad_values")),
    ("caffe2-onnx", "interaction.features_grad")])
def test_a_fault_that_changes_nothing_changes_nothing(backend, tensor):
    """The way in is itself no fault: the right result in place of the right result."""
    case = replace(make_case(TINY, steps=2), optimizers=("adagrad",))
    same = Mutant("same", "forward", "nothing", tensor, step=lambda y, *sources: y)
    assert first_failure(case, Mutated(load_backend(backend), same)) is None


@pytest.mark.parametrize("backend", ["torch", "caffe2-aten"])
def test_what_is_behind_a_fault_follows_from_it(backend):
    case = make_case(TINY, steps=0)
    mutated = Mutated(load_backend(backend), BY_NAME["fc-lost-bias"])
    model, right = mutated.create(TINY, case.parameters), mutated.backend.create(TINY, case.parameters)
    try:
        wrong, good = model.trace(case.batches[0]), right.trace(case.batches[0])
        assert np.array_equal(wrong["interaction.output"], good["interaction.output"])
        assert np.array_equal(np.maximum(wrong["top.0.preactivation"], 0), wrong["top.0.activation"])
        for name in ("top.0.preactivation", "probability", "bottom.0.weight_grad", "tables.0.weight_grad_values"):
            assert not np.array_equal(wrong[name], good[name])
        assert np.array_equal(model.predict(case.batches[0]), wrong["probability"])
    finally:
        model.close()
        right.close()


def test_a_backend_that_cannot_train_is_spared_what_it_has_not():
    outcomes = list(run_mutants(TINY, MUTANTS, [Rounded(trains=False)]))
    by_name = {outcome.mutant.name: outcome.status for outcome in outcomes}
    assert by_name["fc-tf32"] == by_name["data-one-index"] == "killed"
    assert by_name["loss-sum"] == by_name["grad-bias-lost"] == by_name["sgd-ascent"] == "absent"
    assert Score.of(outcomes).survived == 0


def test_a_blind_suite_is_found_out(monkeypatch):
    monkeypatch.setattr(score, "first_failure", lambda case, backend: None)
    (outcome,) = run_mutants(TINY, [BY_NAME["grad-bias-lost"]], [Rounded()])
    assert outcome.status == "survived"
    report = as_dict([outcome], [], {"rounded": "NumPy"}, "dlrm conform tiny --mutants")
    assert not report["passes"] and report["score"]["share"] == 0 and "## Survivors" in page(report)


def test_a_false_alarm_is_found_out():
    alarm = replace(BY_NAME["fc-tf32"], phase="correct")
    outcomes = list(run_mutants(TINY, [alarm, BY_NAME["pool-mean-for-sum"]], [Rounded()]))
    report = as_dict(outcomes, [], {"rounded": "NumPy"}, "dlrm conform tiny --mutants")
    assert report["false_alarms"] == 1 and not report["passes"]
    assert report["score"]["equivalent"] == 1 and "## Faults that make no difference" in page(report)


@pytest.mark.parametrize("preset", preset_names())
def test_the_faults_fit_every_preset(preset):
    """A fault is absent only where the preset lacks tables or layers for it."""
    spec = load(preset).capped(50)
    for mutant in (*MUTANTS, *CONTROLS):
        setting = mutant.setting(spec) if mutant.setting else spec
        assert not mutant.step or mutant.change(setting).tensor == mutant.at(setting)


def test_short_formats_are_torchs():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert np.array_equal(bfloat16(x), torch.from_numpy(x).bfloat16().float().numpy())
    assert np.abs(tf32(x) / x - 1).max() <= 2.0**-11
    assert float16_sum(np.full(4096, 1, np.float32)) == 2048, "float16 counts no further"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.mutants.MUTANTS", [BY_NAME["fc-tf32"], BY_NAME["grad-half"]])
    monkeypatch.setattr("tools.mutants.CONTROLS", [BY_NAME["fc-reversed"]])
    monkeypatch.setattr("tools.mutants.ENVIRONMENTS", {"1 thread": {"OMP_NUM_THREADS": "1"}})
    path = tmp_path / "mutants.json"
    result = CliRunner().invoke(main, ["conform", "tiny", "--mutants", "--backend", "torch", "--out", str(tmp_path),
                                       "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "100.0% of the faults that make a difference are caught (2 of 2" in result.output
    report = json.loads(path.read_text())
    assert report["score"]["localised"] == report["score"]["localisable"] == 2
    assert {control["control"].split(":")[0] for control in report["controls"]} == {"fc-reversed", "1 thread"}
    text = (tmp_path / "MUTANTS.md").read_text()
    assert "dlrm conform tiny --mutants --backend torch" in text and "| `fc-tf32` |" in text


@pytest.mark.parametrize("option", [["--steps", "2"], ["--optimizer", "sgd"], ["--data", "npz:x"]])
def test_the_command_refuses_what_it_does_not_take(option):
    result = CliRunner().invoke(main, ["conform", "tiny", "--mutants", *option])
    assert result.exit_code == 2 and "--mutants takes" in result.output
