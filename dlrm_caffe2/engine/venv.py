"""Where the virtual environment of genuine Caffe2 is, and whether it is there. `install.py` makes it.

A file written last marks an environment that works: one without it was left half made, and is made again.
"""

import os
import platform
from pathlib import Path

from spec.backend import Availability
from spec.errors import EngineError

REQUIREMENTS = ("torch==1.10.2", "numpy<1.24", "protobuf<3.21", "future", "six")
INSTALL = "dlrm engine install"

_MARKER = "dlrm-engine.txt"
_MARK = "".join(f"{requirement}\n" for requirement in REQUIREMENTS)


def venv_path() -> Path:
    """$DLRM_CAFFE2_VENV; else `.venv-caffe2` in the source tree; else, without one, in the user's cache folder."""
    named = os.environ.get("DLRM_CAFFE2_VENV")
    if named:
        return Path(named).expanduser().absolute()
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").exists():
        return root / ".venv-caffe2"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "dlrm-parity" / "venv-caffe2"


def interpreter(venv: Path) -> Path:
    return venv / "bin" / "python"


def availability() -> Availability:
    """Looks for the mark alone and starts nothing."""
    path = venv_path()
    if _marked(path):
        return Availability(True)
    if unsupported():
        return Availability(False, unsupported(), "use a machine with Linux on x86_64")
    return Availability(False, f"genuine Caffe2 is not installed in {path}", INSTALL)


def check_installed() -> Path:
    """The environment. Raises EngineError where there is none."""
    state = availability()
    if not state.ok:
        raise EngineError(f"genuine Caffe2: {state.reason}; {state.remedy}")
    return venv_path()


def unsupported() -> str:
    """Why there are no wheels for this platform; empty where there are."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) == ("Linux", "x86_64"):
        return ""
    return f"genuine Caffe2 comes in wheels for Linux on x86_64 alone, and this is {system} on {machine}"


def mark(venv: Path) -> None:
    (venv / _MARKER).write_text(_MARK)


def _marked(path: Path) -> bool:
    try:
        return (path / _MARKER).read_text() == _MARK and interpreter(path).exists()
    except OSError:
        return False
