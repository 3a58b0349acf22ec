"""Bundles: written here, computed and judged by processes that have NumPy and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from conformance import judge
from conformance.bundle import CHECKSUM, MANIFEST, open_bundle, sha256
from conformance.bundle_writer import make_bundle_case, write_bundle
from conformance.case import OPTIMIZERS, make_case
from conformance.foreign import run_bundle
from conformance.judge import judge_results
from conformance.selection import without_kinks
from spec.backend import load_backend
from spec.batch import Batch
from spec.errors import InputError
from spec.reference import evaluate
from spec.toml import load
from tools.cli import main

PORT = Path(__file__).parents[1] / "conformance/examples/numpy/port.py"


@pytest.fixture(scope="module")
def numpy_alone(tmp_path_factory):
    """Runs a Python program that can import NumPy and the standard library."""
    only = tmp_path_factory.mktemp("only")
    home = Path(find_spec("numpy").origin).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (home / name).exists():
            (only / name).symlink_to(home / name)

    def run(*arguments):
        return subprocess.run([sys.executable, "-S", *map(str, arguments)], env={"PYTHONPATH": str(only)},
                              capture_output=True, text=True, cwd=only)

    for absent in ("pydantic", "click", "torch", "spec", "conformance"):
        assert run("-c", f"import {absent}").returncode == 1
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory, numpy_alone):
    """A bundle of `tiny` with the results of the NumPy program; not to be changed."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    result = invoke("tiny", "--write-bundle", folder)
    assert result.exit_code == 0 and "8 cases" in result.output, result.output
    assert numpy_alone(PORT, folder, "numpy").returncode == 0
    return folder


@pytest.fixture
def bundle(original, tmp_path):
    return shutil.copytree(original, tmp_path / "b")


def invoke(*arguments):
    return CliRunner().invoke(main, ["conform", *map(str, arguments)])


def failing(bundle, name="numpy"):
    return {verdict.tensor for verdict in judge_results(open_bundle(bundle), bundle / "results" / name).verdicts
            if not verdict.conforms}


def test_a_program_that_has_numpy_alone_is_judged_by_one_that_has_numpy_alone(original, numpy_alone, tmp_path):
    """Issue 4, must show 4: a copy of the bundle is enough, whatever is installed."""
    run = numpy_alone(original / "judge.py", "--json", tmp_path / "report.json")
    assert run.returncode == 0 and run.stdout.startswith("numpy conforms: "), run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["conforms"] and report["results"][0]["elements"] > 20_000
    assert [section["optimizer"] for section in report["results"][0]["sections"]] == [None, *OPTIMIZERS]
    assert numpy_alone(original / "judge.py").returncode == 0, "judging leaves nothing in the bundle"


