"""What the machine can do at its best: float32 GEMM, and rows gathered at random from a table.

NumPy's BLAS is one contestant; backends enter the libraries that they run on, under the entry-point group
`dlrm.ceilings`: which is the fastest depends on the processor, and a floor must be the best of all. An entry point is

    (gemm, rows, width, lookups) -> (library, multiply, gather)

`multiply()` multiplies float32 [m, k] by [k, n] once, for gemm = (m, n, k). `gather()` reads `lookups` random rows of a
float32 table [rows, width] once, and adds them up in bags, or copies them. Either may be None. Each runs alone, in
a process of its own, with the group's threads.
"""

import time
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import numpy as np

GROUP = "dlrm.ceilings"
GEMM = (2048, 1024, 1024)
"""m, n, k: a layer of the paper's benchmark, and large enough for any library to be at its best."""
LOOKUPS = 400_000
TABLE_BYTES = 2**28
"""Of a table to gather from, at the most: more than caches hold."""
SECONDS = 1.5

Kernels = tuple[str, Callable[[], object] | None, Callable[[], object] | None]


def ceiling_names() -> list[str]:
    return ["numpy", *sorted(entry.name for entry in entry_points(group=GROUP))]


def measure_ceiling(name: str, rows: int, width: int, seconds: float = SECONDS) -> dict[str, Any]:
    """One contestant, in this process: FLOP/s of `gemm`, bytes/s of `gather`."""
    if name == "numpy":
        kernels = _numpy
    else:
        (entry,) = entry_points(group=GROUP, name=name)
        kernels = entry.load()
    library, multiply, gather = kernels(GEMM, rows, width, LOOKUPS)
    found = {"library": library}
    if multiply:
        found["gemm"] = 2 * np.prod(GEMM, dtype=float) / _best_time(multiply, seconds)
    if gather:
        found["gather"] = 4.0 * width * LOOKUPS / _best_time(gather, seconds)
    return found


def table_rows(rows: int, width: int) -> int:
    """Rows of the table to gather from, for a spec whose largest table has so many."""
    return max(1, min(rows, TABLE_BYTES // (4 * width)))


def _best_time(run: Callable[[], object], seconds: float) -> float:
    """The shortest of as many runs as fit: a ceiling is what was reached once."""
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _numpy(gemm: tuple[int, int, int], rows: int, width: int, lookups: int) -> Kernels:
    m, n, k = gemm
    a, b, c = np.ones((m, k), np.float32), np.ones((k, n), np.float32), np.empty((m, n), np.float32)
    table, indices = np.ones((rows, width), np.float32), np.random.default_rng(0).integers(0, rows, lookups)
    out = np.empty((lookups, width), np.float32)
    return (f"NumPy {np.__version__}", lambda: np.matmul(a, b, out=c),
            lambda: np.take(table, indices, axis=0, out=out, mode="clip"))
