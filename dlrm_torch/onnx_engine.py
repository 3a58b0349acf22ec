"""What runs the exported model: ONNX Runtime, one session that predicts and one that returns every activation."""

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from dlrm_torch.embedding import EmbeddingBags
from dlrm_torch.export import OPSET, forward_model, write_model
from spec.backend import PARTS
from spec.batch import Batch
from spec.errors import EngineError
from spec.exported import store
from spec.model import ModelSpec
from spec.parameters import Arrays, check_parameters, parameter_shapes
from spec.tensors import trace_names

_PROVIDER = "CPUExecutionProvider"
_CONTAINERS = ("If", "Loop", "Scan")


@lru_cache(maxsize=8)
def _exported(spec: str, bags: type[EmbeddingBags] | None) -> onnx.ModelProto:
    """`forward_model` of a spec in JSON: seconds, for a graph that knows nothing of the parameters. Not to be
    changed."""
    return forward_model(ModelSpec.model_validate_json(spec), bags=bags)


class OnnxModel:
    """One model of `spec.backend.Model`, from files in a temporary folder. Batches are validated before they are used.

    A session is made when it is first used. `bags`: see `forward_model`.
    """

    def __init__(self, spec: ModelSpec, parameters: Arrays, bags: type[EmbeddingBags] | None = None) -> None:
        check_parameters(spec, parameters)
        self.spec = spec
        self.threads = torch.get_num_threads()
        self.engine = (f"ONNX Runtime {onnxruntime.__version__}, {_PROVIDER}, opset {OPSET}, exported by PyTorch "
                       f"{torch.__version__}, {self.threads} threads")
        self._model = _exported(spec.model_dump_json(), bags)
        self._folder = tempfile.TemporaryDirectory(prefix="dlrm-torch-onnx-")
        self._source = store(spec, Path(self._folder.name), "a backend's caller", parameters.__getitem__)
        self._sessions: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}

    def predict(self, batch: Batch) -> np.ndarray:
        return self._run(("probability",), batch)["probability"]

    def trace(self, batch: Batch) -> Arrays:
        return self._run(trace_names(self.spec, gradients=False), batch)

    def train_step(self, batch: Batch) -> float:
        raise NotImplementedError("torch-onnx only predicts")

    def parameters(self) -> Arrays:
        return {name: np.array(self._source.file.arrays[name]) for name in parameter_shapes(self.spec)}

    def optimizer_state(self) -> Arrays:
        raise NotImplementedError("torch-onnx only predicts")

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """By "part/ONNX operator", after ONNX Runtime's fusions, or "onnxruntime/..." for what it has added; of the
        second prediction."""
        session = self._session(("probability",), profiled=True)
        for _ in range(2):
            self._feed(session, ("probability",), batch)
        events = json.loads(Path(session.end_profiling()).read_text())
        start = max(event["ts"] for event in events if event["name"] == "model_run")
        seconds: dict[str, float] = {}
        for event in events:
            if event["name"].endswith("_kernel_time") and event["ts"] >= start:
                type = event["args"]["op_name"]
                if type not in _CONTAINERS:  # their time is that of the nodes within
                    part = next((part for part in PARTS if f"{part}/" in event["name"]), "onnxruntime")
                    key = f"{part}/{type}"
                    seconds[key] = seconds.get(key, 0.0) + event["dur"] * 1e-6
        return seconds

    def close(self) -> None:
        self._sessions.clear()
        self._folder.cleanup()

    def _run(self, outputs: Sequence[str], batch: Batch) -> Arrays:
        if outputs not in self._sessions:
            self._sessions[outputs] = self._session(outputs)
        return self._feed(self._sessions[outputs], outputs, batch)

    def _feed(self, session: onnxruntime.InferenceSession, outputs: Sequence[str], batch: Batch) -> Arrays:
        batch.validate(self.spec)
        feeds = {name: array for name, array in batch.arrays().items() if name != "label"}
        try:
            return dict(zip(outputs, session.run(list(outputs), feeds), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise EngineError(f"ONNX Runtime: {str(error).splitlines()[0]}") from error

    def _session(self, outputs: Sequence[str], profiled: bool = False) -> onnxruntime.InferenceSession:
        path = Path(self._folder.name) / "model.onnx"
        write_model(self._model, self._source.file.arrays, path, outputs, self._source.references(path.parent))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Idle threads would otherwise spin and take the cores from other engines in the process.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profiled:
            options.enable_profiling = True
            options.profile_file_prefix = str(path.with_suffix(""))
        try:
            return onnxruntime.InferenceSession(path, options, providers=[_PROVIDER])
        except Exception as error:  # as above
            raise EngineError(f"ONNX Runtime: {str(error).splitlines()[0]}") from error
