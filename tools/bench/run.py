"""`dlrm bench`: groups, ceilings, a progress bar, and reports."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from conformance.machine import describe_machine, load_average, now
from spec.backend import Backend, backend_names, load_backend
from spec.errors import EngineError, InputError
from spec.files import check_writable
from tools.bench import report as reports
from tools.bench.ceilings import ceiling_names, table_rows
from tools.bench.checking import VERIFIED
from tools.bench.compare import check_comparable, compare, print_changes
from tools.bench.console import print_report
from tools.bench.group import run_group
from tools.bench.html import write_html
from tools.bench.plan import Effort, Group, Judged
from tools.bench.process import WorkerProcess, terminable

RATES = ("gemm", "gather")


class Place(NamedTuple):
    """What a ceiling depends on: threads, and the table that is gathered from."""

    threads: int
    rows: int
    width: int


def run(groups: Sequence[Group], names: Sequence[str], effort: Effort, judged: Judged, baseline: str | None,
        source: str, seed: int, profile: bool, ceilings: bool, json_path: Path | None,
        html_path: Path | None) -> bool:
    """Measure, print and write. True where every backend that was asked for by name, or is here, was timed.

    Raises InputError for bad data, an unknown backend or baseline, no room, and an output that can't be written.
    """
    backends = {name: load_backend(name) for name in names or backend_names()}
    baseline = _baseline(baseline, backends)
    for path in filter(None, (json_path, html_path)):
        check_writable(path)
    machine = describe_machine() | {"load_before": load_average(), "date": now()}
    results, places = [], dict.fromkeys(map(_place, groups)) if ceilings else {}
    with terminable(), bar() as tell:
        before = {place: _libraries(place, tell) for place in places}
        for group in groups:
            results += run_group(group, backends, effort, judged, source, seed, profile, tell)
        after = {place: _libraries(place, tell) for place in places}
    limits = [_ceiling(group, (before[_place(group)], after[_place(group)])) for group in groups] if ceilings else []
    machine["load_after"] = load_average()
    options = asdict(effort) | {"judged": asdict(judged), "data": source, "seed": seed, "verified": VERIFIED}
    report = reports.as_dict(results, baseline, machine, options, limits)
    if json_path:
        reports.write_json(report, json_path)
    if html_path:
        write_html(report, html_path)
    print_report(report, _console())
    return not any(timing.status in ("does not conform", "fails") for result in results for timing in result.timings)


def run_comparison(before: Path, after: Path, threshold: float) -> bool:
    """Print what has changed; True where something is slower. Raises InputError for what cannot be compared."""
    reports_read = reports.read_json(before), reports.read_json(after)
    for warning in check_comparable(*reports_read, (str(before), str(after))):
        click.echo(f"warning: {warning}", err=True)
    changes = compare(*reports_read, threshold)
    print_changes(changes, threshold, _console())
    return any(change.regressed for change in changes)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160, markup=False)


def _baseline(name: str | None, backends: dict[str, Backend]) -> str:
    """By name; else torch, or the first."""
    names = [backend.name for backend in backends.values()]
    if name is None:
        return "torch" if "torch" in names else names[0]
    if name not in names:
        raise InputError(f"baseline '{name}'", f"one of {', '.join(names)}", "a backend that is not timed",
                         "name it with --backend too")
    return name


def _place(group: Group) -> Place:
    spec = group.spec
    return Place(group.threads, table_rows(max(table.rows for table in spec.tables), spec.embedding_dim),
                 spec.embedding_dim)


def _libraries(place: Place, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """What each library reaches there, alone."""
    libraries = []
    for name in ceiling_names():
        tell(f"ceilings: {name}")
        with WorkerProcess(name, place.threads) as process:
            try:
                libraries.append(process.ask("ceiling", name=name, rows=place.rows, width=place.width))
            except EngineError as error:
                libraries.append({"library": name, "reason": str(error)})
    return libraries


def _ceiling(group: Group, measured: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """The better of what each library reached before and after the rounds, and the best of all."""
    libraries = [one | {what: max(one[what], other[what]) for what in RATES if what in one and what in other}
                 for one, other in zip(*measured, strict=True)]
    return _place(group)._asdict() | {"spec": group.spec.digest, "libraries": libraries} | {
        what: max(library.get(what, 0.0) for library in libraries) for what in RATES}


@contextmanager
def bar() -> Iterator[Callable[[str], None]]:
    """Says what is being done, on stderr, and only where that is a terminal."""
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console,
                  transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what)
