"""Genuine Caffe2 by its own Python API alone: a script for the legacy interpreter, and what calls it.

Usage: python legacy.py JOB.npz RESULT.npz. The job holds nets as bytes (`init`, `net`), `fetch` (blob names), and
`feed:NAME` arrays; with `gradients_of`, Caffe2's AddGradientOperators extends the net by the gradients of its
blob `loss`, and the result holds `GRADIENT:values` (and `:indices`) for each named blob. `runs` nets' outputs are
those after so many runs.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

PYTHON = Path(__file__).parents[1] / ".venv-caffe2" / "bin" / "python"


def run(folder, net, feeds, fetch=(), init=None, gradients_of=(), runs=1):
    """Run a NetDef (bytes, or an object that serializes) on genuine Caffe2 and no code of ours; arrays by name."""
    job, result = folder / "job.npz", folder / "result.npz"
    content = {f"feed:{name}": array for name, array in feeds.items()}
    content |= {"net": np.frombuffer(net, np.uint8), "fetch": np.array(list(fetch), "U"), "runs": np.array(runs),
                "gradients_of": np.array(list(gradients_of), "U")}
    if init is not None:
        content["init"] = np.frombuffer(init, np.uint8)
    np.savez(job, **content)
    done = subprocess.run([PYTHON, __file__, job, result], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(result) as arrays:
        return dict(arrays)


def main(job_path, result_path):
    from caffe2.proto import caffe2_pb2
    from caffe2.python import core, workspace

    core.GlobalInit(["caffe2", "--caffe2_log_level=3"])
    job = np.load(job_path)
    if "init" in job:
        workspace.RunNetOnce(caffe2_pb2.NetDef.FromString(job["init"].tobytes()))
    for key in job:
        if key.startswith("feed:"):
            workspace.FeedBlob(key[len("feed:"):], job[key])
    definition = caffe2_pb2.NetDef.FromString(job["net"].tobytes())
    wanted = job["gradients_of"].tolist()
    gradients = {}
    if wanted:
        del definition.external_output[:]
        net = core.Net(definition)
        gradients = net.AddGradientOperators(["loss"])
        definition = net.Proto()
    workspace.CreateNet(definition)
    for _ in range(int(job["runs"])):
        workspace.RunNet(definition.name)
    result = {name: workspace.FetchBlob(name) for name in job["fetch"].tolist()}
    for name in wanted:
        gradient = gradients[name]
        if isinstance(gradient, core.GradientSlice):
            result[name + ":indices"] = workspace.FetchBlob(gradient.indices)
            result[name + ":values"] = workspace.FetchBlob(gradient.values)
        else:
            result[name + ":values"] = workspace.FetchBlob(gradient)
    np.savez(result_path, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
