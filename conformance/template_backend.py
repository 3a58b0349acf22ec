"""My port of DLRM as a backend of dlrm-parity. Copied from a template; see conformance/PORTING.md.

    dlrm conform tiny --backend my_port:BACKEND --steps 0

It runs as it is, and fails: every tensor is missing. Fill in from the top, and watch the list grow shorter.
"""

import numpy as np

from spec.backend import Availability
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays, check_parameters, initial_state


class Model:
    """One model, resident in your engine. `spec.backend.Model` says what each method must do."""

    engine = "what really runs, with its version, device and threads"
    threads = 1

    def __init__(self, spec: ModelSpec, parameters: Arrays) -> None:
        check_parameters(spec, parameters)
        self.spec = spec
        self.held = {name: array.copy() for name, array in parameters.items()}  # put them into your engine
        self.state = initial_state(spec)

    def predict(self, batch: Batch) -> np.ndarray:
        """First: the probability, float32 [B, 1]. NaN never conforms."""
        batch.validate(self.spec)  # so that bad indices never reach your engine
        return np.full((batch.size, 1), np.nan, np.float32)

    def trace(self, batch: Batch) -> Arrays:
        """Second: the tensors of `spec.tensors.activations`, float32, by name. Third, where `trains` is True: those of
        `activation_gradients` and `parameter_gradients` too; `trace_names` lists them all."""
        return {}

    def train_step(self, batch: Batch) -> float:
        """Fourth: one forward, backward and update; the loss before the update."""
        return float("nan")

    def parameters(self) -> Arrays:
        return {name: array.copy() for name, array in self.held.items()}  # read them back from your engine

    def optimizer_state(self) -> Arrays:
        return {name: array.copy() for name, array in self.state.items()}

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """For the benchmark: seconds by operator. The conformance suite does not ask."""
        return {}

    def close(self) -> None:
        """Free what the engine holds."""


class Backend:
    name = "my-port"
    trains = False  # True once there are gradients: what is then missing fails
    repeatable = False  # True where two models make the same bits of the same calls: that is then checked

    def available(self) -> Availability:
        """Say here why your engine cannot run, and how to mend that, instead of failing at import."""
        return Availability(True)

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> Model:
        return Model(spec, parameters)


BACKEND = Backend()
