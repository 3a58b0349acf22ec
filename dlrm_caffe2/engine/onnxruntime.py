"""ONNX Runtime: runs nets as the ONNX models that `onnx/convert.py` makes of them."""

import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlrm_caffe2.initial import initial_blobs
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import NODE_NAME, check_exportable, export_net
from dlrm_caffe2.operators.lowering import OPSET
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError, InputError
from spec.parameters import Arrays
from spec.threads import thread_count

_PROVIDER = "CPUExecutionProvider"
_MOST_CONSTANTS = 2**31 - 2**24
"""Bytes: protobuf's limit for a model, with room for its nodes."""
_CONTAINERS = ("If", "Loop", "Scan")


class _Key(NamedTuple):
    """A session's: the blobs that are fed, and those that its model returns."""

    net: str
    feeds: tuple[str, ...]
    outputs: tuple[str, ...]


class _Kept(NamedTuple):
    """A net, the blobs that it reads from outside, those that it makes, and those that are both: it updates them."""

    net: NetDef
    read: tuple[str, ...]
    made: frozenset[str]
    updated: tuple[str, ...]


class _Session(NamedTuple):
    """An InferenceSession, and the blobs that its model has as constants."""

    inference: Any
    constants: frozenset[str]


class OnnxEngine:
    """A NetEngine on ONNX Runtime. A net is exported when it is first run. Its model's inputs are the blobs that are
    fed then and those that some net updates; the others are its constants, and it is exported again after one of
    these has been fed anew. Constants that would not fit into a model are passed to it at each run.

    Blobs that a net updates are replaced by what it returns, which is not copied. What else a net computes is returned
    where it is asked for, and not kept as a blob.
    """

    def __init__(self) -> None:
        import onnxruntime

        self.threads = thread_count()
        self._blobs: dict[str, onnxruntime.OrtValue] = {}
        self._variables: set[str] = set()
        self._nets: dict[str, _Kept] = {}
        self._sessions: dict[_Key, _Session] = {}
        self.description = (f"ONNX Runtime {onnxruntime.__version__}, {_PROVIDER}, opset {OPSET}, "
                            f"{self.threads} threads")

    def feed(self, blobs: Mapping[str, np.ndarray]) -> None:
        from onnxruntime import OrtValue

        self._drop_sessions(blobs.keys())
        for name, array in blobs.items():
            copy = np.array(array, array.dtype.newbyteorder("="), order="C")
            self._blobs[name] = OrtValue.ortvalue_from_numpy(copy)

    def fetch(self, names: Sequence[str]) -> Arrays:
        for name in names:
            if name not in self._blobs:
                raise EngineError(f"blob '{name}' does not exist; what nets compute is fetched by `run`")
        return {name: self._blobs[name].numpy().copy() for name in names}

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
        read, made = outside_blobs(net.op), frozenset(name for node in nodes for name in node.outputs)
        updated = tuple(name for name in read if name in made)
        self._drop_sessions(updated)
        self._variables.update(updated)
        self._nets[net.name] = _Kept(NetDef.FromString(net.SerializeToString()), read, made, updated)

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        kept = self._kept(name)
        self.feed(feeds)
        outputs = tuple(dict.fromkeys([*(blob for blob in fetch if blob in kept.made), *kept.updated]))
        key = _Key(name, tuple(feeds), outputs or tuple(kept.net.external_output))
        if key not in self._sessions:
            self._sessions[key] = self._session(key)
        computed = self._run(self._sessions[key], key)
        self._blobs |= {blob: computed[blob] for blob in kept.updated}
        return {blob: computed[blob].numpy().copy() if blob in computed else self.fetch([blob])[blob] for blob in fetch}

    def profile(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """By "net's operator/ONNX operator", the latter after ONNX Runtime's fusions, or "onnxruntime/..." for what
        it has added; of the second run. Changes no blob."""
        kept = self._kept(name)
        self.feed(feeds)
        key = _Key(name, tuple(feeds), tuple(kept.net.external_output))
        with tempfile.TemporaryDirectory() as folder:
            session = self._session(key, profile=Path(folder) / "profile")
            for _ in range(2):
                self._run(session, key)
            events = json.loads(Path(session.inference.end_profiling()).read_text())
        start = max(event["ts"] for event in events if event["name"] == "model_run")
        seconds: dict[str, float] = {}
        for event in events:
            if event["name"].endswith("_kernel_time") and event["ts"] >= start:
                type = event["args"]["op_name"]
                if type not in _CONTAINERS:  # their time is that of the nodes within
                    origin = re.search(NODE_NAME, event["name"])
                    key = f"{origin[1] if origin else 'onnxruntime'}/{type}"
                    seconds[key] = seconds.get(key, 0.0) + event["dur"] * 1e-6
        return seconds

    def close(self) -> None:
        self._sessions.clear()
        self._nets.clear()
        self._variables.clear()
        self._blobs.clear()

    def _kept(self, name: str) -> _Kept:
        if name not in self._nets:
            raise EngineError(f"net '{name}' does not exist; create it first")
        return self._nets[name]

    def _drop_sessions(self, blobs: Collection[str]) -> None:
        """Those whose models have one of these blobs as a constant."""
        self._sessions = {key: session for key, session in self._sessions.items()
                          if session.constants.isdisjoint(blobs)}

    def _run(self, session: _Session, key: _Key) -> dict[str, Any]:
        """The outputs as OrtValues, by the blobs' names."""
        inputs = {input.name: self._blobs[input.name] for input in session.inference.get_inputs()}
        names = [output.name for output in session.inference.get_outputs()]
        try:
            outputs = session.inference.run_with_ort_values(names, inputs)
            return dict(zip(key.outputs, outputs, strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"net '{key.net}' in ONNX Runtime: {str(error).splitlines()[0]}") from error

    def _model(self, key: _Key, constants: Arrays) -> Any:
        """The net as an ONNX model. No two sizes are taken to be equal: nothing says which are."""
        inputs, sizes = {}, {}
        for blob in dict.fromkeys([*key.feeds, *self._nets[key.net].read]):
            if blob not in constants:
                array = self._blobs[blob].numpy()
                names = tuple(f"{blob}.{axis}" for axis in range(array.ndim))
                inputs[blob] = Axes(array.dtype, names)
                sizes |= zip(names, array.shape, strict=True)
        return export_net(self._nets[key.net].net, constants, inputs, key.outputs, sizes)

    def _session(self, key: _Key, profile: Path | None = None) -> _Session:
        import onnxruntime

        constants = {blob: self._blobs[blob].numpy() for blob in self._nets[key.net].read
                     if blob not in key.feeds and blob not in self._variables}
        if sum(array.nbytes for array in constants.values()) > _MOST_CONSTANTS:
            constants = {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Idle threads would otherwise spin and take the cores from other engines in the process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        model = self._model(key, constants).SerializeToString()
        try:
            inference = onnxruntime.InferenceSession(model, options, providers=[_PROVIDER])
        except Exception as error:  # as above
            raise EngineError(f"net '{key.net}' in ONNX Runtime: {str(error).splitlines()[0]}") from error
        return _Session(inference, frozenset(constants))
