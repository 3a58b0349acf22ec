"""The best backend that float32 allows, and the faults that tests give it."""

import copy

import numpy as np

from spec.backend import Availability
from spec.errors import EngineError
from spec.parameters import initial_state
from spec.reference import evaluate
from spec.tensors import slice_names, trace_names
from spec.update import update


class Rounded:
    """A Backend and its Model: the float64 reference rounded to float32, and any fault that a test wants.

    `faults` maps a tensor's name to what is done to it; `dies` raises EngineError in the first training step.
    """

    def __init__(self, name="rounded", trains=True, faults=None, absent=False, dies=False):
        self.name, self.trains, self.faults, self.absent, self.dies = name, trains, faults or {}, absent, dies
        self.engine = f"NumPy {np.__version__}, float64 rounded to float32"

    def available(self):
        return Availability(not self.absent, "its engine is not installed", f"dlrm engine install {self.name}")

    def create(self, spec, parameters, device="cpu"):
        model = copy.copy(self)
        model.spec, model.held = spec, {name: array.copy() for name, array in parameters.items()}
        model.state = initial_state(spec)
        return model

    def _float32(self, name, value):
        value = np.asarray(value, np.float32)
        return self.faults[name](value) if name in self.faults else value

    def _evaluate(self, batch):
        """Its float32 values decide on which side of a kink it is, not the float64 ones behind them."""
        evaluation = evaluate(self.spec, self.held, batch)
        if evaluation.kinks:
            own = {name: np.asarray(tensor.value, np.float32) for name, tensor in evaluation.tensors.items()}
            evaluation = evaluate(self.spec, self.held, batch, engine=own)
        return evaluation

    def predict(self, batch):
        return self._evaluate(batch).tensors["probability"].value.astype(np.float32)

    def trace(self, batch):
        evaluation = self._evaluate(batch)
        named = {name: self._float32(name, tensor.value) for name, tensor in evaluation.tensors.items()}
        for parameter, rows in evaluation.rows.items():
            indices, values = slice_names(parameter)
            named |= {indices: rows.rows, values: self._float32(values, rows.gradient.value)}
        return {name: named[name] for name in trace_names(self.spec, self.trains)}

    def train_step(self, batch):
        if self.dies:
            raise EngineError(f"{self.name}: the worker died")
        evaluation = self._evaluate(batch)
        for name, new in update(self.spec, self.held, self.state, evaluation).items():
            array = self.held[name] if name in self.held else self.state[name]
            array[slice(None) if new.rows is None else new.rows] = self._float32(name, new.new.value)
        return float(evaluation.tensors["loss"].value)

    def parameters(self):
        return {name: array.copy() for name, array in self.held.items()}

    def optimizer_state(self):
        return {name: array.copy() for name, array in self.state.items()}

    def profile(self, batch, training=True):
        return {}

    def close(self):
        pass
