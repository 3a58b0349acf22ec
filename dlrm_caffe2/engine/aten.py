"""The embedded engine: a NetDef runs in-process on PyTorch's ATen kernels, with Caffe2's semantics.

Each operator's kernel, and what it refuses, is in its Operator record. Where Caffe2 itself checks nothing and
corrupts memory, the kernels refuse.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlrm_caffe2.check import check_net
from dlrm_caffe2.engine.fused import mark
from dlrm_caffe2.engine.one_hot import without_bags
from dlrm_caffe2.engine.one_product import one_product
from dlrm_caffe2.engine.overwrite import overwrite
from dlrm_caffe2.engine.plan import Plan, Step, Stretch, make_plan
from dlrm_caffe2.operators import OperatorError
from dlrm_caffe2.operators.dense import columns_first
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError
from spec.memory import keep_freed_memory
from spec.model import ModelSpec
from spec.parameters import Arrays


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
        self._nets: dict[str, Plan] = {}
        self._settled: Plan | None = None
        self._fed: dict[str, tuple] = {}
        self._weights: set[str] = set()
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
                self._settled = None
                raise EngineError(f"blob '{names[0]}': {error}") from None
            shapes = [array.shape for array in arrays]
            parts = tensor.split([shape[0] for shape in shapes]) if len(arrays) > 1 else (tensor,)
            self._blobs.update(zip(names, parts, strict=True))
            for name in self._weights.intersection(names):
                self._blobs[name] = columns_first(self._blobs[name])
            types = [(dtype, shape) for shape in shapes]
            if list(map(self._fed.get, names)) != types:
                self._fed.update(zip(names, types, strict=True))
                self._settled = None

    def fetch(self, names: Sequence[str]) -> Arrays:
        """Copies of blobs. Raises EngineError for one that does not exist."""
        return {name: tensor.cpu().numpy().copy() for name, tensor in zip(names, self._existing(names), strict=True)}

    def run_once(self, net: NetDef) -> None:
        self._run(self._plan(net))

    def create(self, net: NetDef) -> None:
        """Check a net (see check.check_net) and keep it. Raises EngineError also for a name that is taken."""
        if net.name in self._nets:
            raise EngineError(f"net '{net.name}' exists already")
        plan = self._nets[net.name] = self._plan(net)
        self._weights.update(plan.weights)
        for name in plan.weights:
            self._blobs[name] = columns_first(self._blobs[name])

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
        net, blobs = one_product(spec, without_bags(net))
        self.feed(blobs)
        return overwrite(mark(net))

    def close(self) -> None:
        self._blobs.clear()
        self._nets.clear()
        self._fed.clear()
        self._weights.clear()
        self._settled = None

    def _plan(self, net: NetDef) -> Plan:
        return make_plan(net, check_net(net, self._blobs.keys()))

    def _net(self, name: str) -> Plan:
        if name not in self._nets:
            raise EngineError(f"net '{name}' does not exist; create it first")
        return self._nets[name]

    def _run(self, plan: Plan, seconds: dict[str, float] | None = None) -> None:
        """Run the steps; where `seconds` is given, add the time of each to that of its operator type.

        While the types of what is read stay the same, and what steps whose sizes vary make, no step need be asked again
        what it accepts. Nothing has changed them where the plan ran last, left them as they were, and no other type was
        fed.
        """
        import torch

        settled, self._settled = plan is self._settled, None
        types = plan.types if settled else self._types(plan)
        known, plan.types = types == plan.types, None
        with torch.inference_mode():
            for stretch in plan.stretches:
                start = time.perf_counter()
                if not (stretch.fused and self._run_fused(stretch, known)):
                    for step in stretch.steps:
                        known = self._run_step(step, known) and known
                if seconds is not None:
                    self._synchronize()
                    seconds[stretch.type] = seconds.get(stretch.type, 0.0) + time.perf_counter() - start
        plan.types = types
        if known and (settled or self._types(plan) == types):
            self._settled = plan

    def _types(self, plan: Plan) -> list[tuple]:
        return list(map(_type, self._existing(plan.reads)))

    def _existing(self, names: Sequence[str]) -> list:
        for name in names:
            if name not in self._blobs:
                raise EngineError(f"blob '{name}' does not exist")
        return [self._blobs[name] for name in names]

    def _run_step(self, step: Step, known: bool) -> bool:
        """Asks its rule where its inputs are not `known`. False where what it made varies in size, and did."""
        blobs = self._blobs
        try:
            inputs = [blobs[name] for name in step.inputs]
            if not known:
                step.check(list(map(_type, inputs)))
            outputs = step.aten(step.node, *inputs)
        except (OperatorError, RuntimeError) as error:  # RuntimeError: PyTorch's own, such as out of memory
            raise EngineError(f"{step.where}: {error}") from error
        if not isinstance(outputs, tuple):
            if step.plain:
                blobs[step.outputs[0]] = outputs
                return True
            outputs = (outputs,)
        if not inputs:  # such kernels know no device
            outputs = tuple(output.to(self._device) for output in outputs)
        blobs.update(zip(step.outputs, outputs, strict=True))
        if not step.sizes_vary:
            return True
        before, step.made = step.made, tuple(map(_type, outputs))
        return before == step.made

    def _run_fused(self, stretch: Stretch, known: bool) -> bool:
        """False where that is not possible. Asks the rules of its steps where their inputs are not `known`."""
        blobs, fused = self._blobs, stretch.fused
        try:
            if not known:
                stretch.check({name: _type(blobs[name]) for name in stretch.reads})
            outputs = fused.run(*map(blobs.__getitem__, fused.inputs))
        except OperatorError:  # whose it is they say one by one
            return False
        except RuntimeError as error:
            raise EngineError(f"{stretch.steps[0].where} and the {len(stretch.steps) - 1} after it: {error}") from error
        if outputs is None:
            return False
        blobs.update(zip(fused.outputs, outputs, strict=True))
        return True

    def _synchronize(self) -> None:
        import torch

        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def _copied(arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """One after the other."""
    if len(arrays) == 1:
        return np.array(arrays[0], dtype, order="C")
    return np.concatenate(arrays, dtype=dtype)


def _type(tensor: Any) -> tuple:
    return tensor.dtype, tensor.shape
