"""What the embedded engine knows of a net before it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dlrm_caffe2.check import operator_name
from dlrm_caffe2.engine import fused
from dlrm_caffe2.engine.fused import Fused
from dlrm_caffe2.engine.fusions import FUSIONS
from dlrm_caffe2.net import outside_blobs
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
    """Steps, one after the other, that one kernel may take together; or one step.

    Attributes:
        type: that of the operators, or of those that are fused the one that takes the most time.
        together: that kernel, of lists of tensors, or of tensors if it is `fused`; or None.
        inputs: of operators that are alike, the first inputs of all, the second inputs of all, ...; of others, all that
            the kernel reads.
        outputs: what it makes.
        reads: what the fused operators read that was there before them.
    """

    def __init__(self, steps: Sequence[Step], fused: Fused | None = None) -> None:
        self.steps, self.type, self.fused = steps, steps[0].node.type, fused is not None
        self.together: Callable | None = None
        if fused:
            self.type, self.inputs, self.outputs, self.together = fused
            made = {name for step in steps for name in step.outputs}
            self.reads = [name for step in steps for name in step.inputs if name not in made or name in fused.inputs]
        elif len(steps) > 1:
            self.together = steps[0].operator.aten_many.aten
            self.inputs = list(zip(*(step.inputs for step in steps), strict=True))
            self.outputs = [step.outputs[0] for step in steps]

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
    return Plan(_stretches(net, steps), reads, frozenset(weights))


def _stretches(net: NetDef, steps: Sequence[Step]) -> list[Stretch]:
    """In their order."""
    nodes = [step.node for step in steps]
    stretches, alone, at = [], [], 0
    while at < len(steps):
        found = fused.find(FUSIONS, nodes, at, net.external_output) if fused.is_marked(net) else None
        count, loop = found or (1, None)
        if loop is None:
            alone.append(steps[at])
        else:
            stretches += [*map(Stretch, _side_by_side(alone)), Stretch(steps[at:at + count], loop)]
            alone = []
        at += count
    return [*stretches, *map(Stretch, _side_by_side(alone))]


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
