"""Genuine Caffe2 in a process of its own: `python -I worker.py SOCKET MEMORY THREADS PARENT`.

Runs under the legacy interpreter (Python 3.7 to 3.9, PyTorch 1.10.2) and imports nothing of ours but protocol.py,
from the file beside it. Started by Caffe2Engine, which hands over one end of a socket pair, and a file in memory.
"""

import importlib.util
import os
import platform
import runpy
import select
import signal
import socket
import sys
import threading
import time


def main(fd, file, threads, parent):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the socket
    sock = socket.socket(fileno=fd)
    threading.Thread(target=_end_with_parent, args=(fd, parent), daemon=True).start()
    protocol = _load_protocol()
    memory = protocol.shared_memory(file)
    worker = _Worker(threads)
    protocol.send(sock, dict(worker.hello(), protocol=protocol.VERSION), {})
    while True:
        try:
            request, arrays = protocol.receive(sock, memory)
        except (EOFError, OSError):
            return
        try:
            reply, arrays = worker.handle(request, arrays)
        except Exception as error:
            reply, arrays = {"error": _one_line(error)}, {}
        protocol.send(sock, reply, arrays, memory)


def _end_with_parent(fd, parent):
    """End at once, even in the middle of a net, when the parent closes its end of the socket or dies.

    The parent's id is looked at too: a child that it forked may hold its end of the socket open.
    """
    poll = select.poll()
    poll.register(fd, 0)  # 0: hanging up alone
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    os._exit(0)


def _load_protocol():
    """By its path: the folder of this file must not be on sys.path, since it holds modules named like frameworks."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "protocol.py")
    spec = importlib.util.spec_from_file_location("protocol", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Worker:
    """One workspace of Caffe2. Each method that a request can name takes the request and its arrays."""

    def __init__(self, threads):
        from caffe2.proto import caffe2_pb2
        from caffe2.python import workspace

        workspace.GlobalInit(["caffe2", "--caffe2_log_level=3", "--caffe2_omp_num_threads=" + threads,
                              "--caffe2_mkl_num_threads=" + threads])
        self._workspace, self._proto = workspace, caffe2_pb2
        self._device = caffe2_pb2.DeviceOption().SerializeToString()  # the CPU
        self._stages = {}  # of a kept net: its parts, {name: serialized}
        self._parts = {}  # of a net that was profiled: (operator's name or type, name of a net of this one alone)

    def hello(self):
        site = os.path.dirname(os.path.dirname(os.path.dirname(self._workspace.__file__)))
        version = runpy.run_path(os.path.join(site, "torch", "version.py"))["__version__"]  # importing torch is slow
        return {"python": platform.python_version(), "pytorch": version,
                "operators": len(self._workspace.RegisteredOperators())}

    def handle(self, request, arrays):
        actions = {"feed": self.feed, "fetch": self.fetch, "run_once": self.run_once, "create": self.create,
                   "run": self.run, "profile": self.profile, "reset": self.reset}
        return actions[request["do"]](request, arrays)

    def feed(self, request, arrays):
        for name, array in arrays.items():
            self._workspace.C.feed_blob(name, array, self._device)
        return {}, {}

    def fetch(self, request, arrays):
        blobs = {name: self._workspace.FetchBlob(name) for name in request["names"]}
        for name, blob in blobs.items():
            if not hasattr(blob, "dtype") or blob.dtype.hasobject:
                raise RuntimeError(f"blob '{name}' holds no tensor of numbers")
        return {}, blobs

    def run_once(self, request, arrays):
        self._workspace.C.run_net_once(arrays[""].tobytes())
        return {}, {}

    def create(self, request, arrays):
        stages = {name: array.tobytes() for name, array in arrays.items()}
        made = []
        try:
            for name, definition in stages.items():
                self._workspace.C.create_net(definition, False)
                made.append(name)
        except Exception:
            for name in made:
                self._workspace.C.delete_net(name)
            raise
        self._stages[request["net"]] = stages
        return {}, {}

    def run(self, request, arrays):
        self.feed(request, arrays)
        for name in self._kept(request["net"]):
            self._workspace.C.run_net(name, 1, False)
        return self.fetch(request, arrays)

    def profile(self, request, arrays):
        """Runs the operators one by one: BenchmarkNet would run the whole net once more, and print."""
        self.feed(request, arrays)
        seconds = {}
        for operator, part in self._split(request["net"]):
            start = time.perf_counter()
            self._workspace.C.run_net(part, 1, False)
            seconds[operator] = seconds.get(operator, 0.0) + time.perf_counter() - start
        return {"seconds": seconds}, {}

    def _split(self, name):
        stages = self._kept(name)
        if name not in self._parts:
            parts = []
            for stage in stages.values():
                net = self._proto.NetDef.FromString(stage)
                for operator in net.op:
                    part = self._proto.NetDef(name=f"{name}/profile/{len(parts)}", op=[operator])
                    part.device_option.CopyFrom(net.device_option)
                    self._workspace.C.create_net(part.SerializeToString(), False)
                    parts.append((operator.name or operator.type, part.name))
            self._parts[name] = parts
        return self._parts[name]

    def _kept(self, name):
        if name not in self._stages:
            raise RuntimeError("Can't find net " + name)
        return self._stages[name]

    def reset(self, request, arrays):
        self._workspace.ResetWorkspace()
        self._stages.clear()
        self._parts.clear()
        return {}, {}


def _one_line(error):
    """The useful part of an exception's text: no C++ frames, no arguments of the operator (they may be long)."""
    text = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    text = text.split("\nframe #")[0].split(" arg {")[0].split("\narg {")[0]
    return " ".join(text.split())[:1000]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
