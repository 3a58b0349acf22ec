"""A conformance report as a terminal table; plain text where the output is not a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.matrix import badness

_STYLES = {"conforms": "green", "fails": "bold red", "missing": "yellow"}


def print_report(report: dict[str, Any], console: Console) -> None:
    """One table a case, the reasons under it, and the verdict last."""
    for case in report["cases"]:
        console.print(_table(case))
        for backend in case["backends"]:
            _print_reason(backend, console)
        for backend in case["backends"]:
            _print_trajectory(backend, console)
        for pair in case["pairs"]:
            if not pair["elements"]:
                console.print(f"{pair['first']} against {pair['second']}: nothing to compare", soft_wrap=True)
            elif not pair["conforms"]:
                console.print(f"{pair['first']} against {pair['second']}: {pair['tensor']} differs by "
                              f"{_number(pair['worst'])} of what both may be off", soft_wrap=True)
        console.print()
    for entry in report["xfail"]["entries"]:
        _print_expected(entry, console)
    verdict = "conforms" if report["conforms"] else "does not conform"
    console.print(Text(verdict, style="bold green" if report["conforms"] else "bold red"))


def _table(case: dict[str, Any]) -> Table:
    capped = f", capped: {case['rows']:,} of {case['published_rows']:,} rows" if case["capped"] else ""
    batch = f"batch {case['batch_size']}"
    if case["batch_size"] != case["published_batch_size"]:
        batch += f" (published: {case['published_batch_size']})"
    title = f"{case['spec']}: {case['tables']} tables{capped}; {case['data']}, {batch}, {case['steps']} steps"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in (("backend", "left"), ("verdict", "left"), ("tensors", "right"), ("elements", "right"),
                          ("worst error / bound", "right"), ("at", "left"), ("worst against others", "right"),
                          ("same bits twice", "left")):
        table.add_column(name, justify=justify)
    for backend in case["backends"]:
        ran = backend["tensors"] > 0
        against = [pair["worst"] for pair in case["pairs"] if backend["backend"] in (pair["first"], pair["second"])]
        table.add_row(
            backend["backend"], Text(_status(backend), style=_STYLES[backend["status"]]),
            f"{backend['tensors']:,}" if ran else "", f"{backend['elements']:,}" if ran else "",
            _number(backend["worst"]["worst"]) if ran else "", backend["worst"]["tensor"] if ran else "",
            _number(max(against, key=float)) if against else "", _repeats(backend["repeat"]))
    return table


def _repeats(repeat: dict[str, Any] | None) -> str:
    return "" if repeat is None else "no" if repeat["difference"] else "yes"


def _status(backend: dict[str, Any]) -> str:
    expected = sum(bool(v["xfail"]) for section in backend["sections"] for v in section["tensors"])
    limits = (["forward"] if backend["status"] == "conforms" and not backend["trains"] else []) + (
        [f"{expected} xfail"] if expected else [])
    return backend["status"] + (f" ({', '.join(limits)})" if limits else "")


def _print_reason(backend: dict[str, Any], console: Console) -> None:
    if backend["status"] == "missing":
        console.print(f"{backend['backend']} is missing: {backend['reason']}; to add it: {backend['remedy']}",
                      soft_wrap=True)
    elif backend["worst"] is None or not (backend["worst"]["conforms"] or backend["worst"]["xfail"]):
        console.print(f"{backend['backend']} does not conform at {backend['summary']}", soft_wrap=True)
        if backend["fault"]:
            console.print(f"  {backend['fault']['summary']}", soft_wrap=True)
        if backend.get("command"):
            console.print(f"  that step alone: {backend['command']}", soft_wrap=True)
    if backend["repeat"] and backend["repeat"]["broken"]:
        found = backend["repeat"]["difference"] or "nothing was compared"
        console.print(f"{backend['backend']} promises the same bits for the same calls, and differs: {found}",
                      soft_wrap=True)


def _print_trajectory(backend: dict[str, Any], console: Console) -> None:
    """The tensor that strays furthest from the reference's path, over how far it may."""
    if backend["trajectories"]:
        furthest = {section["optimizer"]: max(section["tensors"], key=badness)
                    for section in backend["trajectories"]}
        told = ", ".join(f"{optimizer} {v['problem'] or _number(v['worst'])} ({v['tensor']})"
                         for optimizer, v in furthest.items())
        steps = backend["trajectories"][0]["steps"]
        console.print(f"{backend['backend']}, {steps} steps on its own, distance / bound: {told}", soft_wrap=True)


def _print_expected(entry: dict[str, Any], console: Console) -> None:
    scope = ", ".join(entry[key] for key in ("preset", "phase", "optimizer") if entry[key] != "*")
    where = f"{entry['backend']}, {entry['tensor']}" + (f" ({scope})" if scope else "")
    if entry["failed"]:
        console.print(f"xfail: {where}: {len(entry['failed'])} of {len(entry['matched'])} comparisons do not conform, "
                      f"as expected: {entry['reason']}", soft_wrap=True)
    elif entry["passes"]:
        console.print(f"XPASS: {where}: all {len(entry['matched'])} comparisons conform; remove the entry ("
                      f"{entry['reason']})", soft_wrap=True)
    else:
        console.print(f"xfail: {where}: nothing that was judged matches ({entry['reason']})", soft_wrap=True)


def _number(value: float | str) -> str:
    return f"{float(value):.3g}"
