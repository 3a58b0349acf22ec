"""Geometry of the figures of a case: elements by error / bound, and every tensor's worst beside what a null result
would score."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_LEFT, _WIDTH, _LANE, _TOP = 160, 1290, 34, 26
_LOW, _HIGH = 1e-5, 1e8
_PHASES = ("forward", "backward", "update")


@dataclass
class Lane:
    """`dots` is an SVG path of zero-length strokes for each CSS class."""

    name: str
    note: str
    y: int
    dots: dict[str, str]


@dataclass
class Figure:
    width: int
    height: int
    left: int
    top: int
    bound_x: float
    ticks: list[tuple[float, int]]
    lanes: list[Lane]


@dataclass
class Distributions:
    """`rows`: for each phase, by backend, the (elements, height from 0 to 1) of each bin; none where it has no tensor
    of the phase. Heights are logarithmic and of one scale: one element shows."""

    backends: list[str]
    rows: list[tuple[str, list[list[tuple[int, float]]]]]


def distributions(case: dict[str, Any]) -> Distributions:
    ran = [backend for backend in case["backends"] if backend["sections"]]
    counts = {(phase, backend["backend"]): [sum(column) for column in zip(*(
        verdict["histogram"] for section in backend["sections"] for verdict in section["tensors"]
        if verdict["phase"] == phase), strict=True)] for phase in _PHASES for backend in ran}
    top = math.log10(1 + max((count for bins in counts.values() for count in bins), default=0)) or 1
    return Distributions([backend["backend"] for backend in ran], [
        (phase, [[(count, math.log10(1 + count) / top) for count in counts[phase, backend["backend"]]]
                 for backend in ran]) for phase in _PHASES if any(counts[phase, b["backend"]] for b in ran)])


def figure(case: dict[str, Any]) -> Figure:
    """One lane for each backend that ran and a last one for null results; x is error / bound, logarithmic."""
    lanes, null = [], {}
    for backend in case["backends"]:
        verdicts = [verdict for section in backend["sections"] for verdict in section["tensors"]]
        if not verdicts:
            continue
        scores = [(verdict["phase"], float(verdict["worst"])) for verdict in verdicts if not verdict["problem"]]
        lanes.append(_lane(backend["backend"], scores, len(lanes), failing="fail"))
        for section in backend["sections"]:
            for verdict in section["tensors"]:
                if verdict["null_ratio"] is not None:
                    key = (section["optimizer"], verdict["tensor"])
                    null[key] = (verdict["phase"], float(verdict["null_ratio"]))
    lanes.append(_lane("a null result", null.values(), len(lanes), failing="null"))
    ticks = [(_x(10.0**power), power) for power in range(-5, 9)]
    return Figure(_WIDTH, _TOP + _LANE * len(lanes) + 30, _LEFT, _TOP, _x(1), ticks, lanes)


def _lane(name: str, scores: Iterable[tuple[str, float]], number: int, failing: str) -> Lane:
    """Phases lie beside each other within the lane, forward on top. `failing`: the class of what is above 1."""
    y = _TOP + number * _LANE
    points: dict[str, set[str]] = {}
    exact = 0
    for phase, score in scores:
        if score == 0:
            exact += 1
            continue
        kind = failing if score > 1 else "pass"
        points.setdefault(kind, set()).add(f"M{_x(score):.1f} {y + 8 + 9 * _PHASES.index(phase)}h0")
    return Lane(name, f"{exact} without error" if exact else "", y,
                {kind: "".join(sorted(dots)) for kind, dots in points.items()})


def _x(score: float) -> float:
    share = math.log10(min(max(score, _LOW), _HIGH) / _LOW) / math.log10(_HIGH / _LOW)
    return round(_LEFT + share * (_WIDTH - _LEFT - 30), 1)
