"""Expected failures: what they excuse, what they never excuse, and how that is told."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from rounded import Rounded

from conformance.case import make_case
from conformance.report import as_dict
from conformance.run import run_case
from conformance.xfail import Entry, ExpectedFailures, load_expected_failures
from spec.errors import EngineError, InputError
from spec.toml import load
from tools.cli import main


@pytest.fixture(scope="module")
def case():
    return make_case(load("tiny"), steps=2)


def negated():
    return Rounded("mine", faults={"top.0.weight_grad": np.negative, "tables.0.weight_grad_values": np.negative})


def run(case, backends, *entries, strict=False):
    expected = ExpectedFailures([Entry(*entry) if isinstance(entry, tuple) else entry for entry in entries], strict)
    results = [run_case(case, backends, expected=expected)]
    return results[0], as_dict(results, expected)


def test_what_is_expected_is_excused_and_nothing_else(case):
    both = [("mine", "top.0.weight_grad", "sign"), ("mine", "tables.*_grad_values", "sign too")]
    result, report = run(case, [negated(), Rounded()], *both)
    assert report["conforms"] and result.backends[0].status == "conforms"
    assert {v.xfail for v in result.backends[0].verdicts} == {"", "sign", "sign too"}
    assert result.pairs[0].conforms, "what is known to be wrong is not compared between backends"
    result, report = run(case, [negated()], both[0])
    assert not report["conforms"] and result.backends[0].worst.tensor == "tables.0.weight_grad_values"
    assert [entry["failed"] for entry in report["xfail"]["entries"]] == [["top.0.weight_grad"]]


@pytest.mark.parametrize("scope", [{"backend": "other"}, {"preset": "criteo-*"}, {"phase": "forward"},
                                   {"optimizer": "sgd"}, {"tensor": "top.1.*"}])
def test_an_entry_reaches_no_further_than_it_says(case, scope):
    right = {"backend": "m?ne", "preset": "tiny", "phase": "backward", "optimizer": "", "tensor": "top.0.*"}
    backend = Rounded("mine", faults={"top.0.weight_grad": np.negative})
    assert run(case, [backend], Entry(**right, reason="sign"))[1]["conforms"]
    assert not run(case, [backend], Entry(**right | scope, reason="sign"))[1]["conforms"]


def test_an_update_under_one_optimizer(case):
    fault = {"top.0.weight": lambda w: w + np.float32(1)}
    result, report = run(case, [Rounded("mine", faults=fault)],
                         *(Entry("mine", "top.0.weight", "drifts", optimizer=o) for o in ("adagrad", "sgd")))
    failing = {section.optimizer for section in result.backends[0].sections if any(v.fails for v in section.tensors)}
    assert not report["conforms"] and failing == {"rowwise_adagrad"}


def test_a_failure_that_does_not_come_is_told_and_fails_a_strict_run(case):
    entry = ("rounded", "loss", "I thought so")
    assert run(case, [Rounded()], entry)[1]["conforms"]
    report = run(case, [Rounded()], entry, strict=True)[1]
    assert not report["conforms"] and report["xfail"]["entries"][0]["passes"]
    assert report["cases"][0]["conforms"]
    assert run(case, [Rounded()], ("absent", "loss", "elsewhere"), strict=True)[1]["conforms"], "it was not judged"


def test_neither_errors_nor_emptiness_are_excused(case):
    everything = ("*", "*", "all of it")
    with pytest.raises(EngineError, match="the worker died"):
        run(case, [Rounded("mortal", dies=True)], everything)

    class Empty(Rounded):
        def trace(self, batch):
            return {}

        def predict(self, batch):
            return super().predict(batch) * np.nan

    assert not run(case, [Empty("empty", trains=False)], everything)[1]["conforms"]


@pytest.mark.parametrize(("text", "message"), [
    ("[[xfail]]\nbackend = 'a'\ntensor = '*'\n", "xfail.0.reason: expected a value, found none"),
    ("[[xfail]]\nbackend = 'a'\ntensor = '*'\nreason = ' '\n", "xfail.0.reason: expected text that says something"),
    ("[[xfail]]\nbackend = 'a'\ntensor = 3\nreason = 'x'\n", "xfail.0.tensor: expected text .*, found 3"),
    ("[[xfail]]\nbackends = 'a'\n", "xfail.0.backends: expected one of backend, tensor, reason, preset, phase, optim"),
    ("[[xfails]]\n", "xfails: expected only 'strict' and"),
    ("[xfail]\n", "xfail: expected .*xfail.* tables, found dict"),
    ("strict = 1\n", "strict: expected true or false, found 1"),
    ("strict = \n", "expected TOML, found"),
])
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_expected_failures(path)
    assert caught.value.where.startswith(str(path))


def test_the_command_and_its_reports(tmp_path):
    path = tmp_path / "known.toml"
    path.write_text("strict = true\n[[xfail]]\nbackend = 'sign'\ntensor = 'top.0.weight*'\n"
                    "reason = 'the [sign] is wrong'\n")
    arguments = ["conform", "tiny", "--backend", "faulty:SIGN", "--steps", "1", "--out", str(tmp_path / "report")]
    assert CliRunner().invoke(main, arguments).exit_code == 1
    result = CliRunner().invoke(main, [*arguments, "--xfail", str(path)])
    assert result.exit_code == 0, result.output
    assert "conforms (4 xfail)" in result.output and "as expected: the [sign] is wrong" in result.output
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["xfail"]["strict"] and len(report["xfail"]["entries"][0]["failed"]) == 4
    page = (tmp_path / "report/report.html").read_text()
    assert "as expected</h3>" in page and "the [sign] is wrong" in page and 'class="xfail"' in page
    path.write_text(path.read_text().replace("'sign'", "'torch'"))
    arguments[3] = "torch"
    result = CliRunner().invoke(main, [*arguments, "--xfail", str(path)])
    assert result.exit_code == 1 and "XPASS: torch, top.0.weight*: all " in result.output
    assert "(XPASS)" in (tmp_path / "report/report.html").read_text()
    assert CliRunner().invoke(main, [*arguments, "--xfail", str(tmp_path / "none.toml")]).exit_code == 2


def test_the_template_runs_and_fails_and_is_never_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["conform", "--template", "a_port_of_mine.py"])
    assert result.exit_code == 0 and "--backend a_port_of_mine:BACKEND" in result.output
    result = CliRunner().invoke(main, ["conform", "tiny", "--backend", "a_port_of_mine:BACKEND", "--steps", "0"])
    assert result.exit_code == 1
    assert "my-port does not conform at bottom.0.preactivation: the backend did not return it" in result.output
    for name in ("a_port_of_mine.py", "my-port.py", "port.txt"):
        assert CliRunner().invoke(main, ["conform", "--template", name]).exit_code == 2
    assert CliRunner().invoke(main, ["conform", "tiny", "--template", "b.py"]).exit_code == 2
    assert [path.name for path in tmp_path.glob("*.py")] == ["a_port_of_mine.py"]
