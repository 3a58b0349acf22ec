"""A benchmark as terminal tables; plain text where the output is no terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.bench.operators import TITLES
from tools.bench.plots import Curves, growth_plots
from tools.bench.quiet import DISTURBED
from tools.bench.report import Report


def print_report(report: Report, console: Console) -> None:
    """One table for each setting, why some have no time under it, and where the time went."""
    for result in report["results"]:
        console.print(_table(result, report["baseline"]))
        for backend in result["backends"]:
            if backend["status"] != "timed":
                remedy = f"; {backend['remedy']}" if backend["remedy"] else ""
                console.print(f"{backend['backend']}: {backend['status']}: {backend['reason']}{remedy}",
                              soft_wrap=True)
        if not result["point"] and any(backend["breakdown"] for backend in result["backends"]):
            console.print(_breakdown(result))
        console.print()
    for plot in growth_plots([result for result in report["results"] if result["point"]]):
        console.print(_growth(plot))
        console.print()
    console.print(Text(_footnote(report)), soft_wrap=True)


def title(result: dict[str, Any]) -> str:
    """"paper-benchmark, training with sgd, batch 2048, 2 threads"."""
    how = f"training with {result['optimizer']}" if result["mode"] == "training" else result["mode"]
    capped = f" (capped: {result['rows']:,} of {result['published_rows']:,} rows)" if result["capped"] else ""
    point = result["point"] or {"axis": "batch"}
    point = "" if point["axis"] == "batch" else f", {point['axis']} {point['value']:g}"
    return (f"{result['spec']}{capped}{point}, {how}, batch {result['batch_size']}, "
            f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}")


def _table(result: dict[str, Any], baseline: str) -> Table:
    table = Table(title=title(result), title_justify="left", title_style="bold")
    table.add_column("backend")
    for name in ("ms", "quartiles", "samples/s", f"ratio to {baseline}", "95 % interval", "over floor", "cores",
                 "others", "memory"):
        table.add_column(name, justify="right")
    for backend in result["backends"]:
        table.add_row(backend["backend"], *(_numbers(backend) if backend["status"] == "timed" else
                                            [Text(backend["status"], style="yellow"), *[""] * 8]))
    if result["floor"]:
        table.add_section()
        table.add_row("floor", milliseconds(result["floor"]))
    return table


def _numbers(backend: dict[str, Any]) -> list[str]:
    low, high = backend["quartiles"]
    ratio = backend["ratio"]
    return [milliseconds(backend["median"]), f"{milliseconds(low)}-{milliseconds(high)}",
            f"{backend['samples_per_second']:,.0f}", f"{ratio[0]:.2f}" if ratio else "",
            f"{ratio[1]:.2f}-{ratio[2]:.2f}" if ratio else "",
            f"{backend['over_floor']:,.{2 if backend['over_floor'] < 100 else 0}f}" if backend["over_floor"] else "",
            f"{backend['cores']:.1f}",
            f"{backend['disturbed']:.0%}", f"{backend['memory'] / 2**20:,.0f} MiB"]


def _breakdown(result: dict[str, Any]) -> Table:
    """Milliseconds in each kind of operator, and what no operator has."""
    table = Table(title="milliseconds in operators, by each engine's own profiler", title_justify="left")
    table.add_column("backend")
    shown = [part for part in TITLES if any((backend["breakdown"] or {}).get(part) for backend in result["backends"])]
    for part in shown:
        table.add_column(TITLES[part], justify="right")
    table.add_column("sum", justify="right")
    for backend in result["backends"]:
        if backend["breakdown"]:
            table.add_row(backend["backend"], *(milliseconds(backend["breakdown"][part]) for part in shown),
                          milliseconds(sum(backend["breakdown"].values())))
    return table


def _growth(plot: Curves) -> Table:
    """How the times of a sweep grow."""
    table = Table(title=f"{plot.title}: growth with {plot.unit}", title_justify="left", title_style="bold")
    table.add_column("backend")
    for name in ("exponent", "fixed ms", "farthest from a line"):
        table.add_column(name, justify="right")
    for curve in plot.curves:
        if curve.growth:
            table.add_row(curve.name, f"{curve.growth.exponent:.2f}", f"{curve.growth.fixed * 1e3:,.3g}",
                          f"{curve.growth.deviation:.0%}")
    return table


def _footnote(report: Report) -> str:
    machine, options = report["machine"], report["options"]
    return (f"{machine['cpu']}, {machine['cores']} cores; load average {machine['load_before']:.1f} before, "
            f"{machine['load_after']:.1f} after; {options['rounds']} rounds, interleaved; medians, quartiles over the "
            "rounds, and the bootstrap interval of the ratio of medians. cores: processor time over time. others: the "
            "share of all cores that other programs took" + _warning(report))


def _warning(report: Report) -> str:
    shares = [backend["disturbed"] for result in report["results"] for backend in result["backends"]
              if backend["status"] == "timed"]
    if max(shares, default=0) < DISTURBED:
        return ""
    return f"\nWARNING: other programs took up to {max(shares):.0%} of the cores; wait, or use --patience"


def milliseconds(seconds: float) -> str:
    """Three digits: 0.012, 1.23, 12.3, 123, 1,234."""
    value = seconds * 1e3
    for limit, digits in ((0.1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"
