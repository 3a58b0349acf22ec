"""The house itself: import directions, lint, and the public names."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "spec.model": {"ModelSpec", "Table", "MLP", "Interaction", "Loss", "Optimizer"},
    "spec.toml": {"load", "loads", "dumps", "save", "schema", "preset_names"},
    "spec.parameters": {"parameter_shapes", "fixed_parameters", "trained_parameters", "is_sparse", "moment_name",
                        "state_shapes", "initial_state", "parameter_bytes", "check_parameters",
                        "initial_parameter", "initial_parameters"},
    "spec.tensors": {"batch_names", "activations", "activation_gradients", "part_of", "slice_names",
                     "parameter_gradients", "trace_names"},
    "spec.batch": {"Batch"},
    "spec.backend": {"Availability", "Model", "NamesOperators", "Backend", "backend_names", "is_repeatable",
                     "load_backend"},
    "spec.threads": {"core_count", "thread_count", "wait_without_spinning"},
    "spec.errors": {"InputError", "EngineError"},
    "spec.exported": {"Source", "store", "stored_if_large", "title", "metadata", "axes", "docs"},
    "spec.low_precision": {"row_scales", "quantize", "dequantize"},
    "spec.tensor_file": {"ArrayType", "TensorFile", "read", "write"},
    "spec.reference": {"Evaluation", "evaluate"},
    "spec.graph": {"steps", "update_steps"},
    "spec.update": {"Updated", "update"},
    "spec.data": {"open_batches"},
    "conformance.case": {"Case", "make_case", "under"},
    "conformance.result": {"BackendResult", "CaseResult", "PairResult", "Section"},
    "conformance.run": {"first_failure", "run_case", "steps_to_run"},
    "conformance.training": {"judge_training", "operators", "unusable"},
    "conformance.repeat": {"Recorded", "Repeat"},
    "conformance.trajectory": {"Ensemble"},
    "conformance.ledger": {"Doubt", "Ledger", "ledger"},
    "conformance.junit": {"write_junit"},
    "conformance.quota": {"Quota", "enforce", "trace_quota", "training_quota"},
    "spec.shapes": {"activation_shapes", "trace_shapes"},
    "spec.tamper": {"Change", "Tamper", "find_tamper", "for_many"},
    "conformance.replay": {"Fault", "find_faults", "judge_trace", "own_gradients"},
    "conformance.examine": {"Element", "Examination", "examine"},
    "conformance.report": {"as_dict", "write_json"},
    "conformance.generate": {"Data", "Example", "draw_example", "examples", "generate", "work"},
    "conformance.shrink": {"shrink"},
    "conformance.fuzz": {"Outcome", "Tally", "campaign", "command", "coverage", "judge_example", "save"},
    "conformance.html": {"write_html"},
    "conformance.bundle": {"Bundle", "open_bundle", "sha256"},
    "conformance.bundle_writer": {"make_bundle_case", "bundle_bytes", "write_bundle"},
    "conformance.judge": {"Judgement", "judge_results", "as_dict", "main", "read_result"},
    "conformance.foreign": {"run_bundle"},
    "conformance.xfail": {"Entry", "ExpectedFailures", "load_expected_failures"},
}
"""What users may rely on. A name that goes, or comes, is a change of the product: say so in the CHANGELOG."""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_pinned(module):
    loaded = importlib.import_module(module)
    defined = {name for name, value in vars(loaded).items()
               if not name.startswith("_") and getattr(value, "__module__", None) == module}
    assert defined == PUBLIC[module]


def test_backends_are_registered():
    from spec.backend import backend_names
    assert {"torch", "caffe2", "caffe2-aten", "caffe2-onnx"} <= set(backend_names())


@pytest.mark.parametrize("command", [["ruff", "check", "--no-cache", "."], ["lint-imports", "--no-cache"]])
def test_lint(command):
    result = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], cwd=ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_command_line_offers_the_specs_optimizers():
    """Named twice, since --help must not import the spec."""
    from conformance.case import OPTIMIZERS
    from tools import cli
    assert cli.OPTIMIZERS == OPTIMIZERS


def test_help_loads_no_framework():
    code = ("import sys; from click.testing import CliRunner; from tools.cli import main\n"
            "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
            "assert CliRunner().invoke(main, ['conform', '--help']).exit_code == 0\n"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'pydantic'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_wheel_runs_in_an_environment_of_its_own(tmp_path):
    """Built from a copy of the tree, installed beside the libraries of this environment, away from the tree."""
    tree = tmp_path / "tree"  # setuptools would put what an earlier build left in build/ into the wheel
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "tests"))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree], check=True,
                   capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", wheel],
                   check=True)
    import numpy
    libraries = Path(numpy.__file__).parents[1]  # torch and the rest, without the editable project
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    for entry in libraries.iterdir():
        if not entry.name.startswith(("dlrm_parity", "__editable__", "_distutils", "distutils", "pip")):
            target = site / entry.name
            if not target.exists():
                target.symlink_to(entry)
    run = subprocess.run([tmp_path / "venv/bin/dlrm", "conform", "tiny", "--steps", "1", "--backend", "torch",
                          "--backend", "caffe2-aten", "--out", "report"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "report/report.html").exists() and "conforms" in run.stdout
