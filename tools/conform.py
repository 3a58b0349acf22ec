"""`dlrm conform`: cases, backends, a progress bar and reports."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from conformance import report as reports
from conformance.case import make_case
from conformance.console import print_report
from conformance.html import write_html
from conformance.junit import write_junit
from conformance.result import CaseResult
from conformance.run import run_case, steps_to_run
from conformance.xfail import ExpectedFailures, load_expected_failures
from spec.backend import Backend, backend_names, load_backend
from spec.errors import InputError
from spec.files import check_writable
from spec.model import ModelSpec
from tools import only
from tools.progress import progress_bar

FREE_SAMPLES = 32
"""Of a batch of --trajectory: the reference trains nine times as long as each backend."""


@dataclass(frozen=True)
class Outputs:
    """Where reports go, besides the terminal: report.json and report.html in a folder, JSON, and JUnit XML."""

    folder: Path | None = None
    json: Path | None = None
    junit: Path | None = None

    def check(self) -> None:
        """Raise InputError, before anything runs, for a report that could not be written."""
        pages = (self.folder / "report.json", self.folder / "report.html") if self.folder else ()
        for path in (self.json, self.junit, *pages):
            if path:
                check_writable(path)

    def write(self, report: dict[str, Any]) -> None:
        if self.json:
            reports.write_json(report, self.json)
        if self.junit:
            write_junit(report, self.junit)
        if self.folder:
            reports.write_json(report, self.folder / "report.json")
            write_html(report, self.folder / "report.html")


def run(specs: Sequence[ModelSpec], names: Sequence[str], optimizers: Sequence[str], steps: int,
        batch_size: int | None, source: str, seed: int, device: str, outputs: Outputs, xfail: Path | None,
        trajectory: int | None, arguments: Sequence[str]) -> bool:
    """Run everything, print and write the reports; True when all that ran conforms.

    `trajectory`: for how many steps each backend also trains without being re-synchronised. `arguments`: how the
    command line names each spec, for the commands in the report ("tiny --max-rows 9").

    Raises InputError for bad data, an unknown backend, one asked for by name that is not installed, and an
    output that can't be written, all before anything runs.
    """
    expected = load_expected_failures(xfail) if xfail else None
    backends = find_backends(names)
    cases = [make_case(spec, source, seed, batch_size, steps, optimizers) for spec in specs]
    free = [make_case(spec, source, seed, batch_size or FREE_SAMPLES, trajectory, optimizers) if trajectory else None
            for spec in specs]
    outputs.check()
    with progress_bar() as progress:
        task = progress.add_task("", total=sum(steps_to_run(case, backends, True, long)
                                               for case, long in zip(cases, free, strict=True)))
        results = []
        for case, long in zip(cases, free, strict=True):
            def advance(message: str, name: str = case.spec.name) -> None:
                progress.update(task, advance=1, description=f"{name}: {message}")
            results.append(run_case(case, backends, device, advance, expected, True, long))
    given = dict(zip((backend.name for backend in backends), names, strict=True)) if names else {}

    def add_commands(report: dict[str, Any]) -> None:
        for case, argument in zip(report["cases"], arguments, strict=True):
            only.add_commands(case, argument, given)

    return publish(results, outputs, expected, add_commands)


def find_backends(names: Sequence[str]) -> list[Backend]:
    """Those named, or every registered one. Raises InputError for one asked for by name that is unknown or missing."""
    backends = [load_backend(name) for name in names or backend_names()]
    for backend in backends if names else ():
        availability = backend.available()
        if not availability.ok:
            raise InputError(f"backend '{backend.name}'", "an installed engine", availability.reason,
                             availability.remedy)
    return backends


def publish(results: Sequence[CaseResult], outputs: Outputs, expected: ExpectedFailures | None,
            complete: Callable[[dict[str, Any]], None] = lambda report: None) -> bool:
    """Print the report, `complete` as it is made by that, and write it where asked for; whether it conforms."""
    report = reports.as_dict(list(results), expected)
    complete(report)
    outputs.write(report)
    print_report(report, Console(width=None if sys.stdout.isatty() else 160, markup=False))
    return report["conforms"]
