"""Refusing what does not fit into memory, before the system ends the process without a word."""

import os
from pathlib import Path

from spec.errors import InputError


def check_memory(where: str, what: str, needed: int, remedy: str) -> None:
    """Raise InputError where `what` needs more bytes than this machine, or this process's control group, has."""
    memory = _memory()
    if needed > memory:
        raise InputError(where, f"{what} that fit into {memory / 2**30:.1f} GiB of memory", f"{needed / 2**30:.1f} GiB",
                         remedy)


def _memory() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else ""
    return min(machine, int(text)) if text.isdecimal() else machine
