"""Reverse mode over a NetDef: the gradient operators of a net, made from the Operator records.

Names and accumulation are those of Caffe2's own `AddGradientOperators`, whose gradients for inputs that nobody
asks for are left out.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import read, record
from dlrm_caffe2.operators.record import Gradient, Node, OperatorError, Slice, grad
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec.errors import InputError


def add_gradients(net: NetDef, loss: str, wanted: Collection[str]) -> dict[str, str | Slice]:
    """Append the operators that compute d loss / d blob for every blob in `wanted`; the gradient of each.

    A gradient is the name of a dense blob, or a Slice where the blob is looked up by rows. No value is
    computed that no gradient in `wanted` needs. Raises InputError for a loss that the net does not make, a
    blob that the loss does not depend on, or a blob whose name a gradient needs; OperatorError for an
    operator without a gradient on the way, a blob that is overwritten although a gradient needs it, and
    a blob with both dense and sparse gradients. `net` is left alone then.
    """
    backward = _Backward(net, wanted)
    gradients = backward.run(loss)
    net.op.extend(backward.operators)
    return gradients


@dataclass
class _Part:
    """One of the gradients that a blob gets, and where its blob (of a Slice, the values) is written.

    `operator` None: the maker handed on a blob that it had been given.
    """

    gradient: str | Slice
    operator: OperatorDef | None = None
    output: int = 0

    def rename(self, number: int) -> None:
        if self.operator is None:
            return
        name = f"_{self.operator.output[self.output]}_autosplit_{number}"
        self.operator.output[self.output] = name
        self.gradient = name if isinstance(self.gradient, str) else Slice(self.gradient.indices, name)


Version = tuple[str, int]
"""A blob, and how many operators had written it: blobs may be overwritten, their versions not."""


@dataclass
class _Step:
    """A forward operator with the versions that it reads and writes."""

    node: Node
    inputs: list[Version]
    outputs: list[Version]


class _Backward:
    """The state of one reverse walk."""

    def __init__(self, net: NetDef, wanted: Collection[str]) -> None:
        self.wanted = dict.fromkeys(wanted)  # a set that keeps the order
        self.operators: list[OperatorDef] = []
        self.parts: defaultdict[Version, list[_Part]] = defaultdict(list)
        self.kept: set[str] = set()
        """Gradient blobs that hold what several blobs, or the caller, will read: complete, and not to be written."""
        self.versions: Counter[str] = Counter()
        self.steps: list[_Step] = []
        self.active: set[Version] = {(blob, 0) for blob in wanted}
        for definition in net.op:
            self._read(definition)
        self.forward_blobs = {blob for step in self.steps for blob in (*step.node.inputs, *step.node.outputs)}

    def _read(self, definition: OperatorDef) -> None:
        """A version is active where it depends on a wanted blob."""
        node = read(definition)
        inputs = [(blob, self.versions[blob]) for blob in node.inputs]
        self.versions.update(set(node.outputs))
        outputs = [(blob, self.versions[blob]) for blob in node.outputs]
        if self.active.intersection(inputs):
            self.active.update(outputs)
        self.active.update(version for version in outputs if version[0] in self.wanted)
        self.steps.append(_Step(node, inputs, outputs))

    def run(self, loss: str) -> dict[str, str | Slice]:
        if not self.versions[loss]:
            raise InputError(f"loss '{loss}'", "a blob that the net computes", "none of this name",
                             "name an output of one of its operators")
        seed = f"{loss}_autogen_grad"
        self._emit([make_operator("ConstantFill", [loss], [seed], value=1.0)])
        self.parts[loss, self.versions[loss]].append(_Part(seed))
        gradients: dict[Version, Gradient] = {}
        for step in reversed(self.steps):
            outputs = [self._accumulate(version) for version in step.outputs]
            gradients.update(zip(step.outputs, outputs, strict=True))
            self.kept.update(gradient for (blob, _), gradient in zip(step.outputs, outputs, strict=True)
                             if blob in self.wanted and isinstance(gradient, str))
            if any(outputs) and self.active.intersection(step.inputs):
                self._differentiate(step, outputs)
        found: dict[str, str | Slice] = {}
        for blob in self.wanted:
            version = blob, self.versions[blob]
            gradient = gradients[version] if version in gradients else self._accumulate(version)
            if gradient is None:
                raise InputError(f"blob '{blob}'", f"one that '{loss}' depends on", "no gradient reaches it",
                                 "ask for the gradients of what the loss is computed from")
            found[blob] = gradient
        return found

    def _differentiate(self, step: _Step, outputs: Sequence[Gradient]) -> None:
        node = step.node
        make = record(node.type).gradient
        if make is None:
            raise node.error("expected an operator with a gradient on the way from the loss, found one that has none")
        made = make(node, outputs)
        active = [(version, gradient) for version, gradient in zip(step.inputs, made.gradients, strict=True)
                  if version in self.active and gradient is not None]
        needed = {name for _, gradient in active for name in _blobs(gradient)}
        operators = _needed(made.operators, needed)
        self._check_versions(step, operators)
        self._emit(operators)
        writers = {name: [(operator, output) for operator in operators
                          for output, written in enumerate(operator.output) if written == name] for name in needed}
        for version, gradient in active:
            # An operator that reads a blob twice makes two gradients of one name, in the order of its inputs.
            places = writers[_values(gradient)]
            if places:
                self.parts[version].append(_Part(gradient, *places.pop(0)))
            else:
                self.parts[version].append(_Part(gradient))
                self.kept.add(_values(gradient))

    def _accumulate(self, version: Version) -> Gradient:
        """One gradient of all the parts that a blob has got by now."""
        parts = self.parts.pop(version, [])
        if len(parts) < 2:
            return parts[0].gradient if parts else None
        blob = version[0]
        sparse = [isinstance(part.gradient, Slice) for part in parts]
        if any(sparse) and not all(sparse):
            raise OperatorError(f"blob '{blob}': expected gradients that are all dense or all slices, found a mix: "
                                "it is looked up by rows and also used as a whole")
        return self._concatenate(blob, parts) if all(sparse) else self._sum(blob, parts)

    def _sum(self, blob: str, parts: Sequence[_Part]) -> str:
        """Into the first part that an operator made, which keeps its name; the others made are renamed."""
        total = grad(blob)
        for number, part in enumerate([part for part in parts if part.operator is not None][1:]):
            part.rename(number)
        names = [part.gradient for part in parts]
        if total in names:  # Sum works in place on its first input alone
            place = names.index(total)
            names[0], names[place] = names[place], names[0]
        self._emit([make_operator("Sum", names, [total])])
        return total

    def _concatenate(self, blob: str, parts: Sequence[_Part]) -> Slice:
        for number, part in enumerate(parts):
            part.rename(number)
        total = Slice(f"{grad(blob)}_indices_concat", f"{grad(blob)}_values_concat")
        for name, column in zip(total, zip(*(part.gradient for part in parts), strict=True), strict=True):
            self._emit([make_operator("Concat", column, [name, f"{name}_split"], axis=0)])
        return total

    def _emit(self, operators: Sequence[OperatorDef]) -> None:
        for operator in operators:
            for name in operator.output:
                if name in self.forward_blobs:
                    raise InputError(f"blob '{name}'", "a name that no gradient has", "it is a gradient's name",
                                     "rename the blob")
                if name in self.kept:
                    raise OperatorError(f"blob '{name}': a gradient that is still needed would be overwritten by that "
                                        "of an earlier version of the same blob; write no blob twice")
        self.operators += operators

    def _check_versions(self, step: _Step, operators: Sequence[OperatorDef]) -> None:
        """Gradient operators run at the end: they see the last version of every blob."""
        seen = dict(step.inputs) | dict(step.outputs)
        for name in {name for operator in operators for name in operator.input} & seen.keys():
            step.node.require(seen[name] == self.versions[name],
                              f"its gradient needs '{name}', which a later operator overwrites")


def _blobs(gradient: str | Slice) -> tuple[str, ...]:
    return (gradient,) if isinstance(gradient, str) else tuple(gradient)


def _values(gradient: str | Slice) -> str:
    return gradient if isinstance(gradient, str) else gradient.values


def _needed(operators: Sequence[OperatorDef], needed: set[str]) -> list[OperatorDef]:
    """Those operators that the needed blobs depend on, without the last outputs that nobody needs."""
    needed, kept = set(needed), []
    for operator in reversed(operators):
        if needed.isdisjoint(operator.output):
            continue
        needed.update(operator.input)
        least = record(operator.type).outputs[0]
        while len(operator.output) > least and operator.output[-1] not in needed:
            del operator.output[-1]
        kept.append(operator)
    return kept[::-1]
