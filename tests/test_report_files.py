"""report.json against its schema, and JUnit XML against what its readers expect."""

import json
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from junitparser import Failure, JUnitXml, Skipped
from rounded import Rounded

from conformance.case import make_case
from conformance.junit import write_junit
from conformance.report import FORMAT, as_dict
from conformance.run import run_case
from conformance.xfail import Entry, ExpectedFailures
from spec.toml import load
from tools.cli import main


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(files("conformance").joinpath("report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["format"]["const"] == FORMAT
    return jsonschema.Draft202012Validator(schema)


class Restless(Rounded):
    repeatable, calls = True, 0

    def predict(self, batch):
        Restless.calls += 1
        probability = super().predict(batch)
        return probability + np.spacing(probability) * np.float32(Restless.calls)


@pytest.fixture(scope="module")
def report():
    """All that there can be: right, wrong, incomplete, missing, forward only, expected to fail, not repeating."""
    wrong = Rounded("wrong", faults={"loss": lambda x: x * np.nan, "top.0.bias_grad": lambda x: x[None]})
    backends = [Rounded(), wrong, Rounded("away", absent=True), Rounded("ahead", trains=False), Restless("restless"),
                Rounded("known", faults={"top.0.weight_grad": np.negative})]
    entries = [Entry("known", "top.0.weight_grad", "the sign"), Entry("rounded", "loss", "I thought so")]
    expected = ExpectedFailures(entries, strict=True)
    case, free = (make_case(load("tiny"), batch_size=8, steps=steps, optimizers=("adagrad",)) for steps in (2, 5))
    return as_dict([run_case(case, backends, expected=expected, repeats=True, free=free)], expected)


def test_a_report_is_what_the_schema_says(validator, report):
    validator.validate(json.loads(json.dumps(report, allow_nan=False)))
    by_name = {backend["backend"]: backend for backend in report["cases"][0]["backends"]}
    assert {name: backend["status"] for name, backend in by_name.items()} == {
        "rounded": "conforms", "wrong": "fails", "away": "missing", "ahead": "conforms", "restless": "fails",
        "known": "conforms"}
    assert by_name["wrong"]["worst"]["worst"] == "inf" and by_name["wrong"]["worst"]["summary"].startswith("loss")
    assert by_name["rounded"]["trajectories"][0]["tensors"] and by_name["restless"]["repeat"]["broken"]


@pytest.mark.parametrize("spoil", [
    lambda report: report.pop("cases"), lambda report: report.update(format=1), lambda report: report.update(more=1),
    lambda report: report["cases"][0]["backends"][0].update(status="fine"),
    lambda report: report["cases"][0]["backends"][0]["ledger"].pop("required"),
    lambda report: report["cases"][0]["backends"][1]["worst"].update(worst="Infinity")])
def test_the_schema_refuses_what_is_no_report(validator, report, spoil):
    other = json.loads(json.dumps(report))
    spoil(other)
    assert not validator.is_valid(other)


def test_what_the_command_writes_is_valid(validator, tmp_path):
    result = CliRunner().invoke(main, [
        "conform", "tiny", "--backend", "torch", "--optimizer", "sgd", "--steps", "1", "--trajectory", "3", "--json",
        str(tmp_path / "report.json"), "--junit", str(tmp_path / "report.xml")])
    assert result.exit_code == 0 and "torch, 3 steps on its own, distance / bound: sgd" in result.output, result.output
    validator.validate(json.loads((tmp_path / "report.json").read_text()))
    suite, = JUnitXml.fromfile(str(tmp_path / "report.xml"))
    assert suite.name == "tiny.torch" and suite.tests > 60 and suite.failures == suite.skipped == 0
    assert "PyTorch" in next(iter(suite.properties())).value


def test_junit_tells_failures_from_what_was_expected_or_is_missing(report, tmp_path):
    write_junit(report, tmp_path / "report.xml")
    document = JUnitXml.fromfile(str(tmp_path / "report.xml"))
    found = {suite.name: {(test.classname, test.name): test for test in suite} for suite in document}
    assert {"tiny.rounded", "tiny.wrong", "tiny.away", "tiny.ahead", "tiny.pairs", "xfail"} <= found.keys()

    def results(suite, kind):
        return {key for key, test in found[suite].items() if any(isinstance(r, kind) for r in test.result)}

    assert not results("tiny.rounded", Failure | Skipped)
    assert ("tiny.wrong.forward", "loss") in results("tiny.wrong", Failure)
    (message,) = [r.message for r in found["tiny.wrong"]["tiny.wrong.backward", "top.0.bias_grad"].result]
    assert "expected float32[" in message
    assert results("tiny.away", Skipped) == {("tiny.away", "available")}
    assert results("tiny.known", Skipped) == {("tiny.known.backward", "top.0.weight_grad")}
    assert results("tiny.restless", Failure) == {("tiny.restless", "repeats its bits")}
    assert results("xfail", Failure) == {("xfail.rounded", "loss")}
    assert ("tiny.rounded.adagrad.trajectory", "loss") in found["tiny.rounded"]
    assert document.failures == sum(len(results(suite, Failure)) for suite in found)
