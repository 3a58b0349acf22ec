"""A conformance report as one self-contained HTML page."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from conformance import matrix
from conformance.figure import distributions, figure
from conformance.flow import Cell, flows
from conformance.ledger import SUSPICIOUS
from spec.files import write_text


def write_html(report: dict[str, Any], path: Path) -> None:
    """The page of `conformance.report.as_dict`'s dictionary; it loads nothing from anywhere. Raises InputError
    where the file cannot be written."""
    environment = Environment(loader=PackageLoader("conformance", "."), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, cell=_cell, at=_at, detail=_detail, pair_detail=_pair_detail,
                               cell_detail=_cell_detail,
                               furthest=_furthest, expected_failures=_expected_failures, short=_short)
    edges = report["histogram_edges"]
    page = environment.get_template("report.html.j2").render(
        report=report, bins=_bins(edges), suspicious=SUSPICIOUS, names=_backend_names(report),
        level=partial(matrix.level, edges=edges), ratio_level=partial(matrix.ratio_level, edges=edges),
        panels=matrix.panels, figure=figure, distributions=distributions, flows=flows,
        failures=_failures, first_failure=_first_failure)
    write_text(path, page)


def _backend_names(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(backend["backend"] for case in report["cases"] for backend in case["backends"]))


def _bins(edges: list[float]) -> list[tuple[str, str]]:
    """(CSS class, label) of every bin of the histogram, by its upper edge."""
    names = [f"{edge:g}" if edge >= 0.01 else f"1e{math.log10(edge):.0f}" for edge in edges]
    return [*((f"r{i}", f"≤ {name}") for i, name in enumerate(names)), ("fail", f"✗ > {names[-1]}")]


def _failures(backend: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(where, verdict) of what does not conform, in the order of computation."""
    return [(section["optimizer"] or verdict["phase"], verdict) for section in backend["sections"]
            for verdict in section["tensors"] if matrix.fails(verdict)]


def _expected_failures(backend: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(backend, reason, tensors) of what was expected not to conform, by reason."""
    reasons: dict[str, list[str]] = {}
    for section in backend["sections"]:
        for verdict in section["tensors"]:
            if verdict["xfail"]:
                reasons.setdefault(verdict["xfail"], []).append(verdict["tensor"])
    return [(backend["backend"], reason, tensors) for reason, tensors in reasons.items()]


def _first_failure(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The first (case, backend) that ran and does not conform, or nothing."""
    return [(case, backend) for case in report["cases"] for backend in case["backends"]
            if backend["status"] == "fails"][:1]


def _furthest(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    return max(verdicts, key=matrix.badness)


def _number(value: float | str) -> str:
    """Two digits in few characters: 0.21, 0.0042, 2.0e-5, 640, 6.4e5, ∞."""
    number = float(value)
    if not math.isfinite(number):
        return "∞" if number > 0 else "NaN"
    if 9.95 <= number < 1e4:
        return f"{number:,.0f}"
    return re.sub(r"e([+-])0*", lambda exponent: "e" + exponent[1].strip("+"), f"{number:#.2g}") if number else "0"


def _cell(verdict: dict[str, Any]) -> str:
    if not verdict["conforms"]:
        return "✗" if verdict["problem"] else f"✗ {_number(verdict['worst'])}"
    if not verdict["elements"]:
        return "empty"
    return "exact" if matrix.level(verdict, [1.0]) == "exact" else _number(verdict["worst"])


def _at(verdict: dict[str, Any]) -> str:
    """"tables.3.weight[17, 3]"; scalars have no place."""
    return verdict["tensor"] + (str(verdict["place"]) if verdict["place"] else "")


def _detail(verdict: dict[str, Any]) -> str:
    """What hovering over a cell shows, one line each; the page's script lays it out."""
    expected = [f"expected\t{verdict['xfail']}"] if verdict["xfail"] else []
    if verdict["problem"]:
        return "\n".join([verdict["tensor"], verdict["problem"], *expected])
    lines = [_at(verdict), f"value\t{float(verdict['value']):.9g}", f"expected\t{float(verdict['reference']):.9g}",
             f"bound\t± {float(verdict['bound']):.2g}", f"error / bound\t{float(verdict['worst']):.3g}"]
    if verdict["step"]:
        lines.append(f"step\t{verdict['step']}")
    if verdict["own"]:
        lines += [f"own error\t{float(verdict['own']['error']):.3g}, {_number(verdict['own']['worst'])} of its bound",
                  f"inherited\t{float(verdict['own']['inherited']):.3g}"]
    return "\n".join([*lines, f"elements\t{verdict['elements']:,}", *expected])


def _cell_detail(cell: Cell) -> str:
    if not cell.verdict:
        return f"{cell.tensor}\nnot judged"
    return _detail(cell.verdict) + (f"\nof\t{cell.of}" if cell.of else "")


def _short(count: int) -> str:
    """In at most four characters: 930, 12k, 4.5M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2g}{unit}" if count < 100 * size else f"{count // size}{unit}"
    return str(count)


def _pair_detail(pair: dict[str, Any]) -> str:
    return (f"{pair['first']} against {pair['second']}\n"
            f"worst\t{_number(pair['worst'])}\nat\t{pair['tensor'] or 'nowhere'}\n"
            f"tensors\t{pair['tensors']:,}\nelements\t{pair['elements']:,}")
