"""What the operators of a net imply about the types of its inputs, of which a NetDef says nothing.

Every type of an operator's unknown inputs is tried on its record's rule; where one alone fits, it is the input's. The
sizes in it begin as unknowns, each represented by a large number that nothing else equals. Where a rule refuses the
sizes, an unknown is taken to be equal to another size of the operator, so that the rule goes on: the bias of an FC has
as many elements as its matrix has rows. What no rule asks for stays open.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dlrm_caffe2.check import operator_name
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.onnx.axes import Axes, infer_outputs
from dlrm_caffe2.operators import Node, OperatorError
from dlrm_caffe2.operators.record import TensorType
from dlrm_caffe2.operators.rules import NUMERIC
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError, InputError

OWN = "?"
"""In a hint's shape: a size of this axis alone."""

_RANKS = range(4)
_MOST_TRIED = 256
"""Types of an operator's inputs that are tried: two unknown inputs, not three."""
_UNKNOWN = 10**12 + 39
"""The first number that stands for an unknown size, and the distance to the next: no sum of sizes is one of them."""


class Hint(NamedTuple):
    """What is known of an input, None where nothing is. Sizes are numbers, OWN, or names: equal names, equal sizes."""

    dtype: np.dtype | None = None
    shape: tuple[int | str, ...] | None = None


Lengths = dict[str, tuple[int, ...]]
Types = dict[str, TensorType]


def derive(net: NetDef, nodes: Sequence[Node], known: Mapping[str, TensorType],
           hints: Mapping[str, Hint]) -> dict[str, Axes]:
    """The types of the inputs that are not `known`. Open sizes have the hints' names, or are named after an input and
    its axis.

    Raises InputError naming the inputs whose types are not determined, and EngineError for an operator that no type
    fits.
    """
    derivation = _Derivation(net, nodes, known, hints)
    while not derivation.walk():
        pass
    if derivation.ambiguous:
        derivation.refuse()
    return {name: derivation.axes(name) for name in outside_blobs(net.op)
            if name in derivation.chosen}


class _Derivation:
    def __init__(self, net: NetDef, nodes: Sequence[Node], known: Mapping[str, TensorType],
                 hints: Mapping[str, Hint]) -> None:
        self.net, self.nodes, self.known, self.hints = net, nodes, dict(known), hints
        self.chosen: Types = {}
        self.ambiguous: dict[str, list[TensorType]] = {}
        self._fresh = itertools.count(_UNKNOWN, _UNKNOWN)
        self._named: dict[str, int] = {}
        """The unknowns that hints name."""
        self._names: dict[int, str] = {}

    def axes(self, name: str) -> Axes:
        """Raises InputError for a size that is computed from others which are open."""
        type = self.chosen[name]
        if any(size > _UNKNOWN and not _open(size) for size in type.shape):
            self.ambiguous[name] = [type]
            self.refuse()
        return Axes(type.dtype, tuple(self._names[size] if _open(size) else size for size in type.shape))

    def refuse(self) -> None:
        name, types = next(iter(self.ambiguous.items()))
        example = types[-1] if types else TensorType(NUMERIC[0], (0, 0))
        raise InputError(
            f"net '{self.net.name}'", "operators that determine the types of all inputs",
            "undetermined: " + "; ".join(f"'{name}' ({_kinds(types)})" for name, types in self.ambiguous.items()),
            f"say them, for example --input '{name}={example.dtype}[{','.join(OWN * len(example.shape))}]'"
            f"{'' if types else ', or make it with --init'}")

    def walk(self) -> bool:
        """From operator to operator; False where something was learnt, for then all begins anew."""
        types, lengths = self.known | self.chosen, Lengths()
        for number, node in enumerate(self.nodes):
            unknown = [name for name in dict.fromkeys(node.inputs) if name not in types]
            try:
                if unknown:
                    self._choose(number, unknown, types, lengths)
                    return False
                types.update(zip(node.outputs, infer_outputs(node, types, lengths), strict=True))
            except OperatorError as error:
                equal = None if unknown else _equated(node, types, lengths)
                if not equal:
                    raise EngineError(f"{operator_name(self.net.name, number, node.type)}: {error}") from error
                self._learn(equal)
                return False
        return True

    def _choose(self, number: int, unknown: Sequence[str], types: Types, lengths: Lengths) -> None:
        """The types of inputs that this operator is the first to read. Raises OperatorError where none fits."""
        node = self.nodes[number]
        fitting = self._fitting(node, unknown, types, lengths)
        if fitting is None:
            self.ambiguous |= {name: [] for name in unknown}
            self.refuse()
        if len({_ranks(found, unknown) for found, _ in fitting}) > 1:
            fitting = [fit for fit in fitting if self._goes_on(number, unknown, types | fit[0], lengths)] or fitting
        for name in unknown:
            if len({(found[name].dtype, len(found[name].shape)) for found, _ in fitting}) > 1:
                self.ambiguous[name] = [found[name] for found, _ in fitting]
        if len({_ranks(found, unknown) for found, _ in fitting}) > 1:
            self.refuse()  # nothing follows from a rank that is not known
        candidate, equal = fitting[-1]
        self.chosen |= candidate
        for name in unknown:
            for axis, size in enumerate(candidate[name].shape):
                if _open(size):
                    self._names.setdefault(size, f"{name}.{axis}")
        self._learn(equal)

    def _fitting(self, node: Node, unknown: Sequence[str], types: Types,
                 lengths: Lengths) -> list[tuple[Types, dict[int, int]]] | None:
        """Types of the unknown inputs, and what must be equal then; None where there are too many to try. Raises
        OperatorError where none fits."""
        tried = [list(self._options(name)) for name in unknown]
        if math.prod(map(len, tried)) > _MOST_TRIED:
            return None
        fitting, refusal = [], None
        for combination in itertools.product(*tried):
            candidate = dict(zip(unknown, combination, strict=True))
            try:
                fitting.append((candidate, _fit(node, types | candidate, lengths)))
            except OperatorError as error:
                refusal = error
        if not fitting:
            raise refusal
        return fitting

    def _goes_on(self, number: int, chosen: Sequence[str], types: Types, lengths: Lengths) -> bool:
        """Whether all operators that read the chosen inputs take them."""
        types, lengths = dict(types), dict(lengths)
        for node in self.nodes[number:]:
            unknown = [name for name in dict.fromkeys(node.inputs) if name not in types]
            try:
                if not unknown and not _fit(node, types, lengths):
                    types |= zip(node.outputs, infer_outputs(node, types, lengths), strict=True)
                elif unknown and not set(chosen).isdisjoint(node.inputs):
                    self._fitting(node, unknown, types, lengths)
            except OperatorError:
                if not set(chosen).isdisjoint(node.inputs):
                    return False
        return True

    def _options(self, name: str) -> Iterator[TensorType]:
        dtype, shape = self.hints.get(name, Hint())
        shapes = [(OWN,) * rank for rank in _RANKS] if shape is None else [shape]
        for one, sizes in itertools.product([dtype] if dtype else NUMERIC, shapes):
            yield TensorType(one, tuple(map(self._size, sizes)))

    def _size(self, size: int | str) -> int:
        if isinstance(size, int):
            return size
        if size == OWN:
            return next(self._fresh)
        if size not in self._named:
            self._named[size] = next(self._fresh)
            self._names[self._named[size]] = size
        return self._named[size]

    def _learn(self, equal: Mapping[int, int]) -> None:
        """Put each unknown's equal into its place; a name that a hint gave stays."""
        for unknown, other in equal.items():
            if _open(other) and unknown in self._named.values() and other not in self._named.values():
                self._names[other] = self._names[unknown]
            self._named = {name: other if size == unknown else size for name, size in self._named.items()}
            self.chosen = {name: _replaced(type, {unknown: other}) for name, type in self.chosen.items()}


