"""The embedded engine: a NetDef runs in-process on PyTorch's ATen kernels, with Caffe2's semantics.

Each operator's kernel, and what it refuses, is in its Operator record. Where Caffe2 itself checks nothing and
corrupts memory, the kernels refuse.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm_caffe2.check import check_net, operator_name
from dlrm_caffe2.engine.one_hot import without_bags
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.operators import Node, Operator, OperatorError, record
from dlrm_caffe2.operators.record import TensorType
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError
from spec.memory import keep_freed_memory
from spec.model import ModelSpec
from spec.parameters import Arrays


@dataclass
class _Step:
    """One operator of a net.

    Attributes:
        accepted: the input types that its rule has let through last.
        sizes_vary: its rule could not tell the size of an output then: it depends on values (Unique's, Split's).
        made: the output types that it had last, where they vary.
    """

    where: str
    node: Node
    operator: Operator
    accepted: tuple | None = None
    sizes_vary: bool = False
    made: tuple | None = None


@dataclass
class _Plan:
    """What is known of a net before it runs. `reads` are the blobs that it needs, `types` theirs when it ran last:
    while they stay the same, and what steps whose sizes vary make, no step need be asked again what it accepts.
    Of the steps those that one kernel may take together are in one list."""

    steps: list[list[_Step]]
    reads: tuple[str, ...]
    types: list | None = None


class AtenEngine:
    """A NetEngine on PyTorch. Blobs are torch tensors, kept on `device`.

    `device` is any device of PyTorch's. It has been run on "cpu" alone: on a GPU the kernels are expected to work,
    and nothing tests that they do.
    """

    def __init__(self, device: str = "cpu") -> None:
        import torch

        keep_freed_memory()
        self._device = torch.device(device)
        self._blobs: dict[str, Any] = {}
        self._nets: dict[str, _Plan] = {}
        self.threads = torch.get_num_threads()
        self.description = f"ATen kernels of PyTorch {torch.__version__}, {device}, {self.threads} threads"

    def feed(self, blobs: Mapping[str, np.ndarray]) -> None:
        """Create or overwrite blobs (copied). Raises EngineError for a dtype that PyTorch lacks."""
        import torch

        alike = defaultdict(list)
        for name, array in blobs.items():
            alike[array.dtype, array.shape[1:] if array.ndim else name].append((name, array))
        for (dtype, _), named in alike.items():
            names, arrays = zip(*named, strict=True)
            for name in names:  # tables may leave no room for new ones beside them
                self._blobs.pop(name, None)
            try:
                tensor = torch.from_numpy(_copied(arrays, dtype.newbyteorder("="))).to(self._device)
            except TypeError as error:
                raise EngineError(f"blob '{names[0]}': {error}") from None
            # Rows of one width share a storage: an operator may then take those of all tables for those of one.
            parts = tensor.split([len(array) for array in arrays]) if len(arrays) > 1 else (tensor,)
            self._blobs.update(zip(names, parts, strict=True))

    def fetch(self, names: Sequence[str]) -> Arrays:
        """Copies of blobs. Raises EngineError for one that does not exist."""
        for name in names:
            if name not in self._blobs:
                raise EngineError(f"blob '{name}' does not exist")
        return {name: self._blobs[name].cpu().numpy().copy() for name in names}

    def run_once(self, net: NetDef) -> None:
        self._run(self._plan(net))

    def create(self, net: NetDef) -> None:
        """Check a net (see check.check_net) and keep it. Raises EngineError also for a name that is taken."""
        if net.name in self._nets:
            raise EngineError(f"net '{net.name}' exists already")
        self._nets[net.name] = self._plan(net)

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        steps = self._net(name)
        self.feed(feeds)
        self._run(steps)
        return self.fetch(fetch)

    def profile(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        seconds: dict[str, float] = {}
        steps = self._net(name)
        self.feed(feeds)
        self._run(steps, seconds)
        return seconds

    def row_blocks(self, spec: ModelSpec, table: int) -> int:
        return 0

    def faster(self, spec: ModelSpec, net: NetDef) -> NetDef:
        return without_bags(net)

    def close(self) -> None:
        self._blobs.clear()
        self._nets.clear()

    def _plan(self, net: NetDef) -> _Plan:
        nodes = check_net(net, self._blobs.keys())
        steps = [_Step(operator_name(net.name, number, node.type), node, record(node.type))
                 for number, node in enumerate(nodes)]
        return _Plan(_side_by_side(steps), outside_blobs(net.op))

    def _net(self, name: str) -> _Plan:
        if name not in self._nets:
            raise EngineError(f"net '{name}' does not exist; create it first")
        return self._nets[name]

    def _run(self, plan: _Plan, seconds: dict[str, float] | None = None) -> None:
        """Run the steps; where `seconds` is given, add the time of each to that of its operator type."""
        import torch

        types = [_type(self._blobs[name]) for name in plan.reads]
        known, plan.types = types == plan.types, None
        with torch.inference_mode():
            for steps in plan.steps:
                start = time.perf_counter()
                if not (known and len(steps) > 1 and self._run_together(steps)):
                    for step in steps:
                        known = self._run_step(step, known) and known
                if seconds is not None:
                    self._synchronize()
                    type = steps[0].node.type
                    seconds[type] = seconds.get(type, 0.0) + time.perf_counter() - start
        plan.types = types

    def _run_step(self, step: _Step, known: bool) -> bool:
        """Asks its rule where its inputs are not `known`. False where what it made varies in size, and did."""
        try:
            inputs = self._inputs(step)
            if not known:
                _check(step, inputs)
            outputs = step.operator.aten(step.node, *inputs)
        except (OperatorError, RuntimeError) as error:  # RuntimeError: PyTorch's own, such as out of memory
            raise EngineError(f"{step.where}: {error}") from error
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        for name, output in zip(step.node.outputs, outputs, strict=True):
            self._blobs[name] = output if inputs else output.to(self._device)  # kernels without inputs know no device
        if not step.sizes_vary:
            return True
        before, step.made = step.made, tuple(map(_type, outputs))
        return before == step.made

    def _run_together(self, steps: Sequence[_Step]) -> bool:
        """False where their kernel does not take them."""
        try:
            outputs = steps[0].operator.aten_many([step.node for step in steps], list(map(self._inputs, steps)))
        except RuntimeError as error:
            raise EngineError(f"{steps[0].where} and the {len(steps) - 1} after it: {error}") from error
        if outputs is None:
            return False
        for step, output in zip(steps, outputs, strict=True):
            self._blobs[step.node.outputs[0]] = output
        return True

    def _inputs(self, step: _Step) -> list:
        return [self._blobs[name] for name in step.node.inputs]

    def _synchronize(self) -> None:
        import torch

        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _copied(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """One after the other."""
    if len(arrays) == 1:
        return np.array(arrays[0], dtype, order="C")
    return np.concatenate(arrays, dtype=dtype)


def _side_by_side(steps: Sequence[_Step]) -> list[list[_Step]]:
    """In their order; together are neighbours of one type with a kernel for many, none of which reads another's."""
    stretches: list[list[_Step]] = []
    made: set[str] = set()
    for step in steps:
        if not (stretches and step.operator.aten_many and step.operator is stretches[-1][0].operator
                and made.isdisjoint((*step.node.inputs, *step.node.outputs))):
            stretches.append([])
            made = set()
        stretches[-1].append(step)
        made.update(step.node.outputs)
    return stretches


def _type(tensor: Any) -> tuple:
    return tensor.dtype, tensor.shape


def _check(step: _Step, inputs: Sequence[Any]) -> None:
    """Raise OperatorError where the step's rule refuses its inputs."""
    types = tuple(map(_type, inputs))
    if types != step.accepted:  # the rule depends on the types alone
        made = step.operator.infer(step.node, [
            TensorType(np.dtype(str(dtype).removeprefix("torch.")), tuple(shape)) for dtype, shape in types])
        step.accepted, step.sizes_vary = types, any(-1 in output.shape for output in made)
