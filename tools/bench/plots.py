"""Geometry of the page's plots: numbers in, places on an SVG out. page.html.j2 draws them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.bench.operators import TITLES
from tools.bench.statistics import Growth, growth

WIDTH, LEFT, RIGHT, LANE = 640, 108, 84, 34
CURVE_WIDTH, CURVE_HEIGHT, CURVE_LEFT, CURVE_TOP, CURVE_BOTTOM, CURVE_RIGHT = 560, 320, 62, 14, 40, 16

Backend = dict[str, Any]


@dataclass
class Bar:
    """One backend's time: `x` its end, `low` and `high` those of its whisker; `segments` (part, x, width, seconds) of
    its breakdown, where that is drawn."""

    backend: Backend
    y: int
    x: float
    low: float
    high: float
    segments: list[tuple[str, float, float, float]] = field(default_factory=list)


@dataclass
class Bars:
    height: int
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    floor: float | None
    """Where the floor is; None where it is not known."""


def bars(result: dict[str, Any], stacked: bool = False) -> Bars:
    """Horizontal bars from zero, the fastest first; `stacked` by kind of operator, as the paper's figure 6."""
    timed = sorted((backend for backend in result["backends"] if backend["status"] == "timed"
                    and (backend["breakdown"] or not stacked)), key=lambda backend: backend["median"])
    longest = max((sum(backend["breakdown"].values()) if stacked else backend["quartiles"][1] for backend in timed),
                  default=1.0) or 1.0
    ticks = nice_ticks(longest)
    scale = (WIDTH - LEFT - RIGHT) / max(longest, 1e-12)
    drawn = []
    for number, backend in enumerate(timed):
        low, high = backend["quartiles"]
        bar = Bar(backend, 6 + number * LANE, LEFT + backend["median"] * scale, LEFT + low * scale, LEFT + high * scale)
        if stacked:
            x = float(LEFT)
            for part in TITLES:
                seconds = backend["breakdown"][part]
                if seconds > 0:
                    bar.segments.append((part, round(x, 2), round(seconds * scale, 2), seconds))
                    x += seconds * scale
            bar.x = x
        drawn.append(bar)
    floor = LEFT + result["floor"] * scale if result["floor"] else None
    places = [(LEFT + tick * scale, _milliseconds(tick)) for tick in ticks]
    return Bars(6 + LANE * len(drawn) + 24, drawn, places, floor)


@dataclass
class Curve:
    """A backend's line: `points` for an SVG polyline, `dots` (x, y, text)."""

    name: str
    points: str
    dots: list[tuple[float, float, str]]
    growth: Growth | None


@dataclass
class Curves:
    title: str
    unit: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]


def curves(title: str, unit: str, series: dict[str, list[tuple[float, float]]]) -> Curves:
    """Seconds against a size, both logarithmic; `series`: (size, seconds) of each backend."""
    sizes = sorted({size for points in series.values() for size, _ in points})
    times = [seconds for points in series.values() for _, seconds in points]
    x = _logarithmic(sizes[0], sizes[-1], CURVE_LEFT, CURVE_WIDTH - CURVE_RIGHT)
    low, high = min(times) / 1.25, max(times) * 1.25
    y = _logarithmic(low, high, CURVE_HEIGHT - CURVE_BOTTOM, CURVE_TOP)
    lines = []
    for name, points in series.items():
        dots = [(round(x(size), 1), round(y(seconds), 1), f"{name}: {_milliseconds(seconds)} ms at {size:g}")
                for size, seconds in sorted(points)]
        fit = growth(*zip(*points, strict=True)) if len(points) > 1 else None
        lines.append(Curve(name, " ".join(f"{a},{b}" for a, b, _ in dots), dots, fit))
    return Curves(title, unit, [(x(size), _short(size)) for size in sizes],
                  [(y(tick), _milliseconds(tick)) for tick in log_ticks(low, high)], lines)


def growth_plots(results: Sequence[dict[str, Any]]) -> list[Curves]:
    """One for each spec, mode, number of threads and axis along which there are two sizes: the points of a sweep,
    several batch sizes, several numbers of threads."""
    plots = []
    swept = [result for result in results if result["point"]]
    for axis in dict.fromkeys(result["point"]["axis"] for result in swept):
        for key, group in _grouped(swept, ("spec", "mode", "threads")):
            chosen = [(result["point"]["value"], result) for result in group if result["point"]["axis"] == axis]
            plots += _plot(f"{key[0]}, {key[1]}, {_threads(key[2])}", UNITS[axis], chosen)
    plain = [result for result in results if not result["point"]]
    for key, group in _grouped(plain, ("spec", "mode", "threads", "optimizer")):
        plots += _plot(f"{key[0]}, {key[1]}, {_threads(key[2])}", UNITS["batch"],
                       [(result["batch_size"], result) for result in group])
    for key, group in _grouped(plain, ("spec", "mode", "batch_size", "optimizer")):
        plots += _plot(f"{key[0]}, {key[1]}, batch {key[2]}", "threads",
                       [(result["threads"], result) for result in group])
    return plots


UNITS = {"batch": "samples in a batch", "tables": "tables", "rows": "rows, of all tables", "lookups":
         "lookups of a sample, on average", "width": "width of the hidden layers, times the spec's"}


def nice_ticks(longest: float) -> list[float]:
    """Four to eight round numbers from 0 to at most `longest`."""
    step = 10 ** math.floor(math.log10(longest))
    step *= next(factor for factor in (0.1, 0.2, 0.5, 1, 2) if longest / (step * factor) <= 8)
    return [number * step for number in range(int(longest / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; powers alone where that is too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 9:
            break
    return ticks


def _plot(title: str, unit: str, chosen: Sequence[tuple[float, dict[str, Any]]]) -> list[Curves]:
    series: dict[str, list[tuple[float, float]]] = {}
    for size, result in chosen:
        for backend in result["backends"]:
            if backend["status"] == "timed":
                series.setdefault(backend["backend"], []).append((size, backend["median"]))
    if len({size for points in series.values() for size, _ in points}) < 2:
        return []
    return [curves(title, unit, series)]


def _grouped(results: Iterable[dict[str, Any]], keys: Sequence[str]) -> Iterable[tuple[tuple, list[dict[str, Any]]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups.items()


def _logarithmic(low: float, high: float, start: float, end: float):
    spread = math.log(high / low) or 1.0
    return lambda value: round(start + (end - start) * math.log(value / low) / spread, 1)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.6g}"


def _short(size: float) -> str:
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{size / limit:.3g}{letter}"
    return f"{size:.3g}"
