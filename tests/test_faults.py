"""Must show 8: a wrong backend is caught by the command itself, which exits 1 and names the tensor."""

import json

import pytest
from click.testing import CliRunner

from tools.cli import main


@pytest.mark.parametrize(("backend", "tensor"), [
    ("faulty:SIGN", "top.0.weight_grad"),
    ("faulty:MISSING_MEAN", "bottom.0.bias_grad"),
    ("faulty:PAIR_ORDER", "interaction.output"),
    ("faulty:OFFSET", "tables.1.pooled"),
])
def test_a_fault_fails_the_command_and_is_named(backend, tensor, tmp_path):
    path = tmp_path / "report.json"
    result = CliRunner().invoke(main, ["conform", "tiny", "--backend", backend, "--steps", "2", "--json", str(path)])
    assert result.exit_code == 1, result.output
    assert f"does not conform at {tensor}[" in result.output
    (judged,) = json.loads(path.read_text())["cases"][0]["backends"]
    assert judged["status"] == "fails" and judged["worst"]["tensor"] == tensor


def test_the_same_backend_without_a_fault_passes():
    result = CliRunner().invoke(main, ["conform", "tiny", "--backend", "torch", "--steps", "2"])
    assert result.exit_code == 0, result.output
