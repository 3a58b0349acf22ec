"""The oldest ONNX Runtime that exported models are for, in an environment of its own, since it needs NumPy 1.

`python tests/old_onnxruntime.py` makes the environment, as `make test` does. Tests marked `oldest` run in it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

VENV = Path(__file__).parents[1] / ".venv-onnxruntime"
REQUIREMENTS = ("onnxruntime==1.16.3", "numpy<2")
PYTHONS = ("3.11", "3.10", "3.9", "3.8")
"""Those that its wheels are for."""

_MARKER = VENV / "installed.txt"
_MARK = "".join(f"{requirement}\n" for requirement in REQUIREMENTS)


def python() -> Path:
    return VENV / "bin" / "python"


def missing() -> str:
    """Why there is none, and the remedy; empty where it is there. The marker is written last."""
    if _MARKER.exists() and _MARKER.read_text() == _MARK:
        return ""
    return f"{REQUIREMENTS[0]} is not in {VENV.name}; make test installs it, where there is a Python 3.8 to 3.11"


def install() -> None:
    """Where no Python fits or pip fails it says so, and the tests will be skipped."""
    base = next(filter(_fits, _candidates()), None)
    if base is None:
        print(f"{REQUIREMENTS[0]}: found no Python {', '.join(PYTHONS)}; its tests will be skipped", file=sys.stderr)
        return
    shutil.rmtree(VENV, ignore_errors=True)
    try:
        subprocess.run([base, "-I", "-m", "venv", VENV], check=True)
        subprocess.run([python(), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                        *REQUIREMENTS], check=True)
    except subprocess.CalledProcessError as error:
        print(f"{REQUIREMENTS[0]}: {error}; its tests will be skipped", file=sys.stderr)
        return
    _MARKER.write_text(_MARK)


def _candidates() -> Iterator[str]:
    """This one, those on PATH, and that of genuine Caffe2."""
    yield sys.executable
    for version in PYTHONS:
        for folder in os.get_exec_path():  # all of them: a shim of pyenv's comes first and may lead nowhere
            yield os.path.join(folder, f"python{version}")
    yield str(VENV.with_name(".venv-caffe2") / "bin" / "python")


def _fits(candidate: str) -> bool:
    probe = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([candidate, "-I", "-c", probe], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in PYTHONS


if __name__ == "__main__" and missing():
    install()
