"""ONNX Runtime: runs nets as the ONNX models that `onnx/convert.py` makes of them."""

import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlrm_caffe2.engine.in_place import updates_in_place
from dlrm_caffe2.initial import initial_blobs
from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import NODE_NAME, check_exportable, export_net, inline
from dlrm_caffe2.onnx.sparse import Rows, overwritable, sparse_updates
from dlrm_caffe2.operators.lowering import OPSET
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError, InputError
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.threads import thread_count

_PROVIDER = "CPUExecutionProvider"
_MOST_CONSTANTS = 2**27
"""Bytes: a model holds a copy of its constants. They pay where ONNX Runtime packs them for matrix products."""
_CONTAINERS = ("If", "Loop", "Scan")


class _Blob(NamedTuple):
    """An array, and the OrtValue that is the same memory."""

    array: np.ndarray
    value: Any


class _Key(NamedTuple):
    """A session's: the blobs that are fed, and those that its model returns and no net updates."""

    net: str
    feeds: tuple[str, ...]
    fetched: tuple[str, ...]


class _Kept(NamedTuple):
    """A net, the blobs that it reads from outside, those that it makes, and those that are both: it updates them.
    Of these, those that it updates by rows."""

    net: NetDef
    read: tuple[str, ...]
    made: frozenset[str]
    updated: tuple[str, ...]
    sparse: Mapping[str, Rows]


class _Session(NamedTuple):
    """An InferenceSession, the blobs that its model has as constants, and the names of its outputs by blob: those
    that are fetched, those written over the old blob, those for which it has a second memory, and rows alone."""

    inference: Any
    constants: frozenset[str]
    fetched: Mapping[str, str]
    in_place: Mapping[str, str]
    swapped: Mapping[str, str]
    by_rows: Mapping[str, Rows]


