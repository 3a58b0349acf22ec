"""The model's graph with the errors on it: geometry of an SVG, from the steps that report.json lists.

Forward runs from left to right; every gradient lies below its tensor, so that backward runs back to the left; the
gradients of a layer's parameters lie below the layer, and what the optimizer makes of them below those.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from conformance import matrix
from conformance.matrix import Verdict, without_number

_PITCH, _WIDTH, _LINE, _INSET, _CELL, _MARGIN, _TOP = 83, 73, 17, 4, 8, 84, 10
_LANES = ("tables", "forward", "backward", "parameters' gradients", "after the update")
_GAPS = (18, 30, 30, 30, 12)
_GRADIENT = re.compile(r"(.+)_grad(?:_values|_indices)?")
_PARTS = re.compile(r"(.+?\.(?:\d+|\*)|interaction)\.(.+)")
_TABLES_A_LINE = 13


@dataclass
class Cell:
    """One tensor. `state`: "own" (wrong by itself), "inherited" (wrong from what it was given), "missing" (not
    judged), or a class of `matrix.level`. `of`: the backend and optimizer of the verdict."""

    tensor: str
    verdict: Verdict | None
    of: str
    state: str
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0

    @property
    def wrong(self) -> bool:
        return self.state in ("own", "inherited")


@dataclass
class Node:
    """A tensor, or the same tensor of every table, a cell for each. `first`: the first step at fault is here."""

    name: str
    lane: int
    column: int
    cells: list[Cell]
    first: bool = False
    x: int = 0
    y: int = 0
    width: int = 0
    height: int = 0

    @property
    def of_tables(self) -> bool:
        return self.name.startswith("tables.")

    @property
    def lines(self) -> list[str]:
        """What is written on it; a gradient begins with a nabla, and below the layers the column tells the layer."""
        base = _GRADIENT.fullmatch(self.name)
        name = base[1] if base else self.name
        parts = _PARTS.fullmatch(name)
        head, kind = parts.groups() if parts else ("", name)
        if self.of_tables:
            head = f"{len(self.cells)} tables" if len(self.cells) > 1 else "1 table"
        return [*([head] if head and self.lane <= 2 else []), f"∇ {kind}" if base else kind]


@dataclass
class Edge:
    """`kind`: "forward", "backward", or "saved": a forward tensor that a gradient needs. `hot`: an error went along."""

    path: str
    kind: str
    hot: bool


@dataclass
class Flow:
    """`backend` is None for all that conform together: each tensor's worst."""

    backend: dict[str, Any] | None
    nodes: list[Node]
    edges: list[Edge]
    lanes: list[tuple[str, int]]
    width: int
    height: int
    inherited: list[str] = field(default_factory=list)


def flows(case: dict[str, Any], edges: list[float]) -> list[Flow]:
    """A picture of each backend that fails; where none does, one of the worst of all. Nothing where nothing ran.

    `edges`: of the histogram's bins.
    """
    ran = [backend for backend in case["backends"] if backend["sections"]]
    failing = [backend for backend in ran if backend["status"] == "fails"]
    if failing:
        return [_flow(case["graph"], [backend], edges, backend) for backend in failing]
    return [_flow(case["graph"], ran, edges, None)] if ran else []


def _flow(graph: dict[str, list[str]], backends: list[dict[str, Any]], edges: list[float],
          failing: dict[str, Any] | None) -> Flow:
    fault = failing["fault"] if failing else None
    verdicts = _verdicts(backends)
    if fault:
        verdicts[fault["tensor"]] = (f"{fault['optimizer']}, step {fault['step']}" if fault["optimizer"] else "",
                                     fault["verdict"])
    nodes = _nodes(graph)
    for name in graph:
        of, verdict = verdicts.get(name, ("", None))
        nodes[without_number(name)].cells.append(Cell(name, verdict, of, _state(verdict, edges)))
        nodes[without_number(name)].first |= bool(fault) and fault["tensor"] == name
    lanes, height = _place(nodes.values())
    cells = {cell.tensor: cell for node in nodes.values() for cell in node.cells}
    width = max(node.x + _WIDTH for node in nodes.values()) + 22
    return Flow(failing, list(nodes.values()), _edges(graph, nodes, cells), lanes, width, height,
                [cell.tensor for cell in cells.values() if cell.state == "inherited"])


def _verdicts(backends: list[dict[str, Any]]) -> dict[str, tuple[str, Verdict]]:
    """The worst verdict on each tensor, and whose it is: the backend's where there are several, the optimizer's."""
    found: dict[str, list[tuple[str, Verdict]]] = {}
    for backend in backends:
        for section in backend["sections"]:
            of = [backend["backend"]] * (len(backends) > 1) + [section["optimizer"]] * bool(section["optimizer"])
            for verdict in section["tensors"]:
                name = verdict["tensor"].replace("_grad_indices", "_grad_values")
                found.setdefault(name, []).append((", ".join(of), verdict))
    return {name: max(known, key=_rank) for name, known in found.items()}


def _rank(entry: tuple[str, Verdict]) -> tuple[float, ...]:
    """The worst; of two that fail, the one that was replayed: it tells own from inherited."""
    verdict = entry[1]
    wrong = not verdict["conforms"]
    return (matrix.fails(verdict), wrong, wrong and bool(verdict["own"]), *matrix.badness(verdict))


