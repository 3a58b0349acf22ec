"""The Backend protocol: all that an implementation of DLRM must be able to do.

A backend is an object (a module attribute) registered under the entry-point group `dlrm.backends`, or named as
`module:attribute`. The training loop, the benchmark and the conformance suite are written once against it.
How to write one: conformance/PORTING.md; a file to start from: conformance/template_backend.py.
"""

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

import numpy as np

from spec.batch import Batch
from spec.errors import InputError
from spec.model import ModelSpec
from spec.parameters import Arrays

GROUP = "dlrm.backends"

ON_REQUEST = "dlrm.backends.on_request"
"""Entry points of backends that run only where they are named, since they take long to start."""

PARTS = ("fc", "activation", "embedding", "interaction", "loss", "optimizer")
"""What an operator can work for: see Model.profile."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here. `reason` says why not, `remedy` is the command that mends it."""

    ok: bool
    reason: str = ""
    remedy: str = ""


class Model(Protocol):
    """One model, resident in its engine."""

    engine: str
    """What really runs, with versions: "PyTorch 2.13.0, cpu, 2 threads"."""

    threads: int
    """Threads that it computes with: `spec.threads.thread_count`, unless the process was told otherwise since."""

    def predict(self, batch: Batch) -> np.ndarray:
        """`probability`, float32 [B, 1]. Changes nothing."""

    def trace(self, batch: Batch) -> Arrays:
        """Every tensor of `spec.tensors.trace_names`, by name; float32, slices' indices int64.

        A slice may list a row several times (its values are then summed). Changes no parameter.
        Where the backend cannot train, the forward tensors alone.
        """

    def train_step(self, batch: Batch) -> float:
        """One forward, backward and update; the loss before the update."""

    def parameters(self) -> Arrays:
        """A copy of every parameter of `spec.parameters.parameter_shapes`, float32."""

    def optimizer_state(self) -> Arrays:
        """A copy of all of `spec.parameters.state_shapes`, float32."""

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """Seconds spent in each type of operator in one training step, or in one prediction: without `training`, and
        where it cannot train. Changes no parameter.

        A key is the engine's own name of the type, behind what it is part of where the engine knows that: one of
        PARTS ("embedding/aten.index_select"), or a Caffe2 operator ("SparseLengthsSum/Gather").
        """

    def close(self) -> None:
        """Free the engine: processes end, memory is returned. Idempotent."""


@runtime_checkable
class NamesOperators(Protocol):
    """What a Model may offer besides, so that a report can name the operator or layer at fault."""

    def operators(self) -> dict[str, str]:
        """What makes each tensor of a trace, and what updates each parameter and moment, by the tensor's name:
        "FC (operator 3 of tiny_gradient)", "Linear bottom.1". Tensors may be left out."""


@runtime_checkable
class Backend(Protocol):
    name: str
    trains: bool
    """False: forward only; `train_step` and `optimizer_state` raise NotImplementedError.

    A backend may also have `repeatable`, see `is_repeatable`."""

    def available(self) -> Availability:
        """Cheap; loads no framework where that can be helped."""

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> Model:
        """A model with these parameters (copied) and initial optimizer state.

        Raises EngineError where the engine is missing or fails, InputError for a device it cannot use and for
        parameters that are not the spec's (`spec.parameters.check_parameters`).
        """


def is_repeatable(backend: Backend) -> bool:
    """Whether the backend promises, by an attribute `repeatable = True`, that two models make the same bits of the same
    calls, in one process and with as many threads. The suite holds it to that."""
    return getattr(backend, "repeatable", False)


def backend_names(group: str = GROUP) -> tuple[str, ...]:
    """Every registered backend that runs by default, sorted; with ON_REQUEST, the others."""
    return tuple(sorted(entry.name for entry in entry_points(group=group)))


def load_backend(name: str) -> Backend:
    """The backend registered as `name`, or `module:attribute`, which may lie in the current folder. Raises InputError
    for an unknown one."""
    if ":" in name:
        return _import_backend(name)
    for entry in (*entry_points(group=GROUP), *entry_points(group=ON_REQUEST)):
        if entry.name == name:
            return entry.load()
    known = ", ".join((*backend_names(), *backend_names(ON_REQUEST)))
    raise InputError(f"backend '{name}'", f"one of {known}", "no such backend",
                     f"packages register backends under the entry-point group '{GROUP}'")


def _import_backend(path: str) -> Backend:
    module, _, attribute = path.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a console script, unlike `python -m`, does not look there
    try:
        backend = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"backend '{path}'", "module:attribute that can be imported", error,
                         "check the spelling and PYTHONPATH") from None
    if not isinstance(backend, Backend):
        raise InputError(f"backend '{path}'", "an object with the attributes of spec.backend.Backend",
                         type(backend).__name__, "name an instance that has them")
    return backend
