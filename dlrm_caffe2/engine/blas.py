"""Which path the legacy MKL takes. It reads its environment when its process starts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MKL = "MKL 2020.0"
"""Linked into every PyTorch 1.10.2 wheel."""


class Setting(NamedTuple):
    """An environment variable for the worker, and why it is set."""

    variable: str
    value: str
    why: str


def mkl_settings(cpuinfo: str, environment: Mapping[str, str]) -> list[Setting]:
    """The settings for a processor (the content of /proc/cpuinfo). What the user has set is kept."""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    settings = []
    if "avx2" in flags:
        if "AuthenticAMD" in cpuinfo:
            settings.append(Setting("MKL_DEBUG_CPU_TYPE", "5", "AMD with AVX2: its own choice is a third as fast"))
        settings.append(Setting("MKL_CBWR", "AVX2,STRICT", "the same bits in every run, at any number of threads"))
    return [setting if setting.variable not in environment else
            Setting(setting.variable, environment[setting.variable], "your environment")
            for setting in settings]


def current_settings() -> list[Setting]:
    """The settings for this machine; none where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    return mkl_settings(path.read_text() if path.exists() else "", os.environ)
