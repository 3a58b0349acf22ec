"""Runs one of facebookresearch/dlrm's scripts, unchanged, and writes down what it trains on.

Usage: python -I -B facebookresearch_hook.py SCRIPT OUTPUT FLAGS... SCRIPT gets FLAGS and the output streams. OUTPUT is
an .npz: `{step}:{name}` is what the model holds and is fed when step `step`, from 0, begins, under the script's names:

    dlrm_s_pytorch.py   the names of its state_dict; dense, target, offsets.{table}, indices.{table}
    dlrm_s_caffe2.py    the blobs that its training net takes; moreover `{step}>{name}`, what it has made of these when
                        the step ends, and `net>{name}`, every net that is created, serialized

A process of its own, under the script's interpreter (Python 3.7 or newer); imports nothing of ours.
"""

import functools
import importlib
import os
import runpy
import sys
import types
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
    run, create, steps = workspace.RunNet, workspace.CreateNet, []

    @functools.wraps(create)
    def creating(net, *arguments, **options):
        recorded["net>" + net.Proto().name] = np.frombuffer(net.Proto().SerializeToString(), np.uint8)
        return create(net, *arguments, **options)

    @functools.wraps(run)
    def recording(net, *arguments, **options):
        for blob in net.Proto().external_input:
            if workspace.HasBlob(blob):
                recorded[f"{len(steps)}:{blob}"] = workspace.FetchBlob(blob)
        done = run(net, *arguments, **options)
        made = {blob for operator in net.Proto().op for blob in operator.output}
        for blob in made.intersection({"loss", "prob_click", *net.Proto().external_input}):
            recorded[f"{len(steps)}>{blob}"] = workspace.FetchBlob(blob)
        steps.append(net)
        return done

    workspace.RunNet, workspace.CreateNet = recording, creating


def stand_in_for_onnx():
    """Legacy PyTorch brings none. Their option --save-proto-types-shapes needs the numbers of its data types."""
    numbers = {"FLOAT": 1, "UINT8": 2, "INT8": 3, "UINT16": 4, "INT16": 5, "INT32": 6, "INT64": 7, "STRING": 8,
               "BOOL": 9, "FLOAT16": 10, "DOUBLE": 11}
    onnx = types.ModuleType("onnx")
    onnx.TensorProto = type("TensorProto", (), numbers)
    sys.modules["onnx"] = onnx
    sys.modules["caffe2.python.onnx.frontend"] = types.ModuleType("caffe2.python.onnx.frontend")


RECORDERS = {"dlrm_s_pytorch.py": ("torch.nn.modules.module", record_pytorch),
             "dlrm_s_caffe2.py": ("caffe2.python.workspace", record_caffe2)}
"""By script: the module to hook into, which its interpreter has, and how."""


def stand_in_for_unused():
    for name in UNUSED:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))  # PyTorch asks for the spec


def main(script, output, flags):
    stand_in_for_unused()
    module, record = RECORDERS[os.path.basename(script)]
    if record is record_caffe2:
        stand_in_for_onnx()
    recorded = {}
    record(importlib.import_module(module), recorded)
    sys.path.insert(0, os.path.dirname(script))
    sys.argv = [script] + flags  # noqa: RUF005 (Python 3.7)
    runpy.run_path(script, run_name="__main__")
    np.savez(output, **recorded)


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2]), sys.argv[3:])
