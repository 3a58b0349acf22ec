"""What other programs do meanwhile: processor time that is neither idle nor our own."""

import os
import time
from collections.abc import Callable
from pathlib import Path

DISTURBED = 0.1
"""Share of the cores that others take, above which a time says little."""

_PROBE = 0.2
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Meter:
    """Measures from its creation on. `own`: processor seconds of our own processes so far."""

    def __init__(self, own: Callable[[], float]) -> None:
        self._own = own
        self._start = time.perf_counter(), _busy_seconds(), own()

    def others(self) -> float:
        """The share of all cores that other programs have taken since; 0 where the system does not tell."""
        start, busy, own = self._start
        capacity = (time.perf_counter() - start) * (os.cpu_count() or 1)
        return max(0.0, (_busy_seconds() - busy - (self._own() - own)) / capacity)


def wait_until_quiet(own: Callable[[], float], seconds: float) -> float:
    """Return when others take less than DISTURBED, or after so many seconds; what is left of these is returned."""
    end = time.perf_counter() + seconds
    while time.perf_counter() + _PROBE < end:
        meter = Meter(own)
        time.sleep(_PROBE)
        if meter.others() < DISTURBED:
            break
    return max(0.0, end - time.perf_counter())


def _busy_seconds() -> float:
    """Of all cores, since the machine began: all but idle and iowait, proc(5)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    fields = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) * _TICK
