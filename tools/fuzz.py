"""`dlrm conform --fuzz`: generated specs, a progress bar, and what fails as files that anyone can run again."""

import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.fuzz import Tally, campaign, command, coverage, save
from conformance.generate import generate
from conformance.plain import plain
from spec.files import check_writable, write_text
from spec.threads import VARIABLE, core_count
from tools.conform import find_backends
from tools.progress import progress_bar
from tools.specs import describe

FORMAT = 1
"""Version of the JSON. It rises when a reader would have to change."""


def run(count: int, seed: int, names: Sequence[str], minutes: float | None, jobs: int | None, out: Path,
        json_path: Path | None) -> bool:
    """Judge `count` generated specs, print and write what was found; True when everything that ran conforms.

    Interrupted, it does so with what was found by then, and raises KeyboardInterrupt again.
    Raises InputError as `tools.conform.run`.
    """
    backends = find_backends(names)
    names = list(names) or [backend.name for backend in backends if backend.available().ok]
    if json_path:
        check_writable(json_path)
    check_writable(out / "failing.toml")
    cores = core_count()
    jobs = jobs or cores
    os.environ.setdefault(VARIABLE, str(max(1, cores // jobs)))
    examples, start, tallies, interrupted = generate(count, seed), time.monotonic(), {}, False
    with progress_bar() as progress:
        task = progress.add_task(f"{len(examples)} specs", total=len(examples))
        found = campaign(examples, names, jobs, lambda message: progress.update(task, description=message))
        try:
            for latest in found:
                tallies = latest
                progress.update(task, advance=1, description=f"seed {seed}")
                if minutes and time.monotonic() - start > 60 * minutes:
                    break
        except KeyboardInterrupt:
            interrupted = True
        finally:
            found.close()
    report = {
        "format": FORMAT, "product": f"dlrm-parity {version('dlrm-parity')}",
        "seed": seed, "asked_for": count, "jobs": jobs,
        "seconds": round(time.monotonic() - start, 1),
        "conforms": bool(tallies) and not any(tally.failing for tally in tallies.values()),
        "coverage": coverage(examples),
        "backends": [_as_dict(name, tally, out) for name, tally in tallies.items()]}
    if json_path:
        write_text(json_path, json.dumps(plain(report), indent=1, allow_nan=False) + "\n")
    _print(report, Console(width=None if sys.stdout.isatty() else 160, markup=False))
    if interrupted:
        raise KeyboardInterrupt
    return report["conforms"]


def _as_dict(name: str, tally: Tally, out: Path) -> dict[str, Any]:
    """The smallest failing example is written here."""
    smallest = None
    if tally.smallest:
        paths = save(tally.smallest, out, f"{name.replace(':', '-')}-{tally.smallest.spec.name}")
        smallest = {"spec": str(paths[0]), "batch": str(paths[1]), "seed": tally.smallest.seed,
                    "problem": tally.problem, "summary": describe(tally.smallest.spec),
                    "batch_size": tally.smallest.spec.batch_size, "command": command(tally.smallest, *paths, name)}
    return {"backend": name, "examples": tally.examples, "tensors": tally.tensors, "elements": tally.elements,
            "worst": tally.worst, "beyond_float32": tally.beyond, "failing": tally.failing, "smallest": smallest}


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['asked_for']} generated specs, seed {report['seed']}, {report['seconds']:.0f} s",
                  title_justify="left", title_style="bold")
    for column in ("backend", "specs judged", "beyond float32", "failing", "tensors", "elements",
                   "worst error / bound"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for backend in report["backends"]:
        failing = len(backend["failing"])
        table.add_row(backend["backend"], f"{backend['examples'] - backend['beyond_float32']:,}",
                      f"{backend['beyond_float32']:,}",
                      Text(f"{failing:,}", style="bold red" if failing else "green"), f"{backend['tensors']:,}",
                      f"{backend['elements']:,}", f"{backend['worst']:.3g}")
    console.print(table)
    for backend in report["backends"]:
        if smallest := backend["smallest"]:
            console.print(f"{backend['backend']} fails first at {backend['failing'][0]}, and at its smallest with "
                          f"{smallest['summary']}, batch {smallest['batch_size']}:\n  {smallest['problem']}\n  "
                          f"{smallest['command']}", soft_wrap=True)
    verdict = "conforms" if report["conforms"] else "does not conform"
    console.print(Text(verdict, style="bold green" if report["conforms"] else "bold red"))
