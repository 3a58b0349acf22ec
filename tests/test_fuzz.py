"""Generated specs: what they cover and cost, what a campaign finds, and what it makes of it."""

import itertools
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from rounded import Rounded

from conformance import generate as generator
from conformance.fuzz import campaign, coverage, judge_example
from conformance.generate import examples, generate, work
from conformance.run import run_case
from conformance.shrink import shrink
from spec import toml
from spec.model import MLP, Interaction, Loss, ModelSpec, Table
from tools.cli import main


@pytest.fixture(scope="module")
def many():
    return generate(200, 0)


@pytest.fixture(scope="module")
def few(many):
    """The cheap half of a hundred, with small batches, for the sake of time."""
    cheap = sorted(many[:100], key=lambda e: work(e.spec) + sum(t.rows for t in e.spec.tables) * e.spec.embedding_dim)
    return [replace(e, spec=e.spec.model_copy(update={"batch_size": min(e.spec.batch_size, 6)})) for e in cheap[:50]]


def last(found):
    *_, tallies = found
    return tallies


def test_a_seed_gives_the_same_examples_and_batches():
    first, second = generate(20, 5), generate(20, 5)
    assert first == second and first != generate(20, 6)
    for name, array in first[-1].batch().arrays().items():
        assert np.array_equal(array, second[-1].batch().arrays()[name])


def test_every_option_is_generated(many):
    seen = coverage(many)
    assert set(seen["loss"]) == {"mse", "bce", "bce_logits", "wbce"}
    assert set(seen["interaction"]) == {"cat", "dot", "dot with itself"}
    assert set(seen["optimizer"]) == {"sgd", "adagrad", "rowwise_adagrad"}
    assert set(seen["pooling"]) == {"sum", "mean", "weighted_fixed", "weighted_learned"}
    assert {"0.0", "0.45"} <= set(seen["clip"])
    for kind, values in (("bags", generator.BAGS), ("indices", generator.INDICES), ("dense", generator.DENSE),
                         ("labels", generator.LABELS)):
        assert set(seen[kind]) == set(values)
    assert {e.spec.bottom.activation for e in many} == {e.spec.top.activation for e in many} == {"relu", "sigmoid"}


def test_sizes_go_to_their_limits_at_a_bounded_cost(many):
    assert min(len(e.spec.tables) for e in many) == 1 and max(len(e.spec.tables) for e in many) > 35
    assert min(e.spec.embedding_dim for e in many) == 1 and max(e.spec.embedding_dim for e in many) > 200
    assert min(e.spec.batch_size for e in many) == 1 and max(e.spec.batch_size for e in many) > 3000
    for example in many:
        spec = example.spec
        assert max(1, spec.batch_size - 1) * work(spec) <= generator._WORK
        assert sum(table.rows for table in spec.tables) * spec.embedding_dim <= generator._TABLE_NUMBERS


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(examples())
def test_the_rounded_reference_is_no_false_alarm(example):
    result = run_case(example.case(), [Rounded()], most_undecided=1)
    assert result.conforms, result.backends[0].worst.summary()


def test_samples_at_a_clip_are_no_false_alarm():
    """Close to 1 a clip's bound lies among few float32 numbers, and many samples have that of the bound itself."""
    spec = ModelSpec(name="clipped", dense_features=1, embedding_dim=1, batch_size=400, bottom=MLP(widths=(1,)),
                     top=MLP(widths=(1,)), tables=(Table(rows=1),), interaction=Interaction(kind="cat"),
                     loss=Loss(kind="bce", clip=1e-6))
    example = generator.Example(spec, generator.Data(labels="all 1"), 0)
    case = example.case()
    case.parameters["bottom.0.weight"][:], case.parameters["bottom.0.bias"][:] = 1, 0
    case.parameters["top.0.weight"][:], case.parameters["top.0.bias"][:] = (0.1, 0), 13.75
    result = run_case(case, [Rounded()], most_undecided=1)
    assert result.conforms, result.backends[0].worst.summary()
    probability = Rounded().create(spec, case.parameters).predict(example.batch())
    assert (probability == np.float32(1 - 1e-6)).sum() > 40 and len(np.unique(probability)) > 1


def test_a_fault_of_few_specs_is_found_and_made_minimal(few):
    tally = last(campaign(few, ["fussy:BAGS"], jobs=1))["fussy:BAGS"]
    assert tally.examples == 50 and 0 < len(tally.failing) < 25
    spec = tally.smallest.spec
    (table,) = spec.tables
    assert (table.pooling, table.lookups, table.rows) == ("mean", 3, 1) and spec.interaction.self_interaction
    assert (spec.embedding_dim, spec.dense_features, spec.batch_size) == (1, 1, 1)
    assert spec.bottom.widths == (1,) and spec.top.widths == (1,) and spec.loss.kind == "mse"
    assert spec.optimizer.kind == "sgd" and tally.smallest.data == generator.Data() and tally.smallest.seed == 0
    assert tally.problem.startswith("tables.0.pooled[0, 0]")


