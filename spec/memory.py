"""Memory: refusing what does not fit, before the system ends the process without a word, and keeping what was freed."""

import ctypes
import os
from pathlib import Path

from spec.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h

def check_memory(where: str, what: str, needed: int, remedy: str) -> None:
    """Raise InputError where `what` needs more bytes than this machine, or this process's control group, has."""
    memory = _memory()
    if needed > memory:
        raise InputError(where, f"{what} that fit into {memory / 2**30:.1f} GiB of memory", f"{needed / 2**30:.1f} GiB",
                         remedy)


def keep_freed_memory() -> None:
    """Have this process keep blocks of up to 128 MiB that it frees, 1 GiB of them, for what it allocates next.

    glibc gives them back to the system, and the activations of the next step are then paid for page by page: a
    quarter of a training step of the paper's benchmark. Larger blocks, such as tables, are given back as ever. Does
    nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**27)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _memory() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(machine, int(text)) if text.isdecimal() else machine