class OnnxEngine:
    """A NetEngine on ONNX Runtime. A net is exported when it is first run. Its model's inputs are the blobs that are
    fed then and those that some net updates; the others are its constants, and it is exported again after one of
    these has been fed anew. Constants that are too large for a model are passed to it at each run.

    Blobs that a net updates stay where they are. Of tables only the rows that change are written: by ONNX Runtime
    itself where that is safe (`sparse.overwritable`) and works (`in_place.updates_in_place`), else here. Any other
    blob has a second memory for what becomes of it. What else a net computes is returned where it is asked for, and
    not kept as a blob. A run that fails may leave tables that are updated in part if its inputs let an operator fail
    that the update does not depend on.
    """

    def __init__(self) -> None:
        import onnxruntime

        self.threads = thread_count()
        self._blobs: dict[str, _Blob] = {}
        self._spares: dict[str, _Blob] = {}
        self._variables: set[str] = set()
        self._nets: dict[str, _Kept] = {}
        self._sessions: dict[_Key, _Session] = {}
        self.description = (f"ONNX Runtime {onnxruntime.__version__}, {_PROVIDER}, opset {OPSET}, "
                            f"{self.threads} threads")

    def feed(self, blobs: Mapping[str, np.ndarray]) -> None:
        self._drop_sessions(blobs.keys())
        for name, array in blobs.items():
            self._blobs[name] = _blob(np.array(array, array.dtype.newbyteorder("="), order="C"))
            self._spares.pop(name, None)

    def fetch(self, names: Sequence[str]) -> Arrays:
        for name in names:
            if name not in self._blobs:
                raise EngineError(f"blob '{name}' does not exist; what nets compute is fetched by `run`")
        return {name: self._blobs[name].array.copy() for name in names}

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
        sparse = {blob: rows for blob, rows in sparse_updates(nodes).items() if blob in updated}
        self._nets[net.name] = _Kept(NetDef.FromString(net.SerializeToString()), read, made, updated, sparse)

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        kept = self._kept(name)
        self.feed(feeds)
        key = _Key(name, tuple(feeds), tuple(dict.fromkeys(
            blob for blob in fetch if blob in kept.made and blob not in kept.updated)))
        if key not in self._sessions:
            self._sessions[key] = self._session(key)
        computed = self._run(self._sessions[key], key)
        return {blob: computed[blob] if blob in computed else self.fetch([blob])[blob] for blob in fetch}

    def profile(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """By "net's operator/ONNX operator", the latter after ONNX Runtime's fusions, or "onnxruntime/..." for what
        it has added; of the second run. Changes no blob."""
        kept = self._kept(name)
        self.feed(feeds)
        key = _Key(name, tuple(feeds), tuple(blob for blob in kept.net.external_output if blob not in kept.updated))
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

    def row_blocks(self, spec: ModelSpec, table: int) -> int:
        return 1

    def faster(self, spec: ModelSpec, net: NetDef) -> NetDef:
        return net

    def close(self) -> None:
        self._sessions.clear()
        self._nets.clear()
        self._variables.clear()
        self._blobs.clear()
        self._spares.clear()

    def _kept(self, name: str) -> _Kept:
        if name not in self._nets:
            raise EngineError(f"net '{name}' does not exist; create it first")
        return self._nets[name]

    def _drop_sessions(self, blobs: Collection[str]) -> None:
        """Those whose models have one of these blobs as a constant."""
        self._sessions = {key: session for key, session in self._sessions.items()
                          if session.constants.isdisjoint(blobs)}

    def _run(self, session: _Session, key: _Key) -> Arrays:
        """Updates what the net updates; what is fetched, by the blobs' names."""
        binding = session.inference.io_binding()
        for input in session.inference.get_inputs():
            binding.bind_ortvalue_input(input.name, self._blobs[input.name].value)
        for blob, output in session.in_place.items():
            binding.bind_ortvalue_output(output, self._blobs[blob].value)
        for blob, output in session.swapped.items():
            if blob not in self._spares:
                self._spares[blob] = _blob(np.empty_like(self._blobs[blob].array))
            binding.bind_ortvalue_output(output, self._spares[blob].value)
        others = [*session.fetched.values(), *dict.fromkeys(name for rows in session.by_rows.values() for name in rows)]
        for output in others:
            binding.bind_output(output)
        try:
            session.inference.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"net '{key.net}' in ONNX Runtime: {str(error).splitlines()[0]}") from error
        made = binding.get_outputs()[len(session.in_place) + len(session.swapped):]
        values = {name: value.numpy() for name, value in zip(others, made, strict=True)}
        for blob in session.swapped:
            self._blobs[blob], self._spares[blob] = self._spares[blob], self._blobs[blob]
        for blob, (rows, changed) in session.by_rows.items():
            self._blobs[blob].array[values[rows]] = values[changed]
        return {blob: values[output] for blob, output in session.fetched.items()}

    def _session(self, key: _Key, profile: Path | None = None) -> _Session:
        import onnxruntime

        kept, constants = self._nets[key.net], self._constants(key)
        model = self._model(key, constants)
        outputs = self._outputs(key)
        names = dict(zip(outputs, [output.name for output in model.graph.output], strict=True))
        by_rows = self._returned_rows(model, kept, names)
        if by_rows:
            model = self._model(key, constants, by_rows)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Idle threads would otherwise spin and take the cores from other engines in the process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        try:
            inference = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[_PROVIDER])
        except Exception as error:  # as above
            raise EngineError(f"net '{key.net}' in ONNX Runtime: {str(error).splitlines()[0]}") from error
        swapped = [blob for blob in kept.updated if blob not in kept.sparse]
        return _Session(inference, frozenset(constants),
                        {blob: names[blob] for blob in outputs if blob not in kept.updated},
                        {blob: names[blob] for blob in kept.sparse if blob not in by_rows},
                        {blob: names[blob] for blob in swapped}, {blob: kept.sparse[blob] for blob in by_rows})

    def _outputs(self, key: _Key) -> tuple[str, ...]:
        """The blobs that a session's model returns: at least one."""
        kept = self._nets[key.net]
        return key.fetched + kept.updated or tuple(kept.net.external_output)

    def _constants(self, key: _Key) -> Arrays:
        """The smallest first, as many as are not too large together."""
        arrays = [(blob, self._blobs[blob].array) for blob in self._nets[key.net].read
                  if blob not in key.feeds and blob not in self._variables]
        arrays.sort(key=lambda named: named[1].nbytes)
        totals = np.cumsum([array.nbytes for _, array in arrays])
        return dict(arrays[:int(np.searchsorted(totals, _MOST_CONSTANTS, "right"))])

    def _returned_rows(self, model: Any, kept: _Kept, names: Mapping[str, str]) -> list[str]:
        """Blobs that are updated by rows, but not in place: all that one operator updates, or none of them."""
        if not kept.sparse:
            return []
        safe: set[str] = set()
        if updates_in_place(self.threads):
            safe = overwritable(inline(model), {blob: names[blob] for blob in kept.sparse})
        unsafe = {rows.rows for blob, rows in kept.sparse.items() if blob not in safe}
        return [blob for blob, rows in kept.sparse.items() if rows.rows in unsafe]

    def _model(self, key: _Key, constants: Arrays, by_rows: Collection[str] = ()) -> Any:
        """The net as an ONNX model. No two sizes are taken to be equal: nothing says which are."""
        inputs, sizes = {}, {}
        for blob in dict.fromkeys([*key.feeds, *self._nets[key.net].read]):
            if blob not in constants:
                array = self._blobs[blob].array
                names = tuple(f"{blob}.{axis}" for axis in range(array.ndim))
                inputs[blob] = Axes(array.dtype, names)
                sizes |= zip(names, array.shape, strict=True)
        return export_net(self._nets[key.net].net, constants, inputs, self._outputs(key), sizes, by_rows=by_rows)


def _blob(array: np.ndarray) -> _Blob:
    from onnxruntime import OrtValue

    return _Blob(array, OrtValue.ortvalue_from_numpy(array))
