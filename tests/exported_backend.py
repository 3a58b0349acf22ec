"""Exported ONNX files as a backend of the suite, in any of the runtimes: what `run_case` judges is what users get."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx_runtimes import RUNTIMES, Session

from dlrm_caffe2.export import export_onnx
from dlrm_caffe2.model import trace_blobs
from dlrm_torch.export import export_onnx as export_torch
from spec.backend import Availability
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays, initial_state, state_shapes
from spec.tensors import trace_names

FUNCTIONS, INLINED, TORCH = ".onnx", ".inlined.onnx", ".torch.onnx"


def predict_feeds(batch: Batch) -> Arrays:
    return {name: array for name, array in batch.arrays().items() if name != "label"}


class ExportedBackend:
    """The files with each of some endings, in one runtime, side by side: their outputs must be the same bits.

    Args:
        folder: for the files. They are written once for each spec, whoever asks for them.
        endings: FUNCTIONS, INLINED or both of them, or TORCH.
        trains: whether to run the training step too, which TORCH has not.
    """

    def __init__(self, runtime: str, folder: Path, endings: Sequence[str], trains: bool = True) -> None:
        self.name, self.runtime, self.folder, self.endings = f"files in {runtime}", runtime, folder, endings
        self.trains = trains and TORCH not in endings

    def available(self) -> Availability:
        return Availability(True)

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> "ExportedModel":
        folder = self.folder / spec.digest / ("torch" if TORCH in self.endings else "caffe2")
        if not folder.exists():
            (export_torch if TORCH in self.endings else export_onnx)(spec, parameters, folder)
        return ExportedModel(self, spec, parameters, folder)


class ExportedModel:
    def __init__(self, backend: ExportedBackend, spec: ModelSpec, parameters: Arrays, folder: Path) -> None:
        self.engine, self.threads = backend.name, 1
        self._backend, self._spec, self._folder = backend, spec, folder
        self._variables = parameters | initial_state(spec)
        self._sessions: dict[str, list[Session]] = {}
        self._trained = False

    def predict(self, batch: Batch) -> np.ndarray:
        """From model.onnx; it holds the initial parameters, so that after training the step's own forward predicts."""
        if self._trained:
            return self.trace(batch)["probability"]
        return self._run("model", predict_feeds(batch))["probability"]

    def trace(self, batch: Batch) -> Arrays:
        """The same file with other outputs."""
        if not self._backend.trains:
            return self._run("model", predict_feeds(batch), trace_names(self._spec, gradients=False))
        blobs = trace_blobs(self._spec)
        feeds = batch.arrays() | self._variables
        computed = feeds | self._run("train", feeds, set(blobs.values()) - feeds.keys())
        return {name: computed[blob] for name, blob in blobs.items()}

    def train_step(self, batch: Batch) -> float:
        outputs = self._run("train", batch.arrays() | self._variables)
        self._variables |= {name: outputs[f"{name}.new"] for name in self._variables if f"{name}.new" in outputs}
        self._trained = True
        return float(outputs["loss"])

    def parameters(self) -> Arrays:
        return {name: array for name, array in self._variables.items() if name not in state_shapes(self._spec)}

    def optimizer_state(self) -> Arrays:
        return {name: self._variables[name] for name in state_shapes(self._spec)}

    def close(self) -> None:
        self._sessions.clear()

    def _run(self, file: str, feeds: Arrays, outputs: Collection[str] = ()) -> Arrays:
        """One run of a file, or of a copy of it with `outputs` instead of its own."""
        name = f"{file}.traced" if outputs else file
        if name not in self._sessions:
            self._sessions[name] = [RUNTIMES[self._backend.runtime](self._file(file, ending, outputs))
                                    for ending in self._backend.endings]
        first, *others = (session(feeds) for session in self._sessions[name])
        for other in others:
            for key, array in first.items():
                np.testing.assert_array_equal(other[key], array, err_msg=key)
        return first

    def _file(self, file: str, ending: str, outputs: Collection[str]) -> Path:
        path = self._folder / (file + ending)
        if not outputs:
            return path
        traced = self._folder / f"{file}.traced{ending}"
        if not traced.exists():
            onnx.save(with_outputs(onnx.load(path), outputs), traced)
        return traced


def with_outputs(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The same model, returning other values of its graph."""
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    del model.graph.output[:]
    model.graph.output.extend(values[name] for name in names)
    return model
