"""What is to be timed: groups of settings, each with one set of parameters."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spec.memory import check_memory
from spec.model import MLP, ModelSpec, Table
from spec.parameters import parameter_bytes

MODES = ("inference", "training")
SWEEPS = ("batch", "tables", "rows", "lookups", "width")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of a sweep, each times what the spec has."""

IN_PASSING = 2
"""Copies of the parameters while one worker is loaded; they load one after the other."""


class Setting(NamedTuple):
    """One row of the result for each backend: samples in a batch, and training or inference."""

    mode: str
    batch_size: int


@dataclass(frozen=True)
class Point:
    """A place on a growth curve: `value` is the size that grows, `axis` one of SWEEPS."""

    axis: str
    value: float


@dataclass(frozen=True)
class Group:
    """Settings that the same worker processes run: one spec at one number of threads.

    Inference comes first, since it changes nothing.
    """

    spec: ModelSpec
    threads: int
    settings: tuple[Setting, ...]
    point: Point | None = None


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        seconds: what one backend's turn in a round is meant to take; `iterations` overrules it.
        patience: seconds that a turn may wait for other programs to be quiet, and be repeated where they were not.
    """

    rounds: int = 15
    seconds: float = 0.5
    iterations: int | None = None
    distinct_batches: int = 4
    patience: float = 0.0

    def turn(self, seconds: float) -> int:
        """Iterations of a turn, where one takes so long."""
        return self.iterations or max(2, min(500, round(self.seconds / max(seconds, 1e-6))))


@dataclass(frozen=True)
class Judged:
    """How large the model and the batch are, at the most, on which a backend is judged before it is timed."""

    rows: int = 10_000
    samples: int = 128


def make_groups(specs: Sequence[ModelSpec], modes: Sequence[str], batch_sizes: Sequence[int],
                threads: Sequence[int], sweep: str | None = None) -> list[Group]:
    """Every combination. With a `sweep`, each spec becomes one group for each point, at its own batch size."""
    groups = []
    for spec, count in itertools.product(specs, threads):
        sizes = batch_sizes or (spec.batch_size,)
        ordered = [mode for mode in MODES if mode in modes]
        if sweep is None:
            settings = tuple(Setting(mode, size) for mode in ordered for size in sizes)
            groups.append(Group(spec, count, settings))
            continue
        for point, grown, size in sweep_points(spec, sweep, sizes[0]):
            groups.append(Group(grown, count, tuple(Setting(mode, size) for mode in ordered), point))
    return groups


def sweep_points(spec: ModelSpec, axis: str, batch_size: int) -> list[tuple[Point, ModelSpec, int]]:
    """The spec, and its batch size, with one thing grown by each of FACTORS; points that coincide are left out.

    batch: samples. tables: the spec's tables again and again. rows: of every table. lookups: of every bag, and of
    ragged ones both ends. width: of the hidden layers of both MLPs.
    """
    points = {}
    for factor in FACTORS:
        grown, size = spec, batch_size
        if axis == "batch":
            size = value = max(1, round(batch_size * factor))
        elif axis == "tables":
            value = max(1, round(len(spec.tables) * factor))
            grown = spec.model_copy(update={"tables": tuple(itertools.islice(itertools.cycle(spec.tables), value))})
        elif axis == "width":
            value = factor
            grown = spec.model_copy(update={name: _wider(getattr(spec, name), factor) for name in ("bottom", "top")})
        else:
            tables = tuple(_grown(table, axis, factor) for table in spec.tables)
            value = sum(table.rows if axis == "rows" else float(sum(_ends(table))) / 2 for table in tables)
            grown = spec.model_copy(update={"tables": tables})
        points[value] = (Point(axis, value), grown, size)
    return list(points.values())


def _ends(table: Table) -> tuple[int, int]:
    return table.lookups if table.fixed_lookups is None else (table.lookups, table.lookups)


def _grown(table: Table, axis: str, factor: float) -> Table:
    if axis == "rows":
        return table.model_copy(update={"rows": max(1, round(table.rows * factor)), "published_rows": None})
    if table.fixed_lookups is not None:
        return table.model_copy(update={"lookups": max(1, round(table.lookups * factor))})
    low, high = table.lookups
    return table.model_copy(update={"lookups": (round(low * factor), max(1, round(high * factor)))})


def _wider(mlp: MLP, factor: float) -> MLP:
    hidden = tuple(max(1, round(width * factor)) for width in mlp.widths[:-1])
    return mlp.model_copy(update={"widths": (*hidden, mlp.widths[-1])})


def check_room(group: Group, workers: int) -> None:
    """Raise InputError where the workers' copies of the parameters do not fit into memory."""
    copies = workers + IN_PASSING
    check_memory(f"spec '{group.spec.name}'", f"{copies} copies of the parameters, one for each backend and "
                 f"{IN_PASSING} in passing,", copies * parameter_bytes(group.spec),
                 "cap the tables with --max-rows, or name fewer backends")