def test_the_command_judges_and_reports_as_it_does_for_backends(original, tmp_path):
    result = invoke("--bundle", original, "--out", tmp_path)
    assert result.exit_code == 0 and re.search(r"numpy +│ conforms", result.output), result.output
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert case["backends"][0]["backend"] == "numpy" and case["steps"] == 2
    assert "results in files" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("right", "wrong", "tensor"), [
    ("i, j = pairs(spec, len(vectors))", "i, j = np.triu_indices(len(vectors), 1)", "interaction.output"),
    ("terms = terms * w[", "terms = terms + 0 * w[", "tables.2.pooled"),
    ("pooled *= (f32(1) / np.maximum(lengths, 1)", "pooled *= (f32(1) / np.maximum(lengths, 2)", "tables.1.pooled"),
    ("np.where(y > 0, dy, 0)", "np.where(y >= 0, dy, 0)", "bottom.0.preactivation_grad"),
    ("[g_output[:, :e] + features[:, 0]", "[features[:, 0]", "bottom.1.activation_grad"),
    ("dy.T @ before, dy.sum(0)", "dy.T @ before, dy.mean(0)", "top.1.bias_grad"),
    ("np.add.at(gradient, place, ", "gradient[place] = (", "tables.0.weight"),
    ("(gradient**2).mean(1)", "(gradient**2).sum(1)", "tables.0.weight.moment"),
    ("return w | h", "return w", "bottom.0.weight.moment"),
    ("w[name][rows] -= rate * gradient / (", "w[name] -= f32(1e-9)\n        w[name][rows] -= rate * gradient / (",
     "tables.3.weight"),
    ("write(results / \"forward\", t)", "write(results / \"forward\", {k: v.astype('f8') for k, v in t.items()})",
     "probability"),
])
def test_a_program_with_a_fault_fails_and_is_told_where(original, tmp_path, capsys, right, wrong, tensor):
    text = PORT.read_text()
    assert text.count(right) == 1
    program = {"__name__": "program"}
    exec(text.replace(right, wrong), program)
    program["main"](original, tmp_path / "wrong")
    verdicts = judge_results(open_bundle(original), tmp_path / "wrong").verdicts
    assert tensor in {verdict.tensor for verdict in verdicts if not verdict.conforms}
    assert judge.main([str(original), str(tmp_path / "wrong")]) == 1
    assert capsys.readouterr().out.startswith("wrong does not conform: ")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_bundle_with_one_flipped_bit_is_refused_whichever_file_it_is_in(bundle):
    shutil.rmtree(bundle / "results")
    files = sorted(path for path in bundle.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 500
    own = [bundle / name for name in (MANIFEST, CHECKSUM, "spec.toml", "judge.py")]
    for path in [*own, *files[::9]]:
        content = path.read_bytes()
        flipped(path)
        with pytest.raises(InputError, match="the bundle was changed or cut short") as caught:
            open_bundle(bundle)
        named = MANIFEST if path.name == CHECKSUM else path.relative_to(bundle).as_posix()
        assert caught.value.where == str(bundle / named)
        path.write_bytes(content)
    open_bundle(bundle)


def another_version(bundle):
    path = bundle / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    (bundle / CHECKSUM).write_text(f"{sha256(path)}  {MANIFEST}\n")


@pytest.mark.parametrize(("change", "message"), [
    (lambda b: flipped(b / "expected/forward/loss.value.npy"), "expected/forward/loss.value.npy: expected SHA-256 "),
    (lambda b: flipped(b / "BUNDLE.md"), "BUNDLE.md: expected SHA-256 "),
    (lambda b: (b / "spec.toml").write_text("name"), "spec.toml: expected "),
    (lambda b: (b / "given/batch.2/dense.npy").unlink(), "given/batch.2/dense.npy: expected a file of the bundle"),
    (lambda b: (b / "given/batch.2/notes.txt").touch(), "given/batch.2/notes.txt: expected only files"),
    (lambda b: (b / MANIFEST).unlink(), "manifest.json: expected a file of the bundle, found none; name a folder"),
    (another_version, "manifest.json: expected dlrm-bundle version 1, found dlrm-bundle version 2"),
    (lambda b: shutil.rmtree(b / "results"), "results: expected a folder for each program's results, found none"),
])
def test_what_is_wrong_with_a_bundle_is_one_line_and_exit_status_2(bundle, numpy_alone, change, message):
    change(bundle)
    result = invoke("--bundle", bundle)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"dlrm: {bundle}/{message}")
    run = numpy_alone(bundle / "judge.py")
    assert run.returncode == 2 and line.removeprefix("dlrm: ") in run.stderr


def test_a_changed_judge_does_not_run(bundle, numpy_alone):
    flipped(bundle / "judge/conformance/verdict.py")
    run = numpy_alone(bundle / "judge.py")
    assert run.returncode == 2 and "judge/conformance/verdict.py: is missing or was changed" in run.stderr


def save(change):
    def rewrite(path):
        np.save(path, change(np.load(path)))
    return rewrite


@pytest.mark.parametrize(("file", "change", "message"), [
    ("forward/bottom.0.preactivation", Path.unlink, "no file forward/bottom.0.preactivation.npy"),
    ("forward/probability", save(np.zeros_like), "= 0, expected"),
    ("forward/loss", save(lambda x: x[None]), "expected float32[], found float32[1]"),
    ("backward/top.0.weight_grad", save(np.transpose), "expected float32"),
    ("backward/top.0.weight_grad", save(lambda x: x * np.nan), "= nan, expected"),
    ("backward/top.0.weight_grad", save(lambda x: x[:0]), "expected float32"),
    ("backward/top.0.weight_grad", lambda path: path.write_bytes(path.read_bytes()[:200]), "is no .npy file"),
    ("backward/top.0.weight_grad", lambda path: path.write_text("0.5"), "is no .npy file of numbers"),
    ("backward/top.0.weight_grad", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "is no .npy file"),
    ("backward/tables.1.weight_grad_indices", save(lambda x: x * 0 + 29), "was not looked up|expected"),
    ("backward/tables.1.weight_grad_values", Path.unlink, "no file backward/tables.1.weight_grad_values.npy"),
    ("adagrad.2/tables.0.weight", save(lambda x: np.nextafter(x, x + 1)), "changed, and was not looked up"),
    ("sgd.1/tables.2.pooling", save(lambda x: x + 1), "changed, and is not trained"),
])
def test_what_is_wrong_with_a_result_is_a_verdict(bundle, file, change, message):
    change(bundle / "results/numpy" / f"{file}.npy")
    result = invoke("--bundle", bundle)
    assert result.exit_code == 1 and re.search(message, result.output.replace("\n", " ")), result.output


