"""`dlrm conform --only`: one step of one backend, replayed."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from conformance.case import make_case
from conformance.examine import Examination, examine
from spec.backend import load_backend
from spec.errors import InputError
from spec.model import ModelSpec


def run(spec: ModelSpec, names: Sequence[str], tensor: str, optimizers: Sequence[str], step: int,
        batch_size: int | None, source: str, seed: int, device: str) -> bool:
    """Print the step's inputs, its result and its worst elements; True where it is right by itself."""
    if not names:
        raise InputError(f"--only {tensor}", "a backend", "none", "name one with --backend")
    optimizer = optimizers[0] if optimizers else None
    case = make_case(spec, source, seed, batch_size, step, [optimizer or spec.optimizer.kind])
    found = examine(case, load_backend(names[0]), tensor, optimizer, step, device)
    _print(found, Console(width=None if sys.stdout.isatty() else 160, markup=False))
    return found.conforms


def add_commands(case: dict[str, Any], spec: str, names: Mapping[str, str]) -> None:
    """Give every backend at fault the `command` that looks at that step alone.

    `spec`: how the command line names the case's spec; `names`: its backends, by their names in the report.
    """
    for backend in case["backends"]:
        fault = backend["fault"]
        if fault:
            name = names.get(backend["backend"], backend["backend"])
            options = ["--backend", name, "--seed", str(case["seed"]), "--batch-size", str(case["batch_size"])]
            options += ["--data", case["data"]] if case["data"] != "random" else []
            if fault["optimizer"]:
                options += ["--optimizer", fault["optimizer"], "--steps", str(fault["step"])]
            backend["command"] = f"dlrm conform {spec} {shlex.join([*options, '--only', fault['tensor']])}"


def _print(found: Examination, console: Console) -> None:
    under = f", step {found.step} under {found.optimizer}" if found.optimizer else ""
    console.print(f"{found.tensor}{': ' if found.operator else ''}{found.operator}{under}; {found.engine}",
                  soft_wrap=True, highlight=False)
    inputs = Table("reads", "shape", "least", "mean", "greatest", "zeros", "not finite", title_justify="left")
    for name, array in found.inputs.items():
        inputs.add_row(name, f"{array.dtype}{list(array.shape)}", *_summary(array))
    console.print(inputs)
    if found.elements:
        own = found.verdict.own
        table = Table("element", "value", "replayed", "bound", "own error", "inherited error", "own error / bound")
        for element in found.elements:
            table.add_row(str(element.place), f"{element.value:.9g}", f"{element.replayed:.9g}",
                          *(f"{n:.2e}" for n in (element.bound, element.own, element.inherited)),
                          f"{element.ratio:.3g}")
        console.print(table)
        console.print(f"{own.beyond:,} of {found.verdict.elements:,} elements are beyond what this step may be off",
                      highlight=False)
    console.print(f"wrong by itself: {found.verdict.problem or own.summary(found.tensor)}" if not found.conforms
                  else "right by itself", style="bold green" if found.conforms else "bold red", soft_wrap=True,
                  highlight=False)


def _summary(array: np.ndarray) -> list[str]:
    finite = array[np.isfinite(array)]
    if not finite.size:
        return ["", "", "", "0", f"{array.size:,}"]
    return [f"{finite.min():.4g}", f"{finite.mean():.4g}", f"{finite.max():.4g}", f"{(array == 0).sum():,}",
            f"{array.size - finite.size:,}"]
