"""What the machine can do at its best: float32 GEMM, and rows gathered at random from a table.

NumPy's BLAS is one contestant; backends enter others under the entry-point group `dlrm.ceilings`, since the fastest
library is not the same on every machine, and no engine can be faster than the best of them. An entry point is a
function

    (rows, width, seconds) -> {"library": name, "gemm": FLOP/s, "gather": bytes/s}

in which either number may be missing. Each runs alone, in a process of its own, with the group's threads.
"""

import time
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import numpy as np

GROUP = "dlrm.ceilings"
GEMM = (2048, 1024, 1024)
"""m, n, k: a layer of the paper's benchmark, and large enough for any library to be at its best."""
LOOKUPS = 100_000
TABLE_BYTES = 2**28
"""Of a table to gather from, at the most: more than caches hold."""
SECONDS = 1.0


def best_time(run: Callable[[], object], seconds: float = SECONDS) -> float:
    """The shortest of as many runs as fit: a ceiling is what was reached once."""
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def numpy_ceiling(rows: int, width: int, seconds: float) -> dict[str, Any]:
    m, n, k = GEMM
    a, b, c = np.ones((m, k), np.float32), np.ones((k, n), np.float32), np.empty((m, n), np.float32)
    table, indices = np.ones((rows, width), np.float32), np.random.default_rng(0).integers(0, rows, LOOKUPS)
    out = np.empty((LOOKUPS, width), np.float32)
    return {"library": f"NumPy {np.__version__}",
            "gemm": 2 * m * n * k / best_time(lambda: np.matmul(a, b, out=c), seconds),
            "gather": out.nbytes / best_time(lambda: np.take(table, indices, axis=0, out=out, mode="clip"), seconds)}


def ceiling_names() -> list[str]:
    return ["numpy", *sorted(entry.name for entry in entry_points(group=GROUP))]


def measure_ceiling(name: str, rows: int, width: int) -> dict[str, Any]:
    """One contestant, in this process."""
    if name == "numpy":
        return numpy_ceiling(rows, width, SECONDS)
    (entry,) = entry_points(group=GROUP, name=name)
    return entry.load()(rows, width, SECONDS)


def table_rows(rows: int, width: int) -> int:
    """Rows of the table to gather from, for a spec whose largest table has so many."""
    return max(1, min(rows, TABLE_BYTES // (4 * width)))
