"""Tables are written, and loaded, without another copy of them in memory. Each measurement has a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spec import toml
from spec.model import Table
from spec.parameters import parameter_bytes

MIB = 2**20

EXPORT = """
import json, resource, sys
from pathlib import Path
from spec import toml
from tools.export import run

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

spec, folder, format = sys.argv[1:]
run(toml.load("tiny"), Path(folder) / "warm", 0, [format], external=True)
before = peak()
run(toml.load(spec), Path(folder), 0, [format], external=True)
print(json.dumps(peak() - before))
"""

LOAD = """
import json, sys
from pathlib import Path
import onnxruntime

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

options = onnxruntime.SessionOptions()
options.log_severity_level = 3
for path in sys.argv[1:]:
    before = anonymous()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    grown = anonymous() - before
print(json.dumps(grown))
"""


def measure(script: str, *arguments: object) -> int:
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("format", "file"), [("onnx", "model.onnx"), ("onnx", "model.inlined.onnx"),
                                              ("torch-onnx", "model.torch.onnx")])
def test_no_copy_of_the_tables(tmp_path: Path, format: str, file: str):
    """300 MiB in three tables: written one at a time, and mapped by ONNX Runtime."""
    tables = tuple(Table(rows=100 * MIB // 32) for _ in range(3))
    spec = toml.load("tiny").model_copy(update={"tables": tables})
    toml.save(spec, tmp_path / "spec.toml")
    size = parameter_bytes(spec)
    assert size >= 300 * MIB
    peak = measure(EXPORT, tmp_path / "spec.toml", tmp_path, format)
    assert (tmp_path / "model.safetensors").stat().st_size >= size
    assert peak <= size + 100 * MIB
    assert measure(LOAD, tmp_path / "warm" / file, tmp_path / file) < 50 * MIB
