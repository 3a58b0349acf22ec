"""Operators that follow one another and that one function computes, without what they hand to each other.

For nets that say so (`mark`): what lies between such operators is never made, so nobody may want to fetch it.
`fusions.py` has the functions.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dlrm_caffe2.net import argument, make_argument, read_before_written, with_operators
from dlrm_caffe2.operators import Node
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef

_MARK = "fuse"


class Fused(NamedTuple):
    """Attributes:

    type: that of the operators which takes the most time.
    inputs, outputs: the blobs that are read and made.
    run: the tensors of the former -> those of the latter. It writes nothing where it returns None, since it does not
        take them, or raises what an operator refuses.
    """

    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[..., Sequence[Any] | None]


class Fusion(NamedTuple):
    """A pattern of types of operators, each followed by a space, and what makes one of such operators, if it can."""

    types: re.Pattern[str]
    match: Callable[[Sequence[Node]], Fused | None]


def mark(net: NetDef) -> NetDef:
    """A copy of the net of which nothing is wanted but its external outputs, with what belongs together side by side:
    the gradient of a table's rows and their update, that of a layer and its update."""
    operators = list(net.op)
    for update in net.op:
        if (update.type, len(update.input)) not in (("ScatterWeightedSum", 5), ("WeightedSum", 4)):
            continue
        made = {name: operator for operator in operators for name in operator.output}
        gradient = made.get(update.input[3 if update.type == "ScatterWeightedSum" else 2])
        if gradient is None:
            continue
        start, end = (next(at for at, other in enumerate(operators) if other is one) for one in (gradient, update))
        between = operators[start + 1:end]
        if update.type == "ScatterWeightedSum":
            if gradient.type == "SparseLengthsIndicesInGradientSumGradient" and _independent(gradient, between):
                operators[start:end] = [*between, gradient]
        elif gradient.type == "FCGradient":
            while between and between[0].type == "WeightedSum":  # that of its other parameter
                start, between = start + 1, between[1:]
            if _independent(update, between):
                operators[start + 1:end + 1] = [update, *between]
    result = with_operators(net, operators)
    result.arg.append(make_argument(_MARK, 1))
    return result


def is_marked(net: NetDef) -> bool:
    return argument(net, _MARK).i == 1


def find(fusions: Iterable[Fusion], nodes: Sequence[Node], start: int,
         wanted: Sequence[str]) -> tuple[int, Fused] | None:
    """How many of the nodes from `start` on can be computed by one function, and by which.

    `wanted`: what the net makes for others.
    """
    types = "".join(f"{node.type} " for node in nodes[start:])
    for pattern, match in fusions:
        if found := pattern.match(types):
            count = found[0].count(" ")
            its, others = nodes[start:start + count], [*nodes[:start], *nodes[start + count:]]
            fused = match(its)
            if fused and _are_there_before(fused.inputs, its) and not _is_missed(fused, its, others, wanted):
                return count, fused
    return None


def _independent(one: OperatorDef, others: Iterable[OperatorDef]) -> bool:
    """Whether it makes no difference if it comes before or after them."""
    return not any({*one.input, *one.output} & {*other.output} or {*one.output} & {*other.input} for other in others)


def _are_there_before(inputs: Iterable[str], its: Sequence[Node]) -> bool:
    """Whether all that is read is what these operators find, not what one of them makes."""
    return {*inputs} <= {*read_before_written((node.inputs, node.outputs) for node in its)}


def _is_missed(fused: Fused, its: Sequence[Node], others: Iterable[Node], wanted: Sequence[str]) -> bool:
    """Whether something else reads what would not be made."""
    lost = {name for node in its for name in node.outputs}.difference(fused.outputs)
    return not lost.isdisjoint(wanted) or any(not lost.isdisjoint(node.inputs) for node in others)
