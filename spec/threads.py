"""How many threads an engine computes with: one rule for all of them."""

import os

VARIABLE = "OMP_NUM_THREADS"


def thread_count() -> int:
    """$OMP_NUM_THREADS, which PyTorch and MKL read too, when they are loaded; else one for each core that this
    process may use. An engine with threads of its own asks here."""
    wanted = os.environ.get(VARIABLE, "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else len(os.sched_getaffinity(0))
