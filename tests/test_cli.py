"""The command as a user meets it. Bad input is one line naming path, expected and found, and exit status 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from conformance.case import make_case
from spec import tensor_file, toml
from tools.cli import main

DLRM = Path(sys.executable).parent / "dlrm"


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line on stderr of a command that must exit 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("dlrm: ")
    return line.removeprefix("dlrm: ")


def tiny_file(folder, old, new):
    path = folder / "my.toml"
    text = toml.dumps(toml.load("tiny"))
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def tiny_batch(folder, **changes):
    """An .npz of one good batch of `tiny`, but for the arrays in `changes` (functions of the good array)."""
    named = make_case(toml.load("tiny"), steps=1).batches[0].arrays()
    for name, change in changes.items():
        named[name] = change(named[name].copy())
    path = folder / "batch.npz"
    np.savez(path, **named)
    return path


def put(place, value):
    def change(array):
        array[place] = value
        return array
    return change


def test_unknown_preset_suggests_the_right_one():
    assert refused("conform", "criteo-kagle") == (
        "spec 'criteo-kagle': expected one of " + ", ".join(toml.preset_names()) + ", or a .toml file, "
        "found no such preset; did you mean 'criteo-kaggle'?")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("batch_size = 32", "batch_sise = 32", "batch_sise: expected only known keys, found an unknown key; "
                                           "did you mean 'batch_size'?"),
    ("embedding_dim = 8", "embedding_dim = 9", "bottom.widths: expected a last width of 9, the embedding_dim, "
                                               "found 8; "),
    ("rows = 40", "rows = 0", "tables.0.rows: expected greater than 0, found 0; "),
    ("rows = 40", "rows = -3", "tables.0.rows: expected greater than 0, found -3; "),
    ("learning_rate = 0.1", "learning_rate = 0.0", "optimizer.learning_rate: expected greater than 0, found 0.0; "),
])
def test_bad_specs(tmp_path, old, new, message):
    path = tiny_file(tmp_path, old, new)
    assert refused("spec", "validate", path).startswith(f"{path}: {message}")
    assert refused("conform", path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(("name", "change", "message"), [
    ("tables.1.indices", put(0, 30), "tables.1.indices[0]: expected 0 to 29, a row of the table, found 30"),
    ("tables.1.indices", put(0, -1), "tables.1.indices[0]: expected 0 to 29, a row of the table, found -1"),
    ("tables.1.indices", lambda a: a[1:], "tables.1.lengths: expected a sum of"),
    ("dense", put((2, 3), np.nan), "dense[2, 3]: expected a finite number, found nan"),
    ("dense", lambda a: a.astype(np.float64), "dense: expected dtype float32, found float64"),
    ("tables.0.indices", lambda a: a.astype(np.int32), "tables.0.indices: expected dtype int64, found int32"),
])
def test_bad_batches(tmp_path, name, change, message):
    path = tiny_batch(tmp_path, **{name: change})
    assert refused("conform", "tiny", "--data", f"npz:{path}").startswith(f"{path}: {message}")


def test_good_batches_of_ones_own(tmp_path):
    folder = tmp_path / "[" / "b]"  # "[/b]" is markup to a careless printer
    folder.mkdir(parents=True)
    result = invoke("conform", "tiny", "--data", f"npz:{tiny_batch(folder)}", "--steps", 1, "--backend", "torch")
    assert result.exit_code == 0 and "[/b]" in result.output, result.output


def test_criteo_row_with_38_fields(tmp_path):
    path = tmp_path / "rows.tsv"
    row = ["1", *["3"] * 13, *["0a1b2c3d"] * 26]
    path.write_text("\t".join(row) + "\n" + "\t".join(row[:38]) + "\n")
    assert refused("conform", "criteo-kaggle", "--max-rows", 100, "--data", f"criteo:{path}").startswith(
        f"{path}:2: expected 40 tab-separated fields")


@pytest.mark.parametrize("arguments", [["--backend", "no-such"], ["--data", "nonsense"], ["--device", "tpu"],
                                       ["--data", "criteo:/no/such/file"]])
def test_other_bad_options_are_one_line(arguments):
    assert "expected" in refused("conform", "tiny", "--steps", 0, *(
        arguments if "--backend" in arguments else ["--backend", "torch", *arguments]))


@pytest.mark.parametrize("arguments", [["conform"], ["export", "--out", "never-made"]])
def test_a_model_larger_than_the_memory(arguments, monkeypatch):
    monkeypatch.setattr("spec.memory._memory", lambda: 2**30)
    assert re.match(r"spec 'criteo-kaggle': expected .*parameters that fit into 1.0 GiB of memory, found [\d.]+ GiB; "
                    "cap the tables with --max-rows", refused(arguments[0], "criteo-kaggle", *arguments[1:]))


def test_a_batch_larger_than_the_memory():
    assert re.match(r"spec 'tiny': expected activations of 100,000,000 samples that fit into [\d.]+ GiB of memory, "
                    r"found [\d.]+ GiB; use a smaller --batch-size", refused("conform", "tiny", "--batch-size", 10**8))


def test_an_import_that_is_no_backend():
    assert refused("conform", "tiny", "--backend", "os:path") == (
        "backend 'os:path': expected an object with the attributes of spec.backend.Backend, found module; "
        "name an instance that has them")


def test_unwritable_folders(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for arguments in (["conform", "tiny", "--steps", 0, "--out", blocked / "report"],
                      ["conform", "tiny", "--steps", 0, "--json", blocked / "report.json"],
                      ["export", "tiny", "--out", blocked / "models"]):
        assert "expected a writable folder" in refused(*arguments)
    assert blocked.read_text() == "in the way" and list(tmp_path.iterdir()) == [blocked]


def test_report_files_appear_whole(tmp_path):
    result = invoke("conform", "tiny", "--backend", "torch", "--steps", 1, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["conforms"] and report["cases"][0]["backends"][0]["elements"] > 10_000


def test_specs_can_be_listed_shown_and_capped(tmp_path):
    assert "criteo-kaggle" in invoke("spec", "list").output
    shown = invoke("spec", "show", "criteo-kaggle", "--max-rows", 100)
    spec = toml.loads(shown.output, "shown")
    assert spec.is_capped and max(table.rows for table in spec.tables) == 100
    assert max(table.published_rows or 0 for table in spec.tables) == 10131227
    path = tmp_path / "shown.toml"
    path.write_text(shown.output)
    assert invoke("spec", "validate", path).exit_code == 0
    assert json.loads(invoke("spec", "schema").output)["$schema"]


@pytest.mark.parametrize("command", [[], ["spec"], ["spec", "list"], ["spec", "show"], ["spec", "validate"],
                                     ["spec", "schema"], ["conform"], ["bench"], ["export"], ["engine"],
                                     ["engine", "install"], ["engine", "status"], ["engine", "check"]])
def test_every_help_shows_an_example(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert re.search(r"Example:\s+dlrm ", result.output) or command in (["spec"], ["engine"])


@pytest.mark.parametrize("arguments", [
    ["conform", "criteo-kaggle", "--max-rows", "1000", "--backend", "torch", "--steps", "1000"],
    ["export", "criteo-kaggle", "--external-data", "--format", "onnx"]])
def test_interrupting_exits_130_at_once_and_writes_nothing(arguments, tmp_path):
    """An export of 2 GB is in the middle of its first file: there is something to remove."""
    out = tmp_path / "out"
    process = subprocess.Popen([DLRM, *arguments, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + (4 if arguments[0] == "conform" else 60)
    while time.monotonic() < deadline and not list(out.glob(".model.safetensors.*")):
        time.sleep(0.05)
    assert arguments[0] == "conform" or list(out.iterdir())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr.decode().strip().endswith("dlrm: interrupted")
    assert not list(out.glob("*")) and not list(out.glob(".*"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """tiny as NetDefs and, in a folder of its own, as ONNX models that refer to a file."""
    folder = tmp_path_factory.mktemp("written")
    for options in (["--format", "netdef"], ["--format", "onnx", "--external-data"]):
        assert invoke("export", "tiny", "--out", folder / options[1], *options).exit_code == 0
    return folder


def no_such_operator(folder):
    path = folder / "netdef/train_net.pb"
    path.write_bytes(path.read_bytes().replace(b"ReluGradient", b"ReluGredient"))


def newer_opset(folder):
    path = folder / "onnx/model.inlined.onnx"
    model = onnx.load(path, load_external_data=False)
    model.opset_import[0].version = onnx.defs.onnx_opset_version() + 1
    onnx.save(model, path)


def truncated(name):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    return change


def without(name):
    return lambda folder: (folder / name).unlink()


def a_file_for(name):
    return lambda folder: (folder / name).write_text("in the way")


NET = ["export", "--netdef", "netdef/predict_net.pb", "--init", "netdef/init_net.pb", "--out", "out"]


@pytest.mark.parametrize(("change", "arguments", "message"), [
    (no_such_operator, ["export", "--netdef", "netdef/train_net.pb", "--out", "out"],
     "netdef/train_net.pb: net 'tiny_train': expected operators that this package knows, found others: ReluGredient"),
    (truncated("netdef/predict_net.pb"), NET, "netdef/predict_net.pb: expected a serialized caffe2 NetDef"),
    (truncated("netdef/init_net.pb"), NET, "netdef/init_net.pb: expected a serialized caffe2 NetDef"),
    (without("netdef/init_net.pb"), NET, "netdef/init_net.pb: expected a readable NetDef file"),
    (truncated("netdef/train_net.pb"), ["engine", "check", "netdef/train_net.pb"], "netdef/train_net.pb: expected a"),
    (None, [*NET, "--input", "dense"], "--input 'dense': expected NAME=TYPE or NAME=TYPE[SIZES]"),
    (None, [*NET, "--input", "dense=float31"], "--input 'dense=float31': expected a type: float32"),
    (None, [*NET, "--input", "dense=float32[B,"], "--input 'dense=float32[B,': expected NAME=TYPE"),
    (None, [*NET, "--input", "dens=float32"], "--input 'dens=float32': expected one of the net's inputs: dense"),
    (None, [*NET, "--output", "logit"], "--output 'logit': expected a blob that the net makes"),
    (truncated("onnx/model.safetensors"), ["export", "tiny", "--parameters", "onnx/model.safetensors", "--out", "out"],
     "onnx/model.safetensors: expected a whole safetensors file"),
    (without("onnx/model.safetensors"), ["engine", "check", "onnx/model.onnx"],
     "onnx/model.onnx: initializer 'tables.0.weight': expected external data in onnx/model.safetensors, found no such"),
    (truncated("onnx/model.safetensors"), ["engine", "check", "onnx/model.onnx"],
     "onnx/model.onnx: initializer 'tables."),
    (truncated("onnx/train.onnx"), ["engine", "check", "onnx/train.onnx"],
     "onnx/train.onnx: expected a serialized ONNX model"),
    (newer_opset, ["engine", "check", "onnx/model.inlined.onnx"], "onnx/model.inlined.onnx: "),
    (a_file_for("out"), ["export", "tiny", "--out", "out"], "out/init_net.pb: expected a writable folder"),
    (a_file_for("out"), [*NET, "--input", "*indices=int64"], "out/predict_net.onnx: expected a writable folder"),
])
def test_bad_files_and_folders_of_exports(change, arguments, message, written, tmp_path, monkeypatch):
    """And nothing is written."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if change:
        change(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    line = refused(*arguments)
    assert line.startswith(message)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.engine
def test_a_killed_worker_ends_the_command_and_leaves_nothing_behind(caffe2_engine, tmp_path):
    process = subprocess.Popen([DLRM, "conform", "criteo-kaggle", "--max-rows", "1000", "--backend", "caffe2",
                                "--steps", "1000", "--out", tmp_path / "out"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    workers = children(process.pid)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=20)
    (line,) = stderr.decode().splitlines()
    assert process.returncode == 2 and stdout == b""
    assert line.startswith("dlrm: caffe2: ") and "SIGKILL" in line
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list((tmp_path / "out").glob("*"))


def test_a_corrupted_net_file_is_named(tmp_path):
    assert invoke("export", "tiny", "--out", tmp_path, "--format", "netdef").exit_code == 0
    paths = [tmp_path / f"{name}_net.pb" for name in ("init", "predict", "train")]
    checked = invoke("engine", "check", *paths).output.splitlines()
    assert [line.split(": ")[0] for line in checked] == [str(path) for path in paths]
    for content in (paths[1].read_bytes()[:-7], b"\xff" * 100, b"", b"not a net"):
        paths[1].write_bytes(content)
        assert re.match(f"{paths[1]}: expected a .*NetDef.*, found ", refused("engine", "check", paths[1]))
    paths[1].write_bytes(paths[2].read_bytes().replace(b"ReluGradient", b"ReluGredient"))
    assert "ReluGredient" in refused("engine", "check", paths[1])


def test_a_file_of_parameters_becomes_the_models_own(tmp_path):
    """Where it lies in the folder it is referred to as it is; elsewhere its values are part of the models."""
    result = invoke("export", "tiny", "--out", tmp_path, "--seed", 7, "--external-data", "--format", "onnx")
    assert result.exit_code == 0, result.output
    stored = tmp_path / "model.safetensors"
    own, before = stored.rename(tmp_path / "own.safetensors"), {path.name for path in tmp_path.iterdir()}
    content = own.read_bytes()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        result = invoke("export", "tiny", "--out", folder, "--parameters", own)
        assert result.exit_code == 0, result.output
        initializers = {tensor.name: tensor for tensor in onnx.load(
            folder / "model.onnx", load_external_data=False).graph.initializer}
        refers = {entry.key: entry.value for entry in initializers["tables.0.weight"].external_data}
        assert refers.get("location") == ("own.safetensors" if folder == tmp_path else None)
        values = onnx.load(folder / "model.onnx").graph.initializer
        for name, array in tensor_file.read(own).arrays.items():
            (found,) = [onnx.numpy_helper.to_array(value) for value in values if value.name == name]
            np.testing.assert_array_equal(found, array)
    assert own.read_bytes() == content and before <= {path.name for path in tmp_path.iterdir()}
    assert not stored.exists()


def test_parameters_of_another_model_are_refused(tmp_path):
    assert invoke("export", "tiny", "--out", tmp_path, "--external-data", "--format", "onnx").exit_code == 0
    stored = tmp_path / "model.safetensors"
    arrays = {name: np.array(array) for name, array in tensor_file.read(stored).arrays.items()}

    def refused_with(changed):
        types = {name: tensor_file.ArrayType(array.dtype, array.shape) for name, array in changed.items()}
        tensor_file.write(tmp_path / "changed.safetensors", types, changed.__getitem__)
        line = refused("export", "tiny", "--out", tmp_path / "out", "--parameters", tmp_path / "changed.safetensors")
        assert not (tmp_path / "out").exists()
        return line.removeprefix(f"{tmp_path}/changed.safetensors: ")

    assert refused_with({name: array for name, array in arrays.items() if name != "top.0.bias"}).startswith(
        "top.0.bias: expected a parameter, found none")
    assert refused_with(arrays | {"tables.9.weight": arrays["tables.0.weight"]}).startswith(
        "tables.9.weight: expected only parameters of spec 'tiny'")
    assert refused_with(arrays | {"top.0.bias": arrays["top.0.bias"].astype(np.float16)}).startswith(
        "top.0.bias: expected float32[16], found float16[16]")
    assert refused_with(arrays | {"top.0.bias": arrays["top.0.bias"][1:]}).startswith(
        "top.0.bias: expected float32[16], found float32[15]")
    stored.write_bytes(stored.read_bytes()[:-1])
    assert "expected a whole safetensors file" in refused("export", "tiny", "--out", tmp_path, "--parameters", stored)
    assert "not both" in invoke("export", "tiny", "--out", tmp_path, "--parameters", stored, "--seed", 1).output


def test_a_step_that_returns_the_rows_that_change(tmp_path):
    arguments = ["export", "tiny", "--out", tmp_path, "--table-updates", "rows"]
    assert invoke(*arguments, "--format", "onnx").exit_code == 0
    for path in (tmp_path / "train.onnx", tmp_path / "train.inlined.onnx"):
        outputs = {value.name: value for value in onnx.load(path).graph.output}
        assert {"tables.0.weight.new_rows", "tables.0.weight.new_values", "top.0.bias.new"} <= outputs.keys()
        assert "tables.0.weight.new" not in outputs
        assert "rows of tables.0.weight that change" in outputs["tables.0.weight.new_rows"].doc_string
    assert invoke(*arguments, "--format", "netdef").exit_code == 2
    assert invoke(*arguments, "--tables", "int8").exit_code == 2


def test_progress_is_drawn_on_a_terminal(tmp_path):
    run = subprocess.run([DLRM, "export", "tiny", "--format", "onnx", "--external-data", "--out", tmp_path],
                         capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": "1"})
    assert run.returncode == 0 and run.stdout.splitlines()[0] == str(tmp_path / "model.safetensors")
    assert "tiny: onnx" in run.stderr and "model.safetensors: " in run.stderr


def test_any_net_leaves_caffe2(tmp_path):
    assert invoke("export", "tiny", "--out", tmp_path, "--format", "netdef").exit_code == 0
    net, init = tmp_path / "predict_net.pb", tmp_path / "init_net.pb"
    arguments = ["export", "--netdef", net, "--init", init, "--out", tmp_path]
    assert "undetermined: 'tables.0.indices' (int32 or int64, rank 1)" in refused(*arguments)
    result = invoke(*arguments, "--input", "*.indices=int64", "--input", "dense=float32[B,5]")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[:2] == [str(tmp_path / "predict_net.onnx"), str(tmp_path / "predict_net.inlined.onnx")]
    assert "input tables.0.lengths=int32[B]" in lines and lines[-1] == "output probability=float32[B,1]"
    for bad in (["tiny"], ["--seed", 0], ["--format", "onnx"]):
        assert invoke(*arguments, *bad).exit_code == 2
    assert invoke("export", "--out", tmp_path).exit_code == 2
    assert invoke("export", "tiny", "--init", "init_net.pb", "--out", tmp_path).exit_code == 2


def test_output_is_plain_where_it_is_no_terminal():
    run = subprocess.run([DLRM, "conform", "tiny", "--backend", "torch", "--steps", "1"], capture_output=True,
                         text=True, env=os.environ | {"PYTHONWARNINGS": "error::DeprecationWarning"})
    assert run.returncode == 0 and "\x1b" not in run.stdout and run.stderr == ""
