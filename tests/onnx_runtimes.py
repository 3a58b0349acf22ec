"""What runs exported ONNX files, all alike: `RUNTIMES[name](path)` is a function from inputs to outputs, by name."""

import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import old_onnxruntime
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

from dlrm_caffe2.engine import protocol
from spec.parameters import Arrays

Session = Callable[[Arrays], Arrays]

SCRIPT = Path(__file__).with_name("onnx_worker.py")


def newest(path: Path) -> Session:
    """The ONNX Runtime of this environment."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def reference(path: Path) -> Session:
    """ONNX's own, in NumPy."""
    evaluator = ReferenceEvaluator(onnx.load(path))

    def run(feeds: Arrays) -> Arrays:
        with np.errstate(all="ignore"):
            return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
    return run


class _Worker:
    """onnx_worker.py with a runtime."""

    def __init__(self, python: Path, runtime: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [python, "-I", SCRIPT, str(theirs.fileno()), protocol.__file__, runtime]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        weakref.finalize(self, _stop, self._socket, process)

    def run(self, path: Path, feeds: Arrays) -> Arrays:
        """Raises RuntimeError where the runtime refuses the model or its inputs, EOFError or OSError where it died."""
        protocol.send(self._socket, {"path": str(path)}, feeds)
        reply, outputs = protocol.receive(self._socket)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return outputs


def _stop(connection: socket.socket, process: subprocess.Popen) -> None:
    connection.close()
    process.wait()


_worker = cache(_Worker)


def oldest(path: Path) -> Session:
    """ONNX Runtime 1.16, in the environment that old_onnxruntime.py makes."""
    return lambda feeds: _worker(old_onnxruntime.python(), "onnxruntime").run(path, feeds)


def openvino(path: Path) -> Session:
    """In a process of its own, since some training steps are the end of it."""
    return lambda feeds: _worker(Path(sys.executable), "openvino").run(path, feeds)


RUNTIMES = {"onnxruntime": newest, "onnxruntime-1.16": oldest, "reference": reference, "openvino": openvino}
