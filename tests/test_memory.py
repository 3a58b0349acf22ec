"""spec/memory.py: what a process keeps of the memory that it frees."""

import ctypes
import resource
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import numpy as np
from spec.memory import keep_freed_memory

def use():
    arrays = [np.empty(6 * 2**20, np.uint8) for _ in range(30)]
    for array in arrays:
        array.fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
use()
before = use()
print(use() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_used_again_without_asking_the_system():
    faults = {mode: int(subprocess.run([sys.executable, "-c", COUNT, mode], check=True, capture_output=True,
                                       text=True).stdout) for mode in ("keep", "leave")}
    pages = 30 * 6 * 2**20 // resource.getpagesize()
    assert faults["keep"] < pages / 100 and faults["leave"] > pages / 10

