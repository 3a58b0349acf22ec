"""Genuine Caffe2 through its own Python API, with no code of ours: a script for the legacy interpreter, and its caller.

Usage: python legacy.py FOLDER. FOLDER/{number}.npz is a job, answered in FOLDER/{number}.result.npz.
"""

from __future__ import annotations  # the script's Python is 3.7 to 3.9

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Job:
    """Run `init` once and `net` `runs` times, both serialized NetDefs, in a fresh workspace; fetch blobs.

    With `gradients_of`, Caffe2's AddGradientOperators first extends the net by the gradients of its blob `loss`:
    `NAME:values`, and `NAME:indices` for a slice, are in the result for each name.
    """

    net: bytes
    feeds: dict[str, np.ndarray]
    fetch: Sequence[str] = ()
    init: bytes = b""
    gradients_of: Sequence[str] = ()
    runs: int = 1


def run(folder: Path, *jobs: Job) -> list[dict[str, np.ndarray]]:
    """The blobs of each job, by name. One thread, and the code path of MKL that the engine `caffe2` asks for."""
    from dlrm_caffe2.engine.blas import current_settings
    from dlrm_caffe2.engine.venv import check_installed, interpreter

    environment = os.environ | {setting.variable: setting.value for setting in current_settings()}
    for number, job in enumerate(jobs):
        feeds = {f"feed:{name}": array for name, array in job.feeds.items()}
        np.savez(folder / f"{number}.npz", net=np.frombuffer(job.net, np.uint8), init=np.frombuffer(job.init, np.uint8),
                 fetch=np.array(list(job.fetch), "U"), gradients_of=np.array(list(job.gradients_of), "U"),
                 runs=np.array(job.runs), **feeds)
    command = [interpreter(check_installed()), __file__, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = []
    for number in range(len(jobs)):
        with np.load(folder / f"{number}.result.npz") as arrays:
            results.append(dict(arrays))
    return results


def main(folder: Path) -> None:
    from caffe2.python import core, workspace

    core.GlobalInit(["caffe2", "--caffe2_log_level=3"])
    for path in sorted(folder.glob("*.npz")):
        workspace.ResetWorkspace()
        np.savez(path.with_suffix(".result.npz"), **_answer(np.load(path), core, workspace))


def _answer(job, core, workspace):
    from caffe2.proto import caffe2_pb2

    if job["init"].size:
        workspace.RunNetOnce(caffe2_pb2.NetDef.FromString(job["init"].tobytes()))
    for key in job:
        if key.startswith("feed:"):
            workspace.FeedBlob(key[len("feed:"):], job[key])
    definition = caffe2_pb2.NetDef.FromString(job["net"].tobytes())
    wanted, gradients = job["gradients_of"].tolist(), {}
    if wanted:
        net = core.Net(definition)
        gradients = net.AddGradientOperators(["loss"])
        definition = net.Proto()
    workspace.CreateNet(definition)
    for _ in range(int(job["runs"])):
        workspace.RunNet(definition.name)
    blobs = {name: name for name in job["fetch"].tolist()}
    for name in wanted:
        if isinstance(gradients[name], core.GradientSlice):
            blobs[f"{name}:indices"] = gradients[name].indices
            blobs[f"{name}:values"] = gradients[name].values
        else:
            blobs[f"{name}:values"] = gradients[name]
    return {name: workspace.FetchBlob(blob) for name, blob in blobs.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
