"""The backends `caffe2`, `caffe2-aten` and `caffe2-onnx`: the same nets on three engines.

Frameworks are imported when a model is made.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, NamedTuple

import numpy as np

from dlrm_caffe2.engine import NetEngine
from dlrm_caffe2.model import constants, gradient_net, predict_net, trace_blobs, train_net
from dlrm_caffe2.names import operator_names
from dlrm_caffe2.optimizer import needs_distinct_rows
from dlrm_caffe2.presorted import sorted_lookups
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.backend import Availability
from spec.batch import Batch
from spec.errors import EngineError, InputError
from spec.model import ModelSpec
from spec.parameters import (
    Arrays,
    check_parameters,
    initial_state,
    parameter_shapes,
    state_shapes,
    trained_parameters,
)
from spec.tensors import trace_names


class _Kept(NamedTuple):
    """A net that the engine keeps, and those of a batch's arrays that it reads."""

    name: str
    feeds: tuple[str, ...]


class NetModel:
    """One model of `spec.backend.Model` on any NetEngine. Batches are validated before the engine sees them.

    A net is made when it is first used, since its inputs must be there. Closes the engine where it fails.
    """

    def __init__(self, spec: ModelSpec, parameters: Arrays, engine: NetEngine) -> None:
        self.spec, self.engine, self.threads = spec, engine.description, engine.threads
        self._engine = engine
        self._nets: dict[Callable[[ModelSpec], NetDef], _Kept] = {}
        self._trace_blobs = trace_blobs(spec)
        blocks = {number: max(engine.row_blocks(spec, number), int(needs_distinct_rows(spec)))
                  for number in range(len(spec.tables))}
        self._presorted = {number: count for number, count in blocks.items() if count}
        self._sorters = ThreadPoolExecutor(engine.threads)
        try:
            engine.feed(parameters | constants(spec) | initial_state(spec))
        except BaseException:
            engine.close()
            raise

    def predict(self, batch: Batch) -> np.ndarray:
        return self._run(self._predict_net, batch, ["probability"])["probability"]

    def trace(self, batch: Batch) -> Arrays:
        blobs = self._run(gradient_net, batch, tuple(dict.fromkeys(self._trace_blobs.values())))
        return {name: blobs[self._trace_blobs[name]] for name in trace_names(self.spec)}

    def train_step(self, batch: Batch) -> float:
        return float(self._run(self._train_net, batch, ["loss"])["loss"])

    def parameters(self) -> Arrays:
        return self._engine.fetch(tuple(parameter_shapes(self.spec)))

    def optimizer_state(self) -> Arrays:
        return self._engine.fetch(tuple(state_shapes(self.spec)))

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """A training step is undone afterwards, from a copy of all that it changes."""
        if not training:
            return self._engine.profile(*self._prepare(self._predict_net, batch))
        before = self._engine.fetch((*trained_parameters(self.spec), *state_shapes(self.spec)))
        name, feeds = self._prepare(self._train_net, batch)
        self._engine.run(name, feeds)  # the copies have put all else out of the caches
        seconds = self._engine.profile(name, feeds)
        self._engine.feed(before)
        return seconds

    def operators(self) -> dict[str, str]:
        """See `spec.backend.NamesOperators`."""
        return operator_names(self.spec, self._train_net(self.spec))

    def close(self) -> None:
        self._sorters.shutdown()
        self._engine.close()

    def _predict_net(self, spec: ModelSpec) -> NetDef:
        return self._engine.faster(spec, predict_net(spec))

    def _train_net(self, spec: ModelSpec) -> NetDef:
        return self._engine.faster(spec, train_net(spec, self._presorted))

    def _run(self, make: Callable[[ModelSpec], NetDef], batch: Batch, fetch: Sequence[str]) -> Arrays:
        name, feeds = self._prepare(make, batch)
        return self._engine.run(name, feeds, fetch)

    def _prepare(self, make: Callable[[ModelSpec], NetDef], batch: Batch) -> tuple[str, Arrays]:
        """The name of the net, kept from now on, and what to feed it."""
        batch.validate(self.spec)
        arrays = batch.arrays()
        if make == self._train_net:
            arrays |= sorted_lookups(self.spec, batch, self._presorted, self._sorters)
        if make not in self._nets:
            net = make(self.spec)
            kept = _Kept(net.name, tuple(name for name in arrays if name in net.external_input))
            self._engine.feed({name: arrays[name] for name in kept.feeds})
            self._engine.create(net)
            self._nets[make] = kept
        kept = self._nets[make]
        return kept.name, {name: arrays[name] for name in kept.feeds}


def _caffe2(device: str) -> NetEngine:
    from dlrm_caffe2.engine.caffe2 import Caffe2Engine
    return Caffe2Engine()


def _caffe2_available() -> Availability:
    from dlrm_caffe2.engine.venv import availability
    return availability()


def _aten(device: str) -> NetEngine:
    import torch

    from dlrm_caffe2.engine.aten import AtenEngine
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda'", "a GPU that PyTorch can use", f"none in PyTorch {torch.__version__}",
                         "use device cpu, or install a CUDA build of PyTorch")
    return AtenEngine(device)


def _onnx(device: str) -> NetEngine:
    from dlrm_caffe2.engine.onnxruntime import OnnxEngine
    return OnnxEngine()


def _needs(*packages: str) -> Callable[[], Availability]:
    def available() -> Availability:
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            return Availability(False, f"{' and '.join(missing)} not installed", f"pip install {' '.join(missing)}")
        return Availability(True)
    return available


@dataclass(frozen=True)
class NetBackend:
    """See `spec.backend.Backend`. Attributes: `start`: device -> engine; `devices`: those that it can use."""

    name: str
    start: Callable[[str], NetEngine]
    available: Callable[[], Availability]
    devices: tuple[str, ...] = ("cpu",)
    trains: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> NetModel:
        """Raises EngineError where the engine is missing or fails; InputError for a device that it cannot use,
        and for parameters that are not those of the spec."""
        state = self.available()
        if not state.ok:
            raise EngineError(f"backend '{self.name}': {state.reason}; {state.remedy}")
        if device not in self.devices:
            raise InputError(f"device '{device}'", f"{' or '.join(self.devices)} for backend '{self.name}'",
                             "another device", "use --device cpu")
        check_parameters(spec, parameters)
        return NetModel(spec, parameters, self.start(device))


CAFFE2 = NetBackend("caffe2", _caffe2, _caffe2_available)
ATEN = NetBackend("caffe2-aten", _aten, _needs("torch"), devices=("cpu", "cuda"))
ONNX = NetBackend("caffe2-onnx", _onnx, _needs("onnx", "onnxruntime"))
