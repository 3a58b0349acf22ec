"""How the virtual environment of genuine Caffe2 is made, and what is in it.

PyTorch 1.10.2 is the last release whose wheels hold Caffe2's operators; its newest Python is 3.9.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dlrm_caffe2.engine.blas import MKL, current_settings
from dlrm_caffe2.engine.caffe2 import Caffe2Engine
from dlrm_caffe2.engine.venv import INSTALL, REQUIREMENTS, availability, interpreter, mark, unsupported, venv_path
from spec.errors import EngineError, InputError

VERSIONS = ("3.9", "3.8", "3.7")

_PROBE = """
import ensurepip, platform, sys, venv
print(platform.python_implementation(), "%d.%d" % sys.version_info[:2], sys.executable)
"""


@dataclass(frozen=True)
class Status:
    """What runs as genuine Caffe2; where nothing does, the reason and the command that mends it."""

    installed: bool
    path: Path
    python: str = ""
    pytorch: str = ""
    operators: int | None = None
    blas: str = ""
    threads: int | None = None
    reason: str = ""
    remedy: str = ""


def status() -> Status:
    """Starts the engine, if it is installed, and asks it."""
    path = venv_path()
    state = availability()
    if not state.ok:
        return Status(False, path, reason=state.reason, remedy=state.remedy)
    try:
        engine = Caffe2Engine()
    except EngineError as error:
        return Status(False, path, reason=str(error), remedy=INSTALL)
    engine.close()
    blas = "; ".join([MKL, *(f"{name}={value} ({why})" for name, value, why in current_settings())])
    return Status(True, path, engine.build["python"], engine.build["pytorch"], engine.build["operators"], blas,
                  engine.threads)


def find_python() -> Path | None:
    """The first Python 3.7 to 3.9 that can make virtual environments, of: $DLRM_CAFFE2_PYTHON; those on PATH; pyenv's;
    uv's. None where there is none, or where the platform has no wheels.

    Raises InputError where $DLRM_CAFFE2_PYTHON names something else.
    """
    if unsupported():
        return None
    named = os.environ.get("DLRM_CAFFE2_PYTHON")
    if named:
        return _check_python(Path(named), "DLRM_CAFFE2_PYTHON")
    return next((python for python in map(_probe, _candidates()) if python), None)


def install(python: Path | None = None, path: Path | None = None) -> Path:
    """Make the environment, or adopt one that works. About 2 GB; pip reports on stderr.

    Args:
        python: a Python 3.7 to 3.9; by default `find_python()`. Not looked at where the environment works already.
        path: where to make it; by default `venv_path()`.

    Raises InputError where there is no such Python, or where `path` holds something else; EngineError where pip or
    the new environment fails.
    """
    path = path or venv_path()
    if interpreter(path).exists() and _works(path):
        mark(path)
        return path
    if unsupported():
        raise InputError("genuine Caffe2", "Linux on x86_64", f"{platform.system()} on {platform.machine()}",
                         "run the same nets with --backend caffe2-aten")
    python = _check_python(python, "--python") if python else find_python()
    if python is None:
        raise InputError("genuine Caffe2", "a Python 3.7, 3.8 or 3.9 (PyTorch 1.10.2 knows no newer one)",
                         "none on PATH, in pyenv or in uv", f"install one, then: {INSTALL} --python /path/to/python")
    _remove(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _run([python, "-I", "-m", "venv", path])
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        _run([interpreter(path), "-I", "-m", "pip", "install", "--disable-pip-version-check", *quiet, *REQUIREMENTS])
    except OSError as error:
        raise InputError(str(path), "a folder that can be made", error.strerror,
                         "set DLRM_CAFFE2_VENV to another one") from None
    _start_once(path)
    mark(path)
    return path


def _candidates() -> Iterator[str]:
    for version in VERSIONS:
        for folder in os.get_exec_path():  # all of them: a shim of pyenv's comes first and may lead nowhere
            yield os.path.join(folder, f"python{version}")
    root = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    for version in VERSIONS:
        yield from (str(python) for python in sorted((root / "versions").glob(f"{version}*/bin/python"), reverse=True))
    uv = shutil.which("uv")
    for version in VERSIONS if uv else ():
        yield subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.strip()


def _probe(python: str | Path) -> Path | None:
    """The interpreter behind a path, if it is one that fits."""
    if not os.access(python, os.X_OK) or os.path.isdir(python):
        return None
    try:
        done = subprocess.run([python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.strip().split(maxsplit=2)
    if done.returncode or len(words) < 3 or words[0] != "CPython" or words[1] not in VERSIONS:
        return None
    return Path(words[2])


def _check_python(python: Path, where: str) -> Path:
    found = _probe(python.expanduser())
    if found is None:
        raise InputError(f"{where} {python}", "a CPython 3.7, 3.8 or 3.9 that can make virtual environments",
                         "something else", "name one, or leave it out to search for one")
    return found


def _remove(path: Path) -> None:
    """Remove a virtual environment. Raises InputError for a folder that is anything else."""
    if not path.exists():
        return
    if not (path / "pyvenv.cfg").exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(str(path), "a virtual environment, an empty folder or nothing", "something else",
                         "choose another path with DLRM_CAFFE2_VENV")
    shutil.rmtree(path)


def _run(command: list) -> None:
    """Its output goes to stderr, where a user follows it."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2)
    if done.returncode:
        raise EngineError(f"genuine Caffe2: `{' '.join(map(str, command))}` failed with status {done.returncode}; "
                          "its messages are above")


def _start_once(path: Path) -> None:
    Caffe2Engine(venv=path).close()


def _works(path: Path) -> bool:
    try:
        _start_once(path)
    except EngineError:
        return False
    return True
