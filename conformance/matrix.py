"""A case of report.json as matrices of tensors by backends: what the HTML page draws."""

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_TABLE = re.compile(r"tables\.(\d+)\.(.+)")
_MOST_TABLES = 4
"""A tensor that more tables than this have becomes one row that unfolds."""

Verdict = dict[str, Any]


@dataclass
class Row:
    """One tensor, or (with `members`) the same tensor of many tables.

    Attributes:
        verdicts: by backend; the worst of the members' for a folded row. A backend may lack it.
        tightness: greatest rms(bound) / rms(tensor) of any backend.
        null_ratio: least score of a null result on any backend; None where the null result is right.
    """

    name: str
    verdicts: dict[str, Verdict]
    members: list["Row"] = field(default_factory=list)

    @property
    def tightness(self) -> float:
        return max((float(verdict["tightness"]) for verdict in self._all), default=0.0)

    @property
    def null_ratio(self) -> float | None:
        return min((float(v["null_ratio"]) for v in self._all if v["null_ratio"] is not None), default=None)

    @property
    def conforms(self) -> bool:
        return not any(fails(verdict) for verdict in self.verdicts.values())

    @property
    def _all(self) -> list[Verdict]:
        return [v for row in self.members for v in row._all] if self.members else list(self.verdicts.values())


@dataclass
class Panel:
    """One matrix: forward, backward, or the steps under one optimizer. `kinks` has a line for each backend."""

    title: str
    note: str
    backends: list[str]
    rows: list[Row]
    kinks: list[tuple[str, str]]

    @property
    def conforms(self) -> bool:
        return all(row.conforms for row in self.rows)


def fails(verdict: Verdict) -> bool:
    """It does not conform, and nobody expected that."""
    return not verdict["conforms"] and not verdict["xfail"]


def level(verdict: Verdict, edges: list[float]) -> str:
    """CSS class: "none" (nothing to compare), "exact" (no error, and none allowed), "fail", "xfail" (a failure that
    was expected), or "r{i}", a bin."""
    if not verdict["conforms"]:
        return "fail" if fails(verdict) else "xfail"
    if not verdict["elements"]:
        return "none"
    worst = float(verdict["worst"])
    if worst == 0 and float(verdict["tightness"]) == 0:
        return "exact"
    return ratio_level(worst, edges)


def ratio_level(worst: float | str, edges: list[float]) -> str:
    """The bin of the histogram that an error / bound falls into; "fail" above 1."""
    place = bisect_left(edges, float(worst))
    return "fail" if place == len(edges) else f"r{place}"


def panels(case: dict[str, Any]) -> list[Panel]:
    """Forward and backward of the first step, then each optimizer; every tensor that any backend was judged on."""
    keys = [(None, "forward"), (None, "backward"), *((optimizer, "") for optimizer in case["optimizers"])]
    return [panel for key in keys if (panel := _panel(case, *key))]


def _panel(case: dict[str, Any], optimizer: str | None, phase: str) -> Panel | None:
    """None where no backend came as far."""
    judged, kinks = {}, []
    for backend in case["backends"]:
        if backend["status"] == "missing" or not (backend["trains"] or phase == "forward"):
            continue
        section = next((s for s in backend["sections"] if s["optimizer"] == optimizer), None)
        tensors = section["tensors"] if section else []
        judged[backend["backend"]] = {v["tensor"]: v for v in tensors if phase in ("", v["phase"])}
        if section and section["kinks"] and phase != "backward":
            kinks.append((backend["backend"], _kinks(section["kinks"])))
    if len({line for _, line in kinks}) == 1 and len(kinks) > 1:
        kinks = [("every backend", kinks[0][1])]
    longest_first = sorted(judged.values(), key=len, reverse=True)
    names = dict.fromkeys(name for verdicts in longest_first for name in verdicts)
    rows = [Row(name, {backend: verdicts[name] for backend, verdicts in judged.items() if name in verdicts})
            for name in names]
    if not rows:
        return None
    return Panel(f"update: {optimizer}" if optimizer else phase, _note(case, optimizer, len(rows)), list(judged),
                 _fold(rows), kinks)


def _note(case: dict[str, Any], optimizer: str | None, tensors: int) -> str:
    if not optimizer:
        return f"{tensors} tensors"
    rate = next(section["learning_rate"] for backend in case["backends"] for section in backend["sections"]
                if section["optimizer"] == optimizer)
    return f"{tensors} tensors, worst of {case['steps']} steps at rate {rate:g}"


def _fold(rows: list[Row]) -> list[Row]:
    """The tables' rows under one row for each kind of tensor, where there are many tables."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(without_number(row.name), []).append(row)
    folded = []
    for name, members in groups.items():
        if len(members) <= _MOST_TABLES:
            folded += members
        else:
            backends = dict.fromkeys(backend for row in members for backend in row.verdicts)
            folded.append(Row(name, {backend: _worst(row.verdicts[backend] for row in members
                                                     if backend in row.verdicts) for backend in backends}, members))
    return folded


def without_number(name: str) -> str:
    """"tables.3.weight" -> "tables.*.weight"; other names as they are."""
    match = _TABLE.fullmatch(name)
    return f"tables.*.{match[2]}" if match else name


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=badness)


def badness(verdict: Verdict) -> tuple[float, ...]:
    """What orders verdicts from the best to the worst."""
    return (fails(verdict), not verdict["conforms"], bool(verdict["problem"]), float(verdict["worst"]),
            float(verdict["tightness"]))


def _kinks(kinks: dict[str, int]) -> str:
    counts: dict[str, int] = {}
    for name, count in kinks.items():
        counts[without_number(name)] = counts.get(without_number(name), 0) + count
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