@pytest.mark.parametrize("null", ["nothing", "zeros", "unchanged"])
def test_null_results_fail_in_every_case(bundle, null):
    manifest = open_bundle(bundle).manifest
    for case in manifest["cases"]:
        folder = bundle / "results/null" / case["name"]
        folder.mkdir(parents=True)
        for tensor in case["tensors"]:
            if null == "zeros" or (null == "unchanged" and "before" not in tensor):
                right = bundle / "results/numpy" / case["name"] / f"{tensor['name']}.npy"
                shape = tensor["shape"] if tensor["kind"] == "slice" else np.load(right).shape
                np.save(folder / f"{tensor['name']}.npy", np.zeros(shape, np.float32))
            elif null == "unchanged":
                shutil.copy(bundle / tensor["before"], folder / f"{tensor['name']}.npy")
    right = {tensor["name"] for case in manifest["cases"] for tensor in case["tensors"] if tensor["kind"] == "fixed"}
    judged = judge_results(open_bundle(bundle), bundle / "results/null").verdicts
    assert {verdict.tensor for verdict in judged if verdict.conforms} <= (right if null == "unchanged" else set())


def test_a_sparse_gradient_may_be_dense(bundle):
    folder = bundle / "results/numpy/backward"
    for values in sorted(folder.glob("*_grad_values.npy")):
        name = values.name.removesuffix("_values.npy")
        indices = folder / f"{name}_indices.npy"
        weight = np.load(bundle / f"given/parameters/{name.removesuffix('_grad')}.npy")
        dense = np.zeros_like(weight)
        np.add.at(dense, np.load(indices), np.load(values))
        np.save(folder / f"{name}.npy", dense)
        assert f"{name.removesuffix('_grad')}_grad" in failing(bundle), "both forms at once"
        values.unlink(), indices.unlink()
    assert not failing(bundle)
    np.save(folder / "tables.0.weight_grad.npy", np.ones((40, 8), np.float32))
    assert failing(bundle) == {"tables.0.weight_grad"}


def test_a_port_that_only_predicts_is_judged_as_one(bundle, numpy_alone):
    shutil.rmtree(bundle / "results/numpy/backward")
    shutil.rmtree(bundle / "results/numpy/adagrad.1")
    run = numpy_alone(bundle / "judge.py", "--only", "forward", "--only", "sgd")
    assert run.returncode == 0 and "not judged: backward, adagrad.1, " in run.stdout
    assert numpy_alone(bundle / "judge.py").returncode == 1
    run = numpy_alone(bundle / "judge.py", "--only", "forwards")
    assert run.returncode == 2 and "--only forwards: expected one of forward, backward, sgd" in run.stderr


def test_kinks_are_left_out():
    """Samples planted on the kink of a ReLU go; the others stay, whole and in order."""
    case = make_case(load("tiny"), steps=2)
    parameters = case.parameters | {"bottom.0.bias": np.zeros(16, np.float32)}
    for batch in case.batches:
        batch.dense[[3, 7]] = 0  # 16 preactivations of exactly 0
        assert evaluate(case.spec, parameters, batch).kinks == {"bottom.0.preactivation": 32}
    (first, second), passed = without_kinks(case.spec, parameters, iter(case.batches), 30, 2)
    assert passed == 4
    for batch, whole in zip((first, second), case.batches, strict=True):
        assert not evaluate(case.spec, parameters, batch).kinks
        left = np.delete(np.arange(32), [3, 7])
        expected = evaluate(case.spec, parameters, whole, gradients=False).tensors
        found = evaluate(case.spec, parameters, batch, gradients=False).tensors
        assert all(np.allclose(found[name].value, expected[name].value[left], rtol=1e-12, atol=0)
                   for name in expected if name != "loss")
    for batch in case.batches:
        batch.dense[:] = 0
    with pytest.raises(InputError, match="expected samples without a ReLU or a clip at its kink, found 0 in 512"):
        without_kinks(case.spec, parameters, repeat(case.batches[0]), 32, 2)


def results_of_torch(bundle, folder):
    """What our PyTorch backend makes of the cases that it can begin: those without earlier state."""
    spec = load("tiny")
    for case in open_bundle(bundle).manifest["cases"]:
        given = [{path.name.removesuffix(".npy"): np.load(path) for path in (bundle / case[part]).glob("*.npy")}
                 for part in ("parameters", "batch")]
        batch = Batch.from_arrays(spec, given[1])
        if case["optimizer"] is None:
            arrays = load_backend("torch").create(spec, given[0]).trace(batch)
        elif case["step"] == 1 or case["optimizer"] == "sgd":
            trained = spec.with_optimizer(case["optimizer"], case["learning_rate"])
            model = load_backend("torch").create(trained, given[0])
            arrays = {"loss": np.float32(model.train_step(batch))} | model.parameters() | model.optimizer_state()
        else:
            continue
        (folder / case["name"]).mkdir(parents=True)
        for name, array in arrays.items():
            np.save(folder / case["name"] / f"{name}.npy", array)


