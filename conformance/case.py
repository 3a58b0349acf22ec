"""A case: one model, one set of initial parameters, one sequence of batches. The same bits for every backend."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import get_args

import numpy as np

from spec.batch import Batch
from spec.data import open_batches
from spec.memory import check_memory
from spec.model import ModelSpec, Optimizer
from spec.parameters import Arrays, initial_parameters, parameter_bytes
from spec.reference import Evaluation, evaluate
from spec.shapes import activation_shapes

OPTIMIZERS: tuple[str, ...] = get_args(Optimizer.model_fields["kind"].annotation)


@dataclass
class Case:
    """Attributes:
        batches: one for each step, the first of them also for the forward and backward comparison.
        optimizers: the kinds that the model is trained with, each from the initial parameters.
        source: where the batches came from, for reports.
    """

    spec: ModelSpec
    parameters: Arrays
    batches: Sequence[Batch]
    optimizers: Sequence[str]
    source: str
    seed: int
    _first: Evaluation | None = None

    def under(self, optimizer: str) -> ModelSpec:
        """The spec, trained by another optimizer."""
        return under(self.spec, optimizer)

    @property
    def first(self) -> Evaluation:
        """The reference on the initial parameters and the first batch, kinks undecided: for backends against
        each other."""
        if self._first is None:
            self._first = evaluate(self.spec, self.parameters, self.batches[0])
        return self._first


RATES = {"sgd": 0.1, "adagrad": 0.001, "rowwise_adagrad": 0.001}
"""Learning rates under an optimizer that is not the spec's own. A rate meant for SGD is no rate for Adagrad,
whose first step is rate * sign(gradient): it saturates the model, and all later gradients vanish."""

def under(spec: ModelSpec, optimizer: str) -> ModelSpec:
    """The spec, trained by another optimizer, at a rate that is one for it."""
    return spec if optimizer == spec.optimizer.kind else spec.with_optimizer(optimizer, RATES[optimizer])


MOST_SAMPLES = 256
"""Batches are cut to this size unless another is asked for: float64 takes its time."""


def make_case(spec: ModelSpec, source: str = "random", seed: int = 0, batch_size: int | None = None,
              steps: int = 10, optimizers: Sequence[str] = OPTIMIZERS) -> Case:
    """Draw parameters and read batches. Raises InputError for bad data, and for a model too large to be judged here."""
    size = batch_size or min(spec.batch_size, MOST_SAMPLES)
    where = f"spec '{spec.name}'"
    copies = _copies(optimizers if steps else ())
    check_memory(where, f"{copies} copies of the parameters", parameter_bytes(spec) * copies,
                 "cap the tables with --max-rows")
    check_memory(where, f"activations of {size:,} samples", size * _sample_bytes(spec), "use a smaller --batch-size")
    stream = open_batches(source, spec, size, seed)
    batches = list(itertools.islice(stream, max(steps, 1)))
    for batch in batches:
        batch.validate(spec)
    return Case(spec, initial_parameters(spec, seed), batches, tuple(optimizers) if steps else (), source, seed)


def _sample_bytes(spec: ModelSpec) -> int:
    """Of the reference: a value and a variance of float64, for each activation, input and looked up row, and for its
    gradient."""
    lookups = sum(int(np.max(table.lookups)) for table in spec.tables)
    numbers = sum(prod(shape) for shape in activation_shapes(spec, 1).values())
    return 2 * 2 * 8 * (numbers + spec.dense_features + lookups * spec.embedding_dim)


def _copies(optimizers: Sequence[str]) -> int:
    """How often the parameters are in memory at once: the case's, the model's, those before and after a step that is
    judged, after the next, and on their way between processes. Adagrad's state is as large as they are."""
    held = 2 if "adagrad" in optimizers else 1
    return 2 + 4 * held if optimizers else 3
