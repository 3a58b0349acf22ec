"""The Operator record: for one Caffe2 operator, everything this package knows about it, in one place.

The validity check, `gradient.py`, the engines, the exporter and the operator tests all walk these records.
A module of this folder holds one family of operators and lists its records in OPERATORS.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef

FLOAT = np.dtype(np.float32)
INT32 = np.dtype(np.int32)
INT64 = np.dtype(np.int64)

HELPERS = frozenset({"order", "use_cudnn", "cudnn_exhaustive_search"})
"""Arguments that Caffe2's Python helpers (brew, CNNModelHelper) put on operators that do not read them."""


class OperatorError(ValueError):
    """An operator refuses its definition or its inputs, as Caffe2's own would. `str` names the operator."""


class TensorType(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Arg:
    """An argument of an operator: the Argument field it lives in, and its default (None: it may be absent).

    "f|i" is a value that lives in either field (ConstantFill's `value`): the Python type tells which. With `array`, the
    numbers of a repeated field are a float32 or int64 array instead of a tuple, which takes ten times its memory.
    """

    field: str
    default: Any = None
    required: bool = False
    array: bool = False


class Slice(NamedTuple):
    """A sparse gradient: blob names of its row indices and its values (Caffe2's GradientSlice)."""

    indices: str
    values: str


Gradient = str | Slice | None


@dataclass(frozen=True)
class Node:
    """An OperatorDef read through its record: arguments checked and completed with their defaults.

    `given` holds those alone that the definition itself has: Caffe2's gradient operators repeat them.
    """

    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    args: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)

    def error(self, message: str) -> OperatorError:
        return OperatorError(f"{self.type}({', '.join(self.inputs)}) -> {', '.join(self.outputs)}: {message}")

    def overwrites(self, position: int) -> bool:
        """Whether the first output is the blob of this input."""
        return self.outputs[0] == self.inputs[position]

    def require(self, condition: bool, message: str) -> None:
        """Raise OperatorError unless `condition`."""
        if not condition:
            raise self.error(message)


class GradientOps(NamedTuple):
    """What a gradient maker returns.

    operators: the gradient operators, in execution order.
    gradients: for each input of the forward operator, the gradient that they produce, or None.
    """

    operators: list[OperatorDef]
    gradients: list[Gradient]


Infer = Callable[[Node, Sequence[TensorType]], list[TensorType]]
"""Shape and type rule: raises OperatorError (through node.require) for whatever Caffe2 refuses by type or
shape. Sizes that depend on values (Unique's output) are given as -1 and only then."""

MakeGradient = Callable[[Node, Sequence[Gradient]], GradientOps]
"""(forward node, gradient of each output) -> GradientOps. Gradient blobs are named `X_grad` after the input
they belong to; gradient.py renames where a blob has several. Operators are made with `gradient_operator`."""

Aten = Callable[..., Any]
"""(node, *tensors) -> a tensor, or a tuple of one tensor for each output. Inputs are torch tensors that have
passed `infer`; checks of values (an index in range, lengths that add up) are made here, before any write.
torch is imported inside, so that nets can be built and checked without it. For an output that Caffe2 updates
in place the kernel writes into the input tensor and returns it."""

Onnx = Callable[[Node, Sequence[int]], str]
"""(node, rank of each input) -> a model-local ONNX function that computes it, made by `lowering.function`. It checks
no values: what the aten kernel refuses (an index out of range) ONNX runtimes may refuse, or not."""


@dataclass(frozen=True)
class Operator:
    """One Caffe2 operator type.

    Attributes:
        inputs, outputs: least and greatest number of them.
        args: its arguments by name; others are an error here, though Caffe2 ignores them silently.
        ignored: arguments that Caffe2 ignores and that nets in circulation have, besides HELPERS.
        in_place: {output position: input position} of outputs that must be the very same blob.
        overwrites: the position of an input of which the first output may be the blob: the aten kernel uses its memory.
        infer, gradient, aten, onnx: see the aliases above; gradient None means not differentiable,
            onnx None means not exported.
    """

    type: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    infer: Infer
    aten: Aten
    args: Mapping[str, Arg] = field(default_factory=dict)
    gradient: MakeGradient | None = None
    onnx: Onnx | None = None
    in_place: Mapping[int, int] = field(default_factory=dict)
    ignored: Collection[str] = ()
    overwrites: int | None = None

    def node(self, definition: OperatorDef) -> Node:
        """Read and check a definition. Raises OperatorError as Caffe2's schema check would."""
        node = Node(definition.type, tuple(definition.input), tuple(definition.output), {})
        for what, names, (low, high) in (("inputs", node.inputs, self.inputs), ("outputs", node.outputs, self.outputs)):
            node.require(low <= len(names) <= high, f"expected {low} to {high} {what}, found {len(names)}")
        for output, source in self.in_place.items():
            node.require(node.outputs[output] == node.inputs[source],
                         f"output {output} must be the blob of input {source}: it is updated in place")
        given: dict[str, Any] = {}
        for argument in definition.arg:
            if argument.name in self.ignored or argument.name in HELPERS - self.args.keys():
                continue
            node.require(argument.name in self.args,
                         f"expected only the arguments {sorted(self.args)}, found '{argument.name}'")
            node.require(argument.name not in given, f"argument '{argument.name}' is given twice")
            given[argument.name] = self._value(node, argument)
        for name, arg in self.args.items():
            node.require(not arg.required or name in given, f"expected argument '{name}', found none")
        args = {name: arg.default for name, arg in self.args.items()} | given
        return Node(node.type, node.inputs, node.outputs, args, given)

    def _value(self, node: Node, argument: Any) -> Any:
        wanted = self.args[argument.name].field
        if wanted.endswith("s") and wanted != "s":
            numbers = getattr(argument, wanted)
            if self.args[argument.name].array:
                return np.fromiter(numbers, FLOAT if wanted == "floats" else INT64, len(numbers))
            return tuple(numbers)
        present = [name for name in wanted.split("|") if argument.HasField(name)]
        node.require(len(present) == 1,
                     f"argument '{argument.name}' does not have the right field: expected field {wanted}")
        value = getattr(argument, present[0])
        return value.decode() if wanted == "s" else value


def gradient_operator(type: str, inputs: Sequence[str], outputs: Sequence[str], **arguments: Any) -> OperatorDef:
    """A definition flagged as belonging to the backward pass."""
    return make_operator(type, inputs, outputs, gradient=True, **arguments)


def grad(blob: str) -> str:
    """Caffe2's name for the gradient of a blob."""
    return f"{blob}_grad"
