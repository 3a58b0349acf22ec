"""Finding a Python for genuine Caffe2, and the life of its virtual environment; nothing is downloaded."""

import sys
from pathlib import Path

import pytest

from dlrm_caffe2.engine import install, venv
from dlrm_caffe2.engine.blas import mkl_settings
from dlrm_caffe2.engine.caffe2 import Caffe2Engine
from spec.errors import EngineError, InputError


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def python(path, version="3.9", implementation="CPython"):
    """Something that answers as an interpreter does."""
    return script(path, f"echo {implementation} {version} {path}")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder that is all there is: PATH, pyenv's versions, the environment."""
    for name in ("DLRM_CAFFE2_PYTHON", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/first:{tmp_path}/second")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("DLRM_CAFFE2_VENV", str(tmp_path / "venv"))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return tmp_path


def test_no_python_fits(machine):
    python(machine / "first/python3.9", version="3.11")
    python(machine / "second/python3.8", implementation="PyPy")
    python(machine / "pyenv/versions/3.10.13/bin/python", version="3.10")
    (machine / "second/python3.7").write_text("not executable")
    assert install.find_python() is None
    with pytest.raises(InputError, match=r"a Python 3.7, 3.8 or 3.9.*none on PATH.*install one, then"):
        install.install()
    assert not (machine / "venv").exists()


def test_a_shim_that_leads_nowhere_is_passed_over(machine):
    script(machine / "first/python3.9", "echo 'pyenv: python3.9: command not found' >&2; exit 127")
    expected = python(machine / "second/python3.9")
    assert install.find_python() == expected


def test_pyenv_and_uv_are_asked(machine):
    from_uv = python(machine / "uv/python", version="3.7")
    script(machine / "first/uv", f'[ "$3" = 3.7 ] && echo {from_uv} || exit 2')
    assert install.find_python() == from_uv
    from_pyenv = python(machine / "pyenv/versions/3.8.18/bin/python", version="3.8")
    assert install.find_python() == from_pyenv


def test_a_python_that_the_user_names_comes_first_and_must_fit(machine, monkeypatch):
    python(machine / "first/python3.9")
    named = python(machine / "mine", version="3.8")
    monkeypatch.setenv("DLRM_CAFFE2_PYTHON", str(named))
    assert install.find_python() == named
    monkeypatch.setenv("DLRM_CAFFE2_PYTHON", sys.executable)
    with pytest.raises(InputError, match=f"DLRM_CAFFE2_PYTHON {sys.executable}: expected a CPython 3.7"):
        install.find_python()
    with pytest.raises(InputError, match=f"--python {sys.executable}: expected a CPython 3.7"):
        install.install(Path(sys.executable))


def test_a_platform_without_wheels(machine, monkeypatch):
    python(machine / "first/python3.9")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert install.find_python() is None
    assert "Linux on x86_64" in install.availability().reason and "Darwin on arm64" in install.availability().reason
    with pytest.raises(InputError, match="expected Linux on x86_64, found Darwin on arm64"):
        install.install()


def test_nothing_installed(machine):
    status = install.status()
    assert not status.installed and status.path == machine / "venv"
    assert str(machine / "venv") in status.reason and status.remedy == "dlrm engine install"
    assert not install.availability().ok
    with pytest.raises(EngineError, match=r"is not installed in .*; dlrm engine install"):
        Caffe2Engine()


def test_where_the_environment_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DLRM_CAFFE2_VENV", raising=False)
    assert install.venv_path() == Path(venv.__file__).parents[2] / ".venv-caffe2"
    monkeypatch.setattr(venv, "__file__", str(tmp_path / "site-packages/dlrm_caffe2/engine/venv.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert install.venv_path() == tmp_path / "cache/dlrm-parity/venv-caffe2"


def test_an_environment_that_does_not_start_says_why(machine):
    script(machine / "venv/bin/python", "echo 'ImportError: libgomp.so.1' >&2; exit 1")
    (machine / "venv/dlrm-engine.txt").write_text("".join(f"{line}\n" for line in install.REQUIREMENTS))
    assert install.availability().ok
    status = install.status()
    assert not status.installed and "status 1" in status.reason and "ImportError: libgomp.so.1" in status.reason


MAKE_VENV = """
case "$*" in
*-c*) echo CPython 3.9 {python};;
*"-m venv"*) mkdir -p {venv}/bin && touch {venv}/pyvenv.cfg && printf '#!/bin/sh\\nexit {pip}\\n' > {venv}/bin/python \\
             && chmod +x {venv}/bin/python;;
esac
"""


@pytest.mark.parametrize("pip, message", [(1, "pip install .* failed with status 1"), (0, "it ended with status 0")])
def test_a_half_made_environment_is_made_again_and_a_failure_leaves_no_mark(machine, monkeypatch, pip, message):
    monkeypatch.setenv("PATH", f"{machine}/first:/usr/bin:/bin")
    path = machine / "first/python3.9"
    script(path, MAKE_VENV.format(python=path, venv=machine / "venv", pip=pip))
    script(machine / "venv/bin/python", "exit 1")
    (machine / "venv/pyvenv.cfg").touch()
    (machine / "venv/half").touch()
    with pytest.raises(EngineError, match=message):
        install.install()
    assert not (machine / "venv/half").exists() and (machine / "venv/bin/python").exists()
    assert not install.availability().ok


def test_a_folder_of_something_else_is_left_alone(machine):
    python(machine / "first/python3.9")
    precious = machine / "venv/precious"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(InputError, match="expected a virtual environment, an empty folder or nothing"):
        install.install()
    assert precious.exists()


@pytest.mark.engine
def test_an_environment_that_works_is_adopted(caffe2_engine, tmp_path, monkeypatch):
    """One without the mark, made of links to the installed one."""
    for name in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / name).symlink_to(install.venv_path() / name)
    monkeypatch.setenv("DLRM_CAFFE2_VENV", str(tmp_path))
    assert not install.availability().ok
    assert install.install() == tmp_path
    status = install.status()
    assert status.installed and status.path == tmp_path and status.operators == 986
    assert status.pytorch.startswith("1.10.2") and status.python.startswith("3.") and "MKL 2020.0" in status.blas


AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 fma\n"
INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx avx2 fma\n"
OLD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx\n"


@pytest.mark.parametrize("cpuinfo, environment, expected", [
    (AMD, {}, {"MKL_DEBUG_CPU_TYPE": "5", "MKL_CBWR": "AVX2,STRICT"}),
    (AMD, {"MKL_DEBUG_CPU_TYPE": "4"}, {"MKL_DEBUG_CPU_TYPE": "4", "MKL_CBWR": "AVX2,STRICT"}),
    (INTEL, {}, {"MKL_CBWR": "AVX2,STRICT"}),
    (OLD, {}, {}),
    ("", {}, {}),
])
def test_settings_of_mkl_by_processor(cpuinfo, environment, expected):
    assert {setting.variable: setting.value for setting in mkl_settings(cpuinfo, environment)} == expected
