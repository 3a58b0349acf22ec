"""A worker process, seen from outside: requests, its memory and its processor time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from spec.errors import EngineError
from spec.threads import VARIABLE

WORKER = (sys.executable, "-m", "tools.bench.worker")
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class WorkerProcess:
    """worker.py, running with a number of threads. It is idle but for the time of a request.

    A context manager: the process has ended when it is left, whatever the reason.

    Args:
        name: of the backend, for errors.
        command: what to run; it must speak worker.py's protocol.
        environment: more variables for it.
    """

    def __init__(self, name: str, threads: int, command: Sequence[str] = WORKER,
                 environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._busy = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        variables = os.environ | {VARIABLE: str(threads), "MKL_NUM_THREADS": str(threads)} | (environment or {})
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._log, text=True, env=variables)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """The reply. Raises EngineError where the request failed, or where the process died."""
        self._busy = True
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"{self.name}: the process died{self._last_words()}")
        self._busy = False
        reply = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{self.name}: {reply['error']}")
        return reply

    def end(self) -> None:
        """Idempotent. A process that is idle ends by itself; one that is not is killed."""
        everyone = _tree(self._process.pid)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0 if self._busy else 5)
        for pid in everyone if self._process.poll() is None else everyone[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def forget_peak(self) -> None:
        """Peak memory is counted from now on."""
        for pid in _tree(self._process.pid):
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """Resident bytes of the process and its children at their highest, since `forget_peak`."""
        return sum(_status_kib(pid, "VmHWM") for pid in _tree(self._process.pid)) * 1024

    def processor_seconds(self) -> float:
        """Of the process and its children, since they began."""
        return sum(_processor_seconds(pid) for pid in _tree(self._process.pid))

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f" of signal {-status}" + (", perhaps for its memory: try --max-rows" if status == -9 else "")
        return (how if status < 0 else f" with status {status}") + (f": {lines[-1][:300]}" if lines else "")


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM unwinds like Ctrl-C, so that processes end and folders go."""
    def unwind(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tree(pid: int) -> list[int]:
    """The process and all that descend from it; empty where it is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _tree(int(child)))]


def _status_kib(pid: int, key: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    return 0


def _processor_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK  # utime and stime, proc(5)
    return 0.0
