"""ONNX Runtime: runs forward nets, as the ONNX models that `export.py` makes of them."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlrm_caffe2.export import OPSET, Axes, check_exportable, export_net, initial_blobs
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError, InputError
from spec.parameters import Arrays

_PROVIDER = "CPUExecutionProvider"
_MOST_CONSTANTS = 2**31 - 2**24
"""Bytes: protobuf's limit for a model, with room for its nodes."""
_CONTAINERS = ("If", "Loop", "Scan")


class _Key(NamedTuple):
    """A session's: what is fed and fetched are its model's inputs and outputs."""

    net: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Kept(NamedTuple):
    """A net, the blobs that it reads from outside, and those that it makes."""

    net: NetDef
    read: tuple[str, ...]
    made: frozenset[str]


class OnnxEngine:
    """A NetEngine on ONNX Runtime. A net is exported when it is first run, with all blobs that are not fed then as
    its constants, and again after one of these has been fed anew. Constants that would not fit into a model are
    passed to it at each run.

    What a net computes is returned where it is asked for, and not kept as a blob.
    """

    def __init__(self) -> None:
        import onnxruntime

        self._threads = os.cpu_count() or 1
        self._blobs: Arrays = {}
        self._nets: dict[str, _Kept] = {}
        self._sessions: dict[_Key, Any] = {}
        self.description = (f"ONNX Runtime {onnxruntime.__version__}, {_PROVIDER}, opset {OPSET}, "
                            f"{self._threads} threads")

    def feed(self, blobs: Mapping[str, np.ndarray]) -> None:
        self._sessions = {key: session for key, session in self._sessions.items()
                          if not self._constants(key).keys() & blobs.keys()}
        self._blobs |= {name: np.array(array, array.dtype.newbyteorder("="), order="C")
                        for name, array in blobs.items()}

    def fetch(self, names: Sequence[str]) -> Arrays:
        for name in names:
            if name not in self._blobs:
                raise EngineError(f"blob '{name}' does not exist; what nets compute is fetched by `run`")
        return {name: self._blobs[name].copy() for name in names}

    def run_once(self, net: NetDef) -> None:
        """An init_net alone: fills from their arguments."""
        self.feed(initial_blobs(net))

    def create(self, net: NetDef) -> None:
        """Check a net and keep it. Raises EngineError also for a name that is taken, or an operator that has no
        ONNX lowering."""
        if net.name in self._nets:
            raise EngineError(f"net '{net.name}' exists already")
        try:
            nodes = check_exportable(net, self._blobs.keys())
        except InputError as error:
            raise EngineError(str(error)) from error
        self._nets[net.name] = _Kept(NetDef.FromString(net.SerializeToString()), outside_blobs(net.op),
                                     frozenset(name for node in nodes for name in node.outputs))

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        kept = self._kept(name)
        self.feed(feeds)
        outputs = tuple(blob for blob in dict.fromkeys(fetch) if blob in kept.made)
        key = _Key(name, tuple(feeds), outputs or tuple(kept.net.external_output))
        if key not in self._sessions:
            self._sessions[key] = self._session(key)
        computed = self._run(self._sessions[key], key)
        return {blob: computed[blob] if blob in kept.made else self.fetch([blob])[blob] for blob in fetch}

    def profile(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """By types of ONNX's operators, into which the net's are fused; of the second run."""
        kept = self._kept(name)
        self.feed(feeds)
        key = _Key(name, tuple(feeds), tuple(kept.net.external_output))
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(key, profile=Path(folder) / "profile")
            for _ in range(2):
                self._run(session, key)
            events = json.loads(Path(session.end_profiling()).read_text())
        start = max(event["ts"] for event in events if event["name"] == "model_run")
        seconds: dict[str, float] = {}
        for event in events:
            if event["name"].endswith("_kernel_time") and event["ts"] >= start:
                type = event["args"]["op_name"]
                if type not in _CONTAINERS:  # their time is that of the nodes within
                    seconds[type] = seconds.get(type, 0.0) + event["dur"] * 1e-6
        return seconds

    def close(self) -> None:
        self._sessions.clear()
        self._nets.clear()
        self._blobs.clear()

    def _kept(self, name: str) -> _Kept:
        if name not in self._nets:
            raise EngineError(f"net '{name}' does not exist; create it first")
        return self._nets[name]

    def _constants(self, key: _Key) -> Arrays:
        return {blob: self._blobs[blob] for blob in self._nets[key.net].read if blob not in key.inputs}

    def _run(self, session: Any, key: _Key) -> Arrays:
        feeds = {input.name: self._blobs[input.name] for input in session.get_inputs()}
        try:
            return dict(zip(key.outputs, session.run(list(key.outputs), feeds), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"net '{key.net}' in ONNX Runtime: {str(error).splitlines()[0]}") from error

    def _model(self, key: _Key) -> Any:
        """The net as an ONNX model. No two sizes are taken to be equal: nothing says which are."""
        inputs, sizes, constants = {}, {}, self._constants(key)
        if sum(array.nbytes for array in constants.values()) > _MOST_CONSTANTS:
            constants = {}
        for blob in dict.fromkeys((*key.inputs, *self._nets[key.net].read)):
            if blob in constants:
                continue
            array = self._blobs[blob]
            names = tuple(f"{blob}.{axis}" for axis in range(array.ndim))
            inputs[blob] = Axes(array.dtype, names)
            sizes |= zip(names, array.shape, strict=True)
        return export_net(self._nets[key.net].net, constants, inputs, key.outputs, sizes)

    def _session(self, key: _Key, profile: Path | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Idle threads would otherwise spin and take the cores from other engines in the process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        model = self._model(key).SerializeToString()
        try:
            return onnxruntime.InferenceSession(model, options, providers=[_PROVIDER])
        except Exception as error:  # as above
            raise EngineError(f"net '{key.net}' in ONNX Runtime: {str(error).splitlines()[0]}") from error
