"""Seeded faults inside a net (`spec.tamper`): the net is cut behind the operator at fault, whose output is replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dlrm_caffe2.backend import NetBackend, NetModel
from dlrm_caffe2.engine import NetEngine
from dlrm_caffe2.model import trace_blobs
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.tamper import Change


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
    """A NetEngine that runs a net in two parts where it makes the tensor to be changed."""

    def __init__(self, engine: NetEngine, change: Change, blobs: Mapping[str, str]) -> None:
        self._engine, self._change = engine, change
        self._blobs = {name: blobs.get(name, name) for name in change.reads}
        self._cut: dict[str, tuple[NetDef, NetDef]] = {}
        self._created: set[str] = set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def create(self, net: NetDef) -> None:
        blob = self._blobs[self._change.tensor]
        makers = [number for number, operator in enumerate(net.op) if blob in operator.output]
        if not makers:
            self._engine.create(net)
            return
        parts = []
        for half, operators in enumerate((net.op[:makers[-1] + 1], net.op[makers[-1] + 1:])):
            part = NetDef(name=f"{net.name}/{half}", op=operators)
            part.external_input.extend(outside_blobs(part.op))
            parts.append(part)
        parts[0].external_output.extend(sorted(_made(parts[0])))
        parts[1].external_output.extend(blob for blob in net.external_output if blob in _made(parts[1]))
        self._cut[net.name] = (parts[0], parts[1])
        self._engine.create(parts[0])

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        if name not in self._cut:
            return self._engine.run(name, feeds, fetch)
        first, second = self._cut[name]
        made = _made(first)
        given = set(first.external_input)
        wanted = {blob for blob in (*second.external_input, *fetch, *self._blobs.values()) if blob in made}
        held = dict(feeds)
        held |= self._engine.run(first.name, {n: a for n, a in feeds.items() if n in given}, sorted(wanted))
        blob = self._blobs[self._change.tensor]
        sources = {tensor: held[source] if source in held else self._engine.fetch([source])[source]
                   for tensor, source in self._blobs.items()}
        held[blob] = np.array(self._change.make(sources), np.float32, order="C").reshape(held[blob].shape)
        if not second.op:
            return {blob: held[blob] if blob in held else self._engine.fetch([blob])[blob] for blob in fetch}
        crossing = {n: a for n, a in held.items() if n in second.external_input}
        made_later = _made(second)
        if second.name not in self._created:  # its inputs must be there first
            self._engine.feed(crossing)
            self._engine.create(second)
            self._created.add(second.name)
        later = self._engine.run(second.name, crossing, [blob for blob in fetch if blob in made_later])
        return {blob: later[blob] if blob in later else held[blob] if blob in held else self._engine.fetch([blob])[blob]
                for blob in fetch}


def _made(net: NetDef) -> set[str]:
    return {output for operator in net.op for output in operator.output}