def test_an_engine_that_gives_up_is_a_finding(few):
    large = next(example for example in few if len(example.spec.tables) > 3)
    tally = last(campaign([large], ["fussy:TABLES"], jobs=1))["fussy:TABLES"]
    assert tally.problem == "EngineError: tables: no more than 3 tables"
    assert len(tally.smallest.spec.tables) == 4


def test_what_no_float32_can_hold_is_counted_apart(few):
    """A rate that is legal, and throws the weights out of float32's range; the backend is always wrong."""
    wild = few[2].spec.optimizer.model_copy(update={"kind": "sgd", "learning_rate": 1e38})
    thrown = replace(few[2], spec=few[2].spec.model_copy(update={"optimizer": wild, "loss": Loss(kind="bce_logits")}))
    tally = last(campaign([thrown], ["fussy:ALWAYS"], jobs=1))["fussy:ALWAYS"]
    assert tally.beyond == tally.examples == 1 and not tally.failing and not tally.elements


def test_shrinking_ends_and_stays_failing(many):
    tried = []

    def fails(example):
        tried.append(example)
        toml.loads(toml.dumps(example.spec), "simplified")
        example.batch()
        return len(example.spec.tables) >= 2 and example.spec.batch_size >= 3

    large = max((e for e in many if e.spec.batch_size >= 3), key=lambda e: len(e.spec.tables))
    smallest = shrink(large, fails)
    assert len(smallest.spec.tables) == 2 and smallest.spec.batch_size == 3 and len(tried) < 250
    assert shrink(smallest, fails) == smallest
    assert shrink(many[-1], lambda example: True, tries=0) == many[-1]


def test_processes_find_what_one_finds(few):
    names = ["fussy:NEVER", "fussy:TABLES"]
    alone, together = (last(campaign(few[:6], names, jobs)) for jobs in (1, 2))
    for name in names:
        assert sorted(alone[name].failing) == sorted(together[name].failing)
        assert (alone[name].elements, alone[name].worst) == (together[name].elements, together[name].worst)
    assert not alone["fussy:NEVER"].failing and alone["fussy:NEVER"].elements


def test_the_printed_command_shows_the_failure_again(tmp_path):
    arguments = ["conform", "--fuzz", "4", "--seed", "5", "--backend", "fussy:BAGS", "--jobs", "1",
                 "--out", str(tmp_path), "--json", str(tmp_path / "found.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    (backend,) = json.loads((tmp_path / "found.json").read_text())["backends"]
    smallest = backend["smallest"]
    assert smallest["command"] in result.output and Path(smallest["spec"]).exists()
    again = CliRunner().invoke(main, shlex.split(smallest["command"])[1:])
    assert again.exit_code == 1 and smallest["problem"].split(" = ")[0] in again.output


def test_a_good_backend_passes_and_nothing_is_written(tmp_path):
    result = CliRunner().invoke(main, ["conform", "--fuzz", "5", "--backend", "fussy:NEVER", "--jobs", "1",
                                       "--out", str(tmp_path / "failing")])
    assert result.exit_code == 0 and result.output.endswith("conforms\n"), result.output
    assert not list(tmp_path.glob("failing/*"))


@pytest.mark.parametrize("arguments", [["tiny", "--fuzz", "3"], ["--fuzz", "3", "--steps", "2"], ["--fuzz", "0"],
                                       ["tiny", "--jobs", "2"], ["--fuzz", "2", "--backend", "no-such"],
                                       ["--fuzz", "2", "--data", "criteo:x"], ["--fuzz", "2", "--device", "cuda"],
                                       ["--fuzz", "2", "--mutants"], ["--fuzz", "2", "--junit", "x.xml"],
                                       ["--fuzz", "2", "--only", "loss"], ["--fuzz", "2", "--trajectory", "9"]])
def test_options_that_do_not_go_together(arguments):
    assert CliRunner().invoke(main, ["conform", *arguments]).exit_code == 2


def test_judging_names_backends_one_by_one(many):
    first, second = judge_example(many[0], ["fussy:NEVER", "fussy:TABLES"])
    assert (first.backend, second.backend) == ("never", "tables") and first.elements > 0


def test_interrupted_it_says_what_was_found(monkeypatch, tmp_path):
    def interrupted(*arguments):
        yield from itertools.islice(campaign(*arguments), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.fuzz.campaign", interrupted)
    result = CliRunner().invoke(main, ["conform", "--fuzz", "9", "--backend", "fussy:NEVER", "--jobs", "1",
                                       "--json", str(tmp_path / "found.json"), "--out", str(tmp_path)])
    assert result.exit_code == 130 and "fussy:NEVER" in result.output and "dlrm: interrupted" in result.stderr
    assert json.loads((tmp_path / "found.json").read_text())["backends"][0]["examples"] == 2
