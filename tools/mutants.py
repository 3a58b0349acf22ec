"""`dlrm conform --mutants`: seeded faults and correct variants, counted."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conformance.mutants import report as reports
from conformance.mutants.catalogue import MUTANTS
from conformance.mutants.controls import CONTROLS
from conformance.mutants.score import Outcome, run_mutants
from spec.backend import Backend
from spec.errors import EngineError
from spec.files import check_writable, write_text
from spec.model import ModelSpec
from spec.parameters import initial_parameters
from tools.conform import find_backends
from tools.progress import progress_bar

PAGE = "MUTANTS.md"

ENVIRONMENTS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "MKL's reproducible path": {"MKL_CBWR": "COMPATIBLE"},
    "baseline vector instructions": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
"""Other threads and other kernels of the same libraries; what they read when they are loaded."""


def run(specs: Sequence[ModelSpec], arguments: Sequence[str], names: Sequence[str], seed: int, batch_size: int | None,
        out: Path | None, json_path: Path | None) -> bool:
    """Print the score, write it where asked for; True where no fault survives and no correct variant fails.

    `arguments`: how the command line names each spec. Raises as `tools.conform.run`.
    """
    backends = [backend for backend in find_backends(names) if backend.available().ok]
    for path in (json_path, out and out / PAGE):
        if path:
            check_writable(path)
    outcomes: list[Outcome] = []
    alarms: list[dict[str, Any]] = []
    faults = (*MUTANTS, *CONTROLS)
    with progress_bar() as progress:
        runs = len(faults) * len(backends) + len(ENVIRONMENTS)
        task = progress.add_task("", total=len(specs) * runs)

        def advance(message: str) -> None:
            progress.update(task, advance=1, description=message)

        for spec, argument in zip(specs, arguments, strict=True):
            outcomes += run_mutants(spec, faults, backends, seed, batch_size, advance)
            alarms += _other_environments(spec, argument, backends, seed, batch_size, advance)
    command = " ".join(["dlrm conform", *dict.fromkeys(" ".join(arguments).split()), "--mutants",
                        *(f"--backend {name}" for name in names)])
    report = reports.as_dict(outcomes, alarms, _engines(specs[0].capped(100), backends), command)
    if json_path:
        reports.write_json(report, json_path)
    if out:
        write_text(out / PAGE, reports.page(report))
    _print(report, Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False))
    return report["passes"]


def _engines(spec: ModelSpec, backends: Sequence[Backend]) -> dict[str, str]:
    engines = {}
    for backend in backends:
        model = backend.create(spec, initial_parameters(spec, 0))
        engines[backend.name] = model.engine
        model.close()
    return engines


def _other_environments(spec: ModelSpec, argument: str, backends: Sequence[Backend], seed: int,
                        batch_size: int | None, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """The whole suite, two steps, in processes of their own."""
    found = []
    for name, environment in ENVIRONMENTS.items():
        advance(f"{spec.name}: {name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            options = [option for backend in backends for option in ("--backend", backend.name)]
            options += ["--batch-size", str(batch_size)] if batch_size else []
            command = [sys.executable, "-c", "from tools.cli import main; main()", "conform", *shlex.split(argument),
                       "--steps", "2", "--seed", str(seed), "--json", str(path), *options]
            result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
            if not path.exists():
                raise EngineError(f"{name}: {result.stderr.strip() or result.stdout.strip()}")
            (case,) = json.loads(path.read_text())["cases"]
            found += [{"spec": spec.name, "backend": judged["backend"], "control": name,
                       "conforms": judged["status"] == "conforms", "summary": judged["summary"]}
                      for judged in case["backends"]]
    return found


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table("phase", *report["engines"], title_justify="left",
                  title="faults caught / that make a difference (called by the right name / of known operator)")
    for phase, by_backend in report["phases"].items():
        table.add_row(phase, *(f"{s['killed']} / {s['killed'] + s['survived']} ({s['localised']} / {s['localisable']})"
                               if s["killed"] + s["survived"] else "·" for s in by_backend.values()))
    console.print(table)
    for entry in report["mutants"]:
        where = f"{entry['mutant']} on {entry['backend']}, {entry['spec']}"
        if entry["status"] == "survived":
            console.print(f"survived: {where}: {entry['what']}", style="bold red", soft_wrap=True)
        elif entry["localised"] is False:
            console.print(f"named elsewhere: {where}: {entry['fault']}", style="yellow", soft_wrap=True)
    for control in report["controls"]:
        if not control["conforms"]:
            console.print(f"false alarm: {control['control']} on {control['backend']}, {control['spec']}: "
                          f"{control['summary']}", style="bold red", soft_wrap=True)
    score = report["score"]
    console.print(
        f"{score['share']:.1%} of the faults that make a difference are caught ({score['killed']:,} of "
        f"{score['killed'] + score['survived']:,}; {score['equivalent']} make none); "
        f"{score['localised']:,} of {score['localisable']:,} are called by the right name; "
        f"{report['false_alarms']} false alarms in {len(report['controls']):,} correct variants",
        style="bold green" if report["passes"] else "bold red", soft_wrap=True)
