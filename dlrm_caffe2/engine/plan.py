"""What the embedded engine knows of a net before it runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dlrm_caffe2.check import operator_name
from dlrm_caffe2.engine.fused import Fused, find, is_marked
from dlrm_caffe2.engine.fusions import FUSIONS
from dlrm_caffe2.net import outside_blobs, read_before_written
from dlrm_caffe2.operators import Node, record
from dlrm_caffe2.operators.record import Aten, TensorType
from dlrm_caffe2.operators.rules import torch_dtype
from dlrm_caffe2.proto.caffe2_pb2 import NetDef


class Step:
    """One operator of a net.

    Attributes:
        where: how errors name it.
        plain: it has inputs, and its rule told the sizes of its outputs.
        sizes_vary: its rule could not tell one: it depends on values (Unique's, Split's).
        made: the types of its outputs when it ran last, where they vary.
    """

    def __init__(self, where: str, node: Node) -> None:
        self.where, self.node = where, node
        self.operator = record(node.type)
        self.aten: Aten = self.operator.aten
        self.inputs, self.outputs = node.inputs, node.outputs
        self.plain = self.sizes_vary = False
        self.made: tuple | None = None
        self._accepted: list[tuple] | None = None
        self._makes: list[tuple] = []

    def check(self, types: list[tuple]) -> list[tuple]:
        """The types of its outputs (PyTorch's, -1 for a size that depends on values), given those of its inputs, on
        which alone its rule depends. Raises OperatorError where that refuses them."""
        if types != self._accepted:
            made = self.operator.infer(self.node, [
                TensorType(np.dtype(str(dtype).removeprefix("torch.")), tuple(shape)) for dtype, shape in types])
            self._accepted, self.sizes_vary = types, any(-1 in output.shape for output in made)
            self.plain = bool(self.inputs) and not self.sizes_vary
            self._makes = [(torch_dtype(output.dtype), output.shape) for output in made]
        return self._makes


class Stretch:
    """Steps, one after the other, that one function can take together; or one step.

    Attributes:
        type: that of the operators; where it is fused, of the one that takes the most time.
        reads: what the steps read that was there before them.
    """

    def __init__(self, steps: Sequence[Step], fused: Fused | None = None) -> None:
        self.steps, self.fused = steps, fused
        self.type = fused.type if fused else steps[0].node.type
        self.reads = read_before_written((step.inputs, step.outputs) for step in steps)

    def check(self, types: dict[str, tuple]) -> None:
        """Raise OperatorError where one of the steps refuses what it would be given, for the types of their inputs."""
        types = dict(types)
        for step in self.steps:
            types |= zip(step.outputs, step.check([types[name] for name in step.inputs]), strict=False)


@dataclass
class Plan:
    """`reads`: the blobs that a net needs; `weights`: those of FC among them; `types`: of all when it ran last."""

    stretches: list[Stretch]
    reads: tuple[str, ...]
    weights: frozenset[str]
    types: list[tuple] | None = None


def make_plan(net: NetDef, nodes: Sequence[Node]) -> Plan:
    """Of a net and its nodes (see check.check_net)."""
    steps = [Step(operator_name(net.name, number, node.type), node) for number, node in enumerate(nodes)]
    reads = outside_blobs(net.op)
    weights = {node.inputs[1] for node in nodes if node.type == "FC"}.intersection(reads)
    return Plan(list(_stretches(net, steps)), reads, frozenset(weights))


def _stretches(net: NetDef, steps: Sequence[Step]) -> Iterator[Stretch]:
    """In their order."""
    nodes, at = [step.node for step in steps], 0
    while at < len(steps):
        found = find(FUSIONS, nodes, at, net.external_output) if is_marked(net) else None
        count, fused = found or (1, None)
        yield Stretch(steps[at:at + count], fused)
        at += count
