"""The genuine engine: Caffe2's own operators, of a legacy PyTorch build, in a worker process.

The worker keeps blobs and nets; protocol.py says what travels. It ends with the engine, or with this process,
however that ends.
"""

import os
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from google.protobuf.message import EncodeError

from dlrm_caffe2.engine import protocol
from dlrm_caffe2.engine.blas import MKL, current_settings
from dlrm_caffe2.engine.faster import faster
from dlrm_caffe2.engine.one_hot import without_bags
from dlrm_caffe2.engine.one_product import one_product
from dlrm_caffe2.engine.stages import stages
from dlrm_caffe2.engine.venv import check_installed, interpreter
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.threads import thread_count

WORKER = Path(__file__).with_name("worker.py")

MEMORY = 2**26
"""Bytes that are shared with the worker: more than a batch of the paper's benchmark. Taken when they are used."""

BLOCK_BYTES = 2**18
"""Of rows that are read and updated at a time, so that they and their gradients stay in the cache of one core."""

_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Where the system gives them on request, rows of large tables are found sooner. Older C libraries pass over it."""

_DTYPES = frozenset(map(np.dtype, protocol.DTYPES))

_CAUSES = {
    signal.SIGKILL: "killed from outside, perhaps for its memory: try a smaller batch, or --max-rows",
    signal.SIGSEGV: "an operator left its memory: run the net on engine aten, which checks every index",
    signal.SIGABRT: "an operator gave up or left its memory: run the net on engine aten, which checks every index",
}


class Caffe2Engine:
    """A NetEngine on genuine Caffe2. May be used by several threads, one request at a time.

    After an error of a net or an operator it stays usable; where the worker itself dies, every later request raises
    EngineError.

    Args:
        threads: of MKL and OpenMP; by default `spec.threads.thread_count`.
        venv: a virtual environment that holds it; by default the installed one.

    Raises EngineError where it is not installed or does not start.
    """

    def __init__(self, threads: int | None = None, venv: Path | None = None) -> None:
        if venv is None:
            venv = check_installed()
        self.threads = threads or thread_count()
        self._ended = ""
        self._busy = threading.Lock()
        self._start(interpreter(venv))
        self.build, _ = self._receive()
        """The worker's first message; see protocol.py."""
        if self.build["protocol"] != protocol.VERSION:
            self.close()
            raise EngineError(f"genuine Caffe2: expected protocol {protocol.VERSION} of its worker, found "
                              f"{self.build['protocol']}; {WORKER} is of another version: reinstall this package")
        settings = ", ".join(f"{setting.variable}={setting.value}" for setting in current_settings())
        self.description = (f"Caffe2 of PyTorch {self.build['pytorch']}, Python {self.build['python']}, "
                            f"{self.build['operators']} operators, {MKL} ({settings or 'no settings'}), cpu, "
                            f"{self.threads} threads")

    def _start(self, python: Path) -> None:
        self._socket, theirs = socket.socketpair()
        file = os.memfd_create("dlrm-caffe2")
        os.ftruncate(file, MEMORY)
        self._memory = protocol.shared_memory(file)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the worker)
        environment = _HUGE_PAGES | os.environ | {setting.variable: setting.value for setting in current_settings()}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # a CUDA build, used on the CPU
        command = [python, "-I", WORKER, str(theirs.fileno()), str(file), str(self.threads), str(os.getpid())]
        try:
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno(), file],
                                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log)
        except OSError as error:
            self._socket.close()
            self._log.close()
            raise EngineError(f"genuine Caffe2: {python} does not start ({error.strerror}); "
                              "dlrm engine install") from None
        finally:
            theirs.close()
            os.close(file)
        self._finalizer = weakref.finalize(self, _stop, self._process, self._socket, self._log)

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def feed(self, blobs: Mapping[str, np.ndarray]) -> None:
        """Create or overwrite blobs (copied). Raises EngineError for a dtype that Caffe2 lacks, before any is fed."""
        self._request("feed", _checked(blobs))

    def fetch(self, names: Sequence[str]) -> Arrays:
        return self._request("fetch", names=list(names))[1]

    def run_once(self, net: NetDef) -> None:
        self._request("run_once", {"": _serialized(net)}, about=f"net '{net.name}'")

    def create(self, net: NetDef) -> None:
        """Raises EngineError also for a name that is taken. A net of several workers gets one for each thread."""
        if net.type and not net.num_workers:
            net = NetDef.FromString(net.SerializeToString())
            net.num_workers = self.threads
        parts = {part.name: _serialized(part) for part in stages(net)}
        self._request("create", parts, about=f"net '{net.name}'", net=net.name)

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        return self._request("run", _checked(feeds), about=f"net '{name}'", net=name, names=list(fetch))[1]

    def profile(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Runs the operators one after another, whatever the type of the net."""
        return self._request("profile", _checked(feeds), about=f"net '{name}'", net=name)[0]["seconds"]

    def row_blocks(self, spec: ModelSpec, table: int) -> int:
        """0 for one-hot tables, whose rows give ScatterWeightedSum too little to do."""
        rows, lookups = spec.tables[table].rows, spec.tables[table].lookups
        if spec.tables[table].one_hot:
            return 0
        bag = lookups if isinstance(lookups, int) else sum(lookups) / 2
        return ceil(4 * spec.embedding_dim * min(rows, spec.batch_size * bag) / BLOCK_BYTES)

    def faster(self, spec: ModelSpec, net: NetDef) -> NetDef:
        net, blobs = one_product(spec, without_bags(net))
        if blobs:
            self.feed(blobs)
        return faster(net, spec.embedding_dim)

    def reset(self) -> None:
        """Drop every blob and net; the worker stays."""
        self._request("reset")

    def close(self) -> None:
        self._ended = self._ended or "it was closed"
        self._finalizer()

    def _request(self, do: str, arrays: Mapping[str, np.ndarray] | None = None, about: str = "",
                 **fields: Any) -> tuple[dict, Arrays]:
        """One exchange. An interrupted one ends the worker, since its reply would be taken for the next."""
        with self._busy:
            if self._ended:
                raise EngineError(f"genuine Caffe2: no worker: {self._ended}; make a new one")
            try:
                protocol.send(self._socket, {"do": do, **fields}, arrays or {}, self._memory)
            except OSError:
                raise self._died(about) from None
            except BaseException:
                self._interrupt()
                raise
            reply, arrays = self._receive(about)
        if "error" in reply:
            raise EngineError(f"genuine Caffe2: {about + ': ' if about else ''}{reply['error']}")
        return reply, arrays

    def _receive(self, about: str = "") -> tuple[dict, Arrays]:
        try:
            header, arrays = protocol.receive(self._socket, self._memory)
            return header, {name: array.copy() for name, array in arrays.items()}
        except (EOFError, OSError):
            raise self._died(about) from None
        except BaseException:
            self._interrupt()
            raise

    def _interrupt(self) -> None:
        self._ended = self._ended or "it was interrupted"
        self._finalizer()

    def _died(self, about: str) -> EngineError:
        """What to raise when the worker is gone."""
        if not self._ended:
            self._process.kill()  # of no effect on a process whose end is decided
            status = self._process.wait()
            words = _last_line(self._log)
            if status < 0:
                number = signal.Signals(-status)
                cause = _CAUSES.get(number, number.name)
                self._ended = f"it died of {number.name} ({cause})"
            else:
                self._ended = f"it ended with status {status}; dlrm engine install may mend it"
            self._ended += f"; it said: {words}" if words else ""
            self._finalizer()
        return EngineError(f"genuine Caffe2: {about + ': ' if about else ''}no worker: {self._ended}")


def _stop(process: subprocess.Popen, sock: socket.socket, log: BinaryIO) -> None:
    """Kills, since there is nothing to save. In a child forked from this process it only closes the child's copies."""
    process.kill()
    process.wait()
    sock.close()
    log.close()


def _checked(blobs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    for name, array in blobs.items():
        if array.dtype not in _DTYPES and array.dtype.name not in protocol.DTYPES:  # the former takes no time
            raise EngineError(f"genuine Caffe2: blob '{name}': expected a dtype of {', '.join(protocol.DTYPES)}, found "
                              f"{array.dtype.name}; convert it")
    return blobs


def _serialized(net: NetDef) -> np.ndarray:
    try:
        return np.frombuffer(net.SerializeToString(), np.uint8)
    except (EncodeError, ValueError) as error:
        raise EngineError(f"genuine Caffe2: net '{net.name}' cannot be serialized ({error}); protobuf's limit is "
                          "2 GiB: feed large arrays as blobs") from None


def _last_line(log: BinaryIO) -> str:
    lines = os.pread(log.fileno(), 4096, max(0, os.fstat(log.fileno()).st_size - 4096)).decode(errors="replace")
    return next((" ".join(line.split())[:300] for line in reversed(lines.splitlines()) if line.strip()), "")
