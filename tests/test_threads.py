"""Every backend computes with as many threads as OMP_NUM_THREADS says."""

import json
import os
import subprocess
import sys

import pytest

from spec.threads import core_count, thread_count

SCRIPT = """
import json, sys
from spec.backend import load_backend
from spec.parameters import initial_parameters
from spec.toml import load
spec = load("tiny")
models = [load_backend(name).create(spec, initial_parameters(spec)) for name in sys.argv[1:]]
print(json.dumps([[model.threads, model.engine] for model in models]))
for model in models:
    model.close()
"""


def models(count, *backends):
    run = subprocess.run([sys.executable, "-c", SCRIPT, *backends], capture_output=True, text=True, check=True,
                         env=os.environ | {"OMP_NUM_THREADS": str(count)})
    return json.loads(run.stdout)


CORES = core_count()


@pytest.mark.parametrize("count", {1, min(2, CORES)})  # PyTorch takes no more than there are cores
def test_engines_in_this_process(count):
    for threads, engine in models(count, "torch", "caffe2-aten", "caffe2-onnx", "torch-onnx"):
        assert threads == count and engine.endswith(f"{count} threads")


@pytest.mark.engine
def test_genuine_caffe2():
    ((threads, engine),) = models(3, "caffe2")
    assert threads == 3 and engine.endswith("3 threads")


@pytest.mark.parametrize("text", ["", "0", "many"])
def test_what_is_no_number_of_threads_means_every_core(monkeypatch, text):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert thread_count() == CORES


def test_cores_of_a_system_that_tells_no_process_its_own(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert core_count() == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert core_count() == 1
