"""A benchmark as one self-contained HTML page; it loads nothing from anywhere."""

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from spec.files import write_text
from tools.bench import plots
from tools.bench.console import milliseconds, title
from tools.bench.operators import TITLES
from tools.bench.quiet import DISTURBED
from tools.bench.report import Report


def write_html(report: Report, path: Path) -> None:
    """The page of `tools.bench.report.as_dict`'s dictionary. Raises InputError where it cannot be written."""
    # The house's colours, cards and tables are those of the conformance report.
    loader = ChoiceLoader([PackageLoader("tools.bench", "."), PackageLoader("conformance", ".")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters.update(ms=milliseconds, title=title, rate=_rate, heat=_heat)
    names = list(dict.fromkeys(backend["backend"] for result in report["results"] for backend in result["backends"]))
    page = environment.get_template("page.html.j2").render(
        report=report, plots=plots, disturbed=DISTURBED, parts=TITLES, names=names,
        colour={name: i % 8 for i, name in enumerate(names)},
        ceilings={(one["threads"], one["rows"], one["width"]): one for one in report["ceilings"]}.values(),
        growth=plots.growth_plots(report["results"]))
    write_text(path, page)


def _rate(value: float, unit: str) -> str:
    """"124 GFLOP/s", "11.3 GB/s"."""
    return f"{value / 1e9:.3g} G{unit}/s"


def _heat(backend: dict[str, Any], result: dict[str, Any]) -> str:
    """CSS class of a time, by how much longer it is than the setting's shortest."""
    shortest = min(other["median"] for other in result["backends"] if other["status"] == "timed")
    times = backend["median"] / shortest
    return next((f"h{level}" for level, limit in enumerate((1.03, 1.25, 1.75, 3)) if times <= limit), "h4")
