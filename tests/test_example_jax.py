"""The JAX example: a distribution of its own, found through its entry point, that conforms."""

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from conformance.case import OPTIMIZERS, make_case
from conformance.run import run_case
from spec.backend import load_backend
from spec.toml import load

pytest.importorskip("jax", reason="JAX is not installed: pip install -e '.[test]'")
EXAMPLE = Path(__file__).parents[1] / "conformance/examples/jax"


@pytest.fixture(scope="module")
def jax(tmp_path_factory):
    """The backend as installed; the name is what `dlrm conform --backend` takes."""
    target = tmp_path_factory.mktemp("installed")
    sources = tmp_path_factory.mktemp("sources")  # setuptools leaves a build folder behind
    for name in ("pyproject.toml", "dlrm_jax.py"):
        (sources / name).write_text((EXAMPLE / name).read_text())
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--no-build-isolation", "--target", target, sources], check=True)
    sys.path.insert(0, str(target))
    assert "jax" in {entry.name for entry in entry_points(group="dlrm.backends")}
    yield load_backend("jax")
    sys.path.remove(str(target))


@pytest.mark.slow
def test_it_conforms_in_every_phase_under_every_optimizer(jax):
    result = run_case(make_case(load("tiny"), steps=2), [jax, load_backend("torch")])
    assert result.conforms and [section.optimizer for section in result.backends[0].sections] == [None, *OPTIMIZERS]
    assert re.fullmatch(r"JAX [\d.]+, cpu, \d+ threads", result.backends[0].engine)
    assert result.pairs[0].elements > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"loss": {"kind": "mse"}, "interaction": {"kind": "cat"}},
    {"loss": {"kind": "bce_logits"}, "interaction": {"kind": "dot", "self_interaction": True}},
    {"loss": {"kind": "wbce", "clip": 0.3, "weights": [0.7, 1.9]}, "bottom": {"widths": [8], "activation": "sigmoid"}}])
def test_it_follows_the_options_of_the_spec(jax, change):
    spec = type(load("tiny")).model_validate(load("tiny").model_dump() | change)
    assert run_case(make_case(spec, steps=0), [jax]).conforms


def test_it_is_small_and_stays_out_of_the_wheel():
    from tomllib import loads
    assert len((EXAMPLE / "dlrm_jax.py").read_text().splitlines()) <= 200
    project = loads((EXAMPLE.parents[2] / "pyproject.toml").read_text())
    assert "conformance.examples*" in project["tool"]["setuptools"]["packages"]["find"]["exclude"]