def _open(size: int) -> bool:
    """Whether it is one of the numbers that stand for an unknown size: a product of two is larger than all."""
    return size % _UNKNOWN == 0 and 0 < size < _UNKNOWN**2


def _ranks(types: Types, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(len(types[name].shape) for name in names)


def _kinds(types: Sequence[TensorType]) -> str:
    """In words, for an error."""
    if not types:
        return "nothing known"
    dtypes = " or ".join(dict.fromkeys(str(type.dtype) for type in types))
    ranks = sorted({len(type.shape) for type in types})
    return f"{dtypes}, {f'rank {ranks[0]}' if len(ranks) == 1 else 'of any rank'}"


def _fit(node: Node, types: Types, lengths: Lengths) -> dict[int, int]:
    """What unknowns must equal for the operator to take its inputs. Raises OperatorError where nothing helps."""
    try:
        infer_outputs(node, types, dict(lengths))
        return {}
    except OperatorError:
        equal = _equated(node, types, lengths)
        if equal is None:
            raise
        return equal


def _equated(node: Node, types: Types, lengths: Lengths) -> dict[int, int] | None:
    """As few unknowns as it takes, each equal to another size of the operator; None where that does not help."""
    complaint = _complaint(node, types, lengths)
    if complaint is None:
        return {}
    for unknown, other in _steps([types[name].shape for name in dict.fromkeys(node.inputs)]):
        trial = types | {name: _replaced(types[name], {unknown: other}) for name in node.inputs}
        next = _complaint(node, trial, lengths)
        if next is None or next.text != complaint.text or next.misfits < complaint.misfits:
            rest = _equated(node, trial, lengths)
            if rest is not None:
                return {unknown: other} | rest
    return None


def _steps(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """An unknown and another size, those of the same axis first."""
    places = [(axis, size) for shape in shapes for axis, size in enumerate(shape)]
    for axis, unknown in dict.fromkeys(place for place in places if _open(place[1])):
        others = dict.fromkeys(size for _, size in sorted(places, key=lambda place: place[0] != axis) if size >= 0)
        yield from ((unknown, other) for other in others if other != unknown)


class _Complaint(NamedTuple):
    """What a rule objects to: the text without its numbers but for that of the input, and how many of the sizes that it
    lists are not those that it expects."""

    text: str
    misfits: int


def _complaint(node: Node, types: Types, lengths: Lengths) -> _Complaint | None:
    try:
        infer_outputs(node, types, dict(lengths))
        return None
    except OperatorError as error:
        listed = re.search(r"expected shape \[(.*?)\], found \[(.*?)\]", str(error))
        pairs = zip(*(sizes.split(", ") for sizes in listed.groups()), strict=False) if listed else ()
        return _Complaint(re.sub(r"(?<!input )\d+", "", str(error)), sum(one != other for one, other in pairs))


def _replaced(type: TensorType, equal: Mapping[int, int]) -> TensorType:
    return TensorType(type.dtype, tuple(equal.get(size, size) for size in type.shape))
