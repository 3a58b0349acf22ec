"""Seeded faults: what a backend may offer so that the suite can put one inside it.

A module registered under the entry-point group `dlrm.mutants` by a backend's name has the functions of `Tamper`.
Without one a fault is seen in what the backend returns, and nothing behind it follows from it.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import NamedTuple, Protocol

import numpy as np

from spec.backend import Backend, Model
from spec.parameters import Arrays

GROUP = "dlrm.mutants"


class Change(NamedTuple):
    """A wrong step: `make` gets the arrays named in `reads`, `tensor` itself among them, as the engine has them, and
    returns, of the same shape, what the computation is to go on with in place of `tensor`."""

    tensor: str
    reads: tuple[str, ...]
    make: Callable[[Arrays], np.ndarray]


class Tamper(Protocol):
    def for_many(self, backend: Backend) -> Backend:
        """The backend, for many models one after another: what takes long to start is kept between them."""

    def tampered(self, backend: Backend, change: Change) -> Backend | None:
        """The backend with this one step changed, in prediction, trace and training alike; None where that step
        cannot be reached from outside."""

    def write(self, model: Model, arrays: Arrays) -> None:
        """Overwrite these parameters and moments of a model."""


def find_tamper(backend: str) -> Tamper | None:
    """That of a registered backend, if it has one."""
    return next((entry.load() for entry in entry_points(group=GROUP) if entry.name == backend), None)


def for_many(backend: Backend) -> Backend:
    """`Tamper.for_many` of a backend that has one, else the backend itself."""
    tamper = find_tamper(backend.name)
    return tamper.for_many(backend) if tamper else backend
