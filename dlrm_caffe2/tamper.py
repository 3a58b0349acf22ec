"""Seeded faults inside a net (`spec.tamper`): what one operator makes is replaced, for all operators behind it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dlrm_caffe2.backend import NetBackend, NetModel
from dlrm_caffe2.engine import NetEngine
from dlrm_caffe2.model import trace_blobs
from dlrm_caffe2.net import make_operator, outside_blobs
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec.errors import EngineError
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.tamper import Change


def for_many(backend: NetBackend) -> NetBackend:
    """See `spec.tamper.Tamper`."""
    return replace(backend, start=_Kept(backend.start))


def tampered(backend: NetBackend, change: Change) -> "TamperedBackend":
    """See `spec.tamper.Tamper`. Sparse gradients that a train net does not make are changed in the trace alone."""
    return TamperedBackend(backend, change)


def write(model: NetModel, arrays: Arrays) -> None:
    """See `spec.tamper.Tamper`."""
    model._engine.feed(arrays)


@dataclass(frozen=True)
class TamperedBackend:
    """See `spec.backend.Backend`."""

    backend: NetBackend
    change: Change

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def trains(self) -> bool:
        return self.backend.trains

    def available(self) -> object:
        return self.backend.available()

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> NetModel:
        blobs = trace_blobs(spec)
        start = self.backend.start
        faulty = replace(self.backend, start=lambda device: TamperedEngine(start(device), self.change, blobs))
        return faulty.create(spec, parameters, device)


class TamperedEngine:
    """A NetEngine that runs a net twice: up to the operator at fault, to see what that makes and has read; then whole,
    with something else, which is fed, in place of what it makes."""

    def __init__(self, engine: NetEngine, change: Change, blobs: Mapping[str, str]) -> None:
        self._engine, self._change = engine, change
        self._blobs = {name: blobs.get(name, name) for name in change.reads}
        self._blob = self._blobs[change.tensor]
        self._nets: dict[str, tuple[NetDef, NetDef]] = {}
        self._created: set[str] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def faster(self, spec: ModelSpec, net: NetDef) -> NetDef:
        """The net itself: another might make its blobs elsewhere, or not at all."""
        return net

    def create(self, net: NetDef) -> None:
        makers = [number for number, operator in enumerate(net.op) if self._blob in operator.output]
        if not makers:
            self._engine.create(net)
            return
        start = _net(f"{net.name}/start", net.op[:makers[-1] + 1])
        start.external_output.extend(sorted({output for operator in start.op for output in operator.output}))
        operators = [OperatorDef.FromString(operator.SerializeToString()) for operator in net.op]
        maker = operators[makers[-1]]
        right, fed = f"{self._blob}/right", f"{self._blob}/fed"
        maker.output[list(maker.output).index(self._blob)] = right
        # So that a net's export knows the sizes of what is fed.
        operators.insert(makers[-1] + 1, make_operator("ResizeLike", [fed, right], [self._blob]))
        whole = _net(net.name, operators)
        whole.external_output.extend(net.external_output)
        self._nets[net.name] = start, whole
        self._engine.create(start)

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        if name not in self._nets:
            return self._engine.run(name, feeds, fetch)
        start, whole = self._nets[name]
        made = {output for operator in start.op for output in operator.output}
        given = {blob: array for blob, array in feeds.items() if blob in start.external_input}
        seen = dict(feeds) | self._engine.run(start.name, given, sorted(made.intersection(self._blobs.values())))
        sources = {tensor: seen[blob] if blob in seen else self._engine.fetch([blob])[blob]
                   for tensor, blob in self._blobs.items()}
        wrong = np.array(self._change.make(sources), np.float32, order="C")
        feeds = dict(feeds) | {f"{self._blob}/fed": wrong}
        if name not in self._created:  # its inputs must be there first
            self._engine.feed(feeds)
            self._engine.create(whole)
            self._created.add(name)
        return self._engine.run(name, feeds, fetch)


class _Kept:
    """Starts engines, and hands out again those that were closed, emptied, where an engine can be."""

    def __init__(self, start: Callable[[str], NetEngine]) -> None:
        self._start, self._free = start, []

    def __call__(self, device: str) -> "NetEngine":
        return _Lent(self._free.pop() if self._free else self._start(device), self._free)


class _Lent:
    """An engine whose `close` gives it back."""

    def __init__(self, engine: NetEngine, free: list[NetEngine]) -> None:
        self._engine, self._free = engine, free

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            engine.reset()
        except (AttributeError, EngineError):  # it has no such method, or has died
            engine.close()
        else:
            self._free.append(engine)


def _net(name: str, operators: Iterable[OperatorDef]) -> NetDef:
    return NetDef(name=name, op=operators, external_input=outside_blobs(operators))
