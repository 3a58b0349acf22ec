"""Runs one of facebookresearch/dlrm's scripts, unchanged, and writes down what it trains on.

Usage: python -I -B facebookresearch_hook.py SCRIPT OUTPUT FLAGS... SCRIPT gets FLAGS and the output streams. OUTPUT is
an .npz: `{step}:{name}` is what the model holds and is fed when step `step`, from 0, begins, under the script's names:

    dlrm_s_pytorch.py   the names of its state_dict; dense, target, offsets.{table}, indices.{table}
    dlrm_s_caffe2.py    the blobs that its training net takes

A process of its own, under the script's interpreter (Python 3.7 or newer); imports nothing of ours.
"""

import functools
import importlib
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import numpy as np

UNUSED = ("sklearn", "sklearn.metrics", "torch.utils.tensorboard", "tqdm")
"""What the scripts import, and never need for training on random data."""


def record_pytorch(hooks, recorded):
    """PyTorch calls a global hook before each forward pass: of the model, then of its loss. `hooks` is its module."""
    fed = []

    def before(module, inputs):
        kind = type(module).__name__
        if kind == "DLRM_Net":
            dense, offsets, indices = inputs
            keep(module.state_dict())
            keep({"dense": dense})
            keep({f"offsets.{table}": values for table, values in enumerate(offsets)})
            keep({f"indices.{table}": values for table, values in enumerate(indices)})
        elif kind in ("MSELoss", "BCELoss"):
            keep({"target": inputs[1]})
            fed.append(module)

    def keep(tensors):
        for name, tensor in tensors.items():
            recorded[f"{len(fed)}:{name}"] = tensor.detach().numpy().copy()

    hooks.register_module_forward_pre_hook(before)


def record_caffe2(workspace, recorded):
    """The script runs one net, the training net, once a step."""
    run, steps = workspace.RunNet, []

    @functools.wraps(run)
    def recording(net, *arguments, **options):
        for blob in net.Proto().external_input:
            if workspace.HasBlob(blob):
                recorded[f"{len(steps)}:{blob}"] = workspace.FetchBlob(blob)
        steps.append(net)
        return run(net, *arguments, **options)

    workspace.RunNet = recording


RECORDERS = {"dlrm_s_pytorch.py": ("torch.nn.modules.module", record_pytorch),
             "dlrm_s_caffe2.py": ("caffe2.python.workspace", record_caffe2)}
"""By script: the module to hook into, which its interpreter has, and how."""


def stand_in_for_unused():
    for name in UNUSED:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))  # PyTorch asks for the spec


def main(script, output, flags):
    stand_in_for_unused()
    module, record = RECORDERS[os.path.basename(script)]
    recorded = {}
    record(importlib.import_module(module), recorded)
    sys.path.insert(0, os.path.dirname(script))
    sys.argv = [script] + flags  # noqa: RUF005 (Python 3.7)
    runpy.run_path(script, run_name="__main__")
    np.savez(output, **recorded)


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3:])
