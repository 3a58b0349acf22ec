"""`dlrm bench --compare A.json B.json`: what has become slower, beyond noise and threshold.

A row is one backend in one setting. B / A is the ratio of medians, with the bootstrap interval of two samples that have
nothing to do with each other. It is a regression where even the lower end of the interval is more than the threshold
above 1, and an improvement where the upper end is as much below; everything between is noise or too small. A backend
that A has times for and B has none is a regression too. What the interval cannot know is how the machine fared between
the two runs: a warning says where other programs were at work, and a baseline that did not change tells more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spec.errors import InputError
from tools.bench.console import milliseconds, title
from tools.bench.quiet import DISTURBED
from tools.bench.report import Report
from tools.bench.statistics import Interval, ratio, spread

_STYLES = {"slower": "bold red", "gone": "bold red", "faster": "green", "same": ""}


@dataclass(frozen=True)
class Change:
    """One row. Attributes: `verdict`: "slower", "faster", "same" or "gone"; `noise`: of A and B, half the distance of
    the quartiles over the median."""

    where: str
    backend: str
    before: float
    after: float | None
    ratio: Interval | None
    noise: tuple[float, float] | None
    verdict: str
    reason: str = ""

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "gone")


def check_comparable(before: Report, after: Report, names: tuple[str, str]) -> list[str]:
    """Warnings. Raises InputError for reports of different machines, or with no setting in common."""
    for key in ("cpu", "cores", "system"):
        mine, yours = before["machine"][key], after["machine"][key]
        if mine != yours:
            raise InputError(names[1], f"a run on the machine of {names[0]} ({key} {mine})", yours,
                             "measure both on one machine")
    if not _settings(before).keys() & _settings(after).keys():
        raise InputError(names[1], f"a setting that {names[0]} has too (spec, mode, batch size, threads)",
                         "none", "measure the same settings")
    for key in ("data", "seed", "distinct_batches"):
        mine, yours = before["options"][key], after["options"][key]
        if mine != yours:
            raise InputError(names[1], f"the batches of {names[0]} ({key} {mine})", yours, "measure the same batches")
    warnings = []
    if before["machine"]["environment"] != after["machine"]["environment"]:
        warnings.append(f"the environment differs: {before['machine']['environment']} and "
                        f"{after['machine']['environment']}")
    for name, report in zip(names, (before, after), strict=True):
        most = max((backend["disturbed"] for result in report["results"] for backend in _timed(result)), default=0)
        if most > DISTURBED:
            warnings.append(f"{name} was measured while other programs took up to {most:.0%} of the cores")
    return warnings


def compare(before: Report, after: Report, threshold: float) -> list[Change]:
    """Every backend that `before` has times for, in the settings that both have."""
    later = _settings(after)
    return [_change(title(result), backend, later[key], threshold)
            for key, result in _settings(before).items() if key in later for backend in _timed(result)]


def print_changes(changes: list[Change], threshold: float, console: Console) -> None:
    table = Table()
    for column in ("setting", "backend", "A ms", "B ms", "B / A", "95 % interval", "noise A, B", "verdict"):
        table.add_column(column, justify="left" if column in ("setting", "backend", "verdict") else "right")
    for change in changes:
        if change.after is None:
            numbers = ["", "", "", ""]
        else:
            numbers = [milliseconds(change.after), f"{change.ratio.value:.2f}",
                       f"{change.ratio.low:.2f}-{change.ratio.high:.2f}",
                       f"{change.noise[0]:.1%}, {change.noise[1]:.1%}"]
        verdict = f"{change.verdict}: {change.reason}" if change.reason else change.verdict
        table.add_row(change.where, change.backend, milliseconds(change.before), *numbers,
                      Text(verdict, style=_STYLES[change.verdict]))
    console.print(table)
    regressed = sum(change.regressed for change in changes)
    console.print(f"{regressed} of {len(changes)} are slower by more than {threshold:.0%}, beyond noise")


def _settings(report: Report) -> dict[tuple, dict[str, Any]]:
    return {(result["digest"], result["mode"], result["batch_size"], result["threads"]): result
            for result in report["results"]}


def _timed(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (backend for backend in result["backends"] if backend["status"] == "timed")


def _change(where: str, before: dict[str, Any], result: dict[str, Any], threshold: float) -> Change:
    name = before["backend"]
    after = next((backend for backend in result["backends"] if backend["backend"] == name), None)
    if after is None or after["status"] != "timed":
        reason = after["status"] if after else "was not asked for"
        return Change(where, name, before["median"], None, None, None, "gone", reason)
    found = ratio(after["rounds"], before["rounds"])
    verdict = "slower" if found.low > 1 + threshold else "faster" if found.high < 1 - threshold else "same"
    noise = (_noise(before["rounds"]), _noise(after["rounds"]))
    return Change(where, name, before["median"], after["median"], found, noise, verdict)


def _noise(rounds: list[float]) -> float:
    value, low, high = spread(rounds)
    return (high - low) / 2 / value