def _state(verdict: Verdict | None, edges: list[float]) -> str:
    if verdict is None:
        return "missing"
    level = matrix.level(verdict, edges)
    own = verdict["own"]
    if level == "fail":
        return "inherited" if own and not verdict["problem"] and float(own["worst"]) <= 1 else "own"
    return "own" if own and float(own["worst"]) > 1 and not verdict["xfail"] else level


def _nodes(graph: dict[str, list[str]]) -> dict[str, Node]:
    """By name, numbers of tables left out: column and lane of each."""
    updates = {name for name, sources in graph.items() if name in sources}
    forward = [name for name in graph if name not in updates and not _GRADIENT.fullmatch(name)]
    readers: dict[str, list[str]] = {}
    for name in forward:
        for source in graph[name]:
            readers.setdefault(source, []).append(name)
    late: dict[str, int] = {}
    for name in reversed(forward):  # as late as what reads it allows: tables next to the interaction
        late[name] = min((late[reader] for reader in readers.get(name, ())), default=1) - 1
    late |= {source: late[names[0]] for source, names in readers.items() if source not in late}
    first = min(late.values())
    nodes: dict[str, Node] = {}
    for name in graph:
        key = without_number(name)
        if key in nodes:
            continue
        gradients = [source for source in graph[name] if _GRADIENT.fullmatch(source)]
        of = _GRADIENT.fullmatch(gradients[-1] if name in updates else name)
        base = of[1] if of else name
        lane = 4 if name in updates else 1 if not of else 2 if base in forward else 3
        if key.startswith("tables."):
            lane = {1: 0, 2: 3}.get(lane, lane)
        if lane == 1 and any((node.lane, node.column) == (1, late[base] - first) for node in nodes.values()):
            lane = 0
        nodes[key] = Node(key, lane, late[base] - first, [])
    return nodes


def _place(nodes: Iterable[Node]) -> tuple[list[tuple[str, int]], int]:
    """Put every node and cell where it belongs; the lanes' names with their y, and the height of all."""
    nodes, y, lanes = list(nodes), _TOP, []
    for lane, gap in enumerate(_GAPS):
        bottoms: dict[int, int] = {}
        for node in (node for node in nodes if node.lane == lane):
            inset = _INSET if lane > 2 else 0
            node.x, node.width = _MARGIN + node.column * _PITCH + inset, _WIDTH - inset
            node.y = bottoms.get(node.column, y)
            _lay_cells(node)
            bottoms[node.column] = node.y + node.height + 6
        if bottoms:
            lanes.append((_LANES[lane], y))
            y = max(bottoms.values()) - 6 + gap
    return lanes, y


def _lay_cells(node: Node) -> None:
    text = _LINE if len(node.lines) == 1 else 29
    count = len(node.cells)
    if not node.of_tables:
        node.height = text
        (cell,) = node.cells
        cell.x, cell.y, cell.width, cell.height = node.x, node.y, node.width, node.height
        return
    across = min(count, _TABLES_A_LINE)
    size = (node.width - 6) / across
    for number, cell in enumerate(node.cells):
        cell.x = round(node.x + 3 + number % across * size, 1)
        cell.y = node.y + text + number // across * _CELL
        cell.width, cell.height = round(size - 0.8, 1), _CELL - 1
    node.height = text + -(-count // across) * _CELL + 3


def _edges(graph: dict[str, list[str]], nodes: dict[str, Node], cells: dict[str, Cell]) -> list[Edge]:
    """Between the nodes, each once. What a step reads of the state before it is no edge."""
    hot: dict[tuple[str, str], bool] = {}
    for name, sources in graph.items():
        for source in sources:
            if source in cells and nodes[without_number(source)].lane < 4:
                key = (without_number(source), without_number(name))
                hot[key] = hot.get(key, False) or (cells[source].wrong and cells[name].state == "inherited")
    return [_edge(nodes[source], nodes[target], is_hot) for (source, target), is_hot in
            sorted(hot.items(), key=lambda item: item[1])]


def _edge(a: Node, b: Node, hot: bool) -> Edge:
    kind = "saved" if a.lane < 2 <= b.lane else "forward" if b.lane < 2 else "backward"
    ax, bx, ay, by = a.x + a.width // 2, b.x + b.width // 2, a.y + a.height // 2, b.y + b.height // 2
    if a.column == b.column:
        if b.y - a.y - a.height <= max(_GAPS) + _LINE:
            return Edge(f"M{bx} {a.y + a.height}V{b.y}", kind, hot)
        if a.lane <= 2:  # past others, on the left of them
            return Edge(f"M{b.x - 5} {a.y + a.height}V{by}H{b.x}", kind, hot)
        return Edge(f"M{a.x + a.width} {ay}h4V{by}H{b.x + b.width}", kind, hot)
    if a.lane == b.lane and abs(a.column - b.column) > 1:  # around what lies between
        side, out = (a.y, -20) if a.lane < 2 else (a.y + a.height, 20)
        return Edge(f"M{ax} {side}C{ax} {side + out} {bx} {side + out} {bx} {side}", kind, hot)
    if kind == "saved":
        return Edge(f"M{ax} {a.y + a.height}C{ax} {by} {b.x - 20} {by} {b.x} {by}", kind, hot)
    start, end = (a.x + a.width, b.x) if a.column < b.column else (a.x, b.x + b.width)
    middle = (start + end) / 2
    return Edge(f"M{start} {ay}C{middle:g} {ay} {middle:g} {by} {end} {by}", kind, hot)
