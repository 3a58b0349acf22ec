"""How many threads an engine computes with: one rule for all of them."""

import os

VARIABLE = "OMP_NUM_THREADS"


def thread_count() -> int:
    """$OMP_NUM_THREADS, which PyTorch and MKL read too, when they are loaded; else one for each core that this
    process may use. An engine with threads of its own asks here."""
    wanted = os.environ.get(VARIABLE, "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else core_count()


def core_count() -> int:
    """Cores that this process may use; where the system does not say (it is not Linux), all that there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wait_without_spinning() -> None:
    """For a process in which NumPy and several engines compute in turns; call it before any of them is loaded.

    An idle thread of OpenMP or of NumPy's BLAS else spins for up to a tenth of a second, on the cores that the next
    one needs: on two cores most of the time of a conformance run went into that. Results do not change. What the
    environment says already stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch, and MKL in the worker of genuine Caffe2
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy, whose products here are small
