"""What the embedded engine knows of a net before it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dlrm_caffe2.check import operator_name
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.operators import Node, record
from dlrm_caffe2.operators.record import Aten, TensorType
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

    def check(self, types: list[tuple]) -> None:
        """Raise OperatorError where its rule refuses inputs of these types (PyTorch's), on which alone it depends."""
        if types != self._accepted:
            made = self.operator.infer(self.node, [
                TensorType(np.dtype(str(dtype).removeprefix("torch.")), tuple(shape)) for dtype, shape in types])
            self._accepted, self.sizes_vary = types, any(-1 in output.shape for output in made)
            self.plain = bool(self.inputs) and not self.sizes_vary


class Stretch:
    """Steps, one after the other, that one kernel may take together; or one step.

    Attributes:
        together: that kernel, or None.
        inputs: the first inputs of all, the second inputs of all, ...; where there is a kernel.
        outputs: of all.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.type = steps, steps[0].node.type
        self.together: Callable | None = None
        if len(steps) > 1:
            self.together = steps[0].operator.aten_many.aten
            self.inputs = list(zip(*(step.inputs for step in steps), strict=True))
            self.outputs = [step.outputs[0] for step in steps]


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
    return Plan([Stretch(stretch) for stretch in _side_by_side(steps)], reads, frozenset(weights))


def _side_by_side(steps: Sequence[Step]) -> list[list[Step]]:
    """In their order; together are neighbours that one kernel takes, none of which reads what another makes."""
    stretches: list[list[Step]] = []
    before, made = None, set()
    for step in steps:
        many = step.operator.aten_many
        alike = many and many.key(step.node)
        key = None if alike is None else (step.node.type, len(step.inputs), alike)
        if key is None or key != before or not made.isdisjoint((*step.inputs, *step.outputs)):
            stretches.append([])
            made = set()
        before = key
        stretches[-1].append(step)
        made.update(step.outputs)
    return stretches
