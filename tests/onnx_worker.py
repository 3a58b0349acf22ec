"""A runtime in a process of its own: `python -I onnx_worker.py SOCKET PROTOCOL onnxruntime|openvino`.

Runs under Python 3.8 and newer with any NumPy; of ours it loads the messages alone, dlrm_caffe2/engine/protocol.py, by
its path. A request names the `path` of a model, which is kept ready, and brings its inputs; the reply has its outputs.
"""

import os
import runpy
import socket
import sys


def main(fd, protocol, runtime):
    protocol = runpy.run_path(protocol)
    sock = socket.socket(fileno=fd)
    start = {"onnxruntime": start_onnxruntime, "openvino": start_openvino}[runtime]
    models = {}
    while True:
        try:
            request, feeds = protocol["receive"](sock)
        except (EOFError, OSError):
            return
        try:
            path = request["path"]
            if path not in models:
                models[path] = start(path)
            reply, outputs = {}, models[path](feeds)
        except Exception as error:
            reply, outputs = {"error": str(error)}, {}
        protocol["send"](sock, reply, outputs)


def start_onnxruntime(path):
    """The second run of a session reuses the memory as the first one did. Before version 1.19 that gives wrong numbers
    in training steps: they run without. Models that predict run with it, as ONNX Runtime does unless told otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = not os.path.basename(path).startswith("train.")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds)))  # noqa: B905 (Python 3.8)


def start_openvino(path):
    import numpy as np
    from openvino import Core

    model = Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})

    def run(feeds):
        outputs = model.create_infer_request().infer(feeds)
        return {name: np.array(value) for port, value in outputs.items() for name in port.get_names()}
    return run


main(int(sys.argv[1]), *sys.argv[2:])