def test_a_shipped_backend_conforms_to_the_bundle(bundle):
    results_of_torch(bundle, bundle / "results/torch")
    judgement = judge_results(open_bundle(bundle), bundle / "results/torch", ["forward", "backward", "sgd"])
    assert judgement.conforms and judgement.elements > 10_000
    all_cases = judge_results(open_bundle(bundle), bundle / "results/torch")
    assert {verdict.problem for verdict in all_cases.verdicts if not verdict.conforms} and all(
        re.match(r"no file \w*adagrad\.2/", verdict.problem) for verdict in all_cases.verdicts if not verdict.conforms)


def test_the_worked_example_of_the_format_runs_and_checks(original, tmp_path):
    text = (original / "BUNDLE.md").read_text().split("## Example")[1]
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    (tmp_path / "bundle").symlink_to(original)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert "+ b" in code
    wrong = subprocess.run([sys.executable, "-c", code.replace("+ b", "- b")], cwd=tmp_path, capture_output=True)
    assert b"AssertionError" in wrong.stderr


def test_offsets_point_at_the_numbers(original):
    for name, facts in open_bundle(original).manifest["files"].items():
        if "offset" in facts:
            raw = np.frombuffer((original / name).read_bytes()[facts["offset"]:], facts["dtype"])
            assert np.array_equal(raw.reshape(facts["shape"]), np.load(original / name))


@pytest.mark.parametrize("arguments", [
    [], ["tiny", "--bundle", "b"], ["--bundle", "b", "--steps", "1"], ["tiny", "tiny", "--write-bundle", "b"],
    ["tiny", "--write-bundle", "b", "--backend", "torch"]])
def test_options_that_do_not_go_together(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Error: " in result.stderr


def test_bundles_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "expected a new or an empty folder" in invoke("tiny", "--write-bundle", tmp_path / "full").stderr
    assert invoke("tiny", "--write-bundle", tmp_path / "full/file/b").exit_code == 2
    monkeypatch.setattr("conformance.bundle_writer.shutil.disk_usage", lambda path: type("", (), {"free": 10}))
    assert "free disk" in invoke("tiny", "--write-bundle", tmp_path / "b").stderr
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["criteo-kaggle", "rmc1"])
def test_the_numpy_program_conforms_on_presets(preset, tmp_path, numpy_alone):
    case, passed = make_bundle_case(load(preset).capped(100), "random", 0, 8, 2, OPTIMIZERS)
    write_bundle(case, passed, tmp_path / "b")
    assert numpy_alone(PORT, tmp_path / "b", "numpy").returncode == 0
    judgement = judge_results(open_bundle(tmp_path / "b"), tmp_path / "b/results/numpy")
    assert judgement.conforms
    assert all(v.null_ratio is None or v.null_ratio > 1 for v in judgement.verdicts)


@pytest.mark.parametrize("change", [
    {"loss": {"kind": "mse"}}, {"loss": {"kind": "bce_logits"}}, {"loss": {"kind": "bce", "clip": 0.3}},
    {"loss": {"kind": "wbce", "weights": [0.7, 1.9]}}, {"interaction": {"kind": "cat"}},
    {"interaction": {"kind": "dot", "self_interaction": True}},
    {"bottom": {"widths": [16, 8], "activation": "sigmoid"}}])
def test_the_numpy_program_follows_every_option_of_the_spec(change, tmp_path, numpy_alone):
    spec = type(load("tiny")).model_validate(load("tiny").model_dump() | change)
    case, passed = make_bundle_case(spec, "random", 0, None, 2, OPTIMIZERS)
    write_bundle(case, passed, tmp_path / "b")
    assert numpy_alone(PORT, tmp_path / "b", "numpy").returncode == 0
    assert not failing(tmp_path / "b")


@pytest.mark.parametrize("file", ["forward/top.0.preactivation", "backward/tables.3.weight_grad_values"])
def test_files_are_replayed(bundle, file):
    """The program's other files are right, so they do not follow from the one that is changed."""
    path = bundle / "results/numpy" / f"{file}.npy"
    if not path.exists():  # the program writes this gradient whole
        path = path.with_name(path.name.replace("_values", ""))
    np.save(path, np.load(path) * np.float32(1.01))
    (result,) = run_bundle(open_bundle(bundle)).backends
    assert result.status == "fails" and result.fault.tensor == file.rpartition("/")[2]
