"""Faults in what a backend does with a batch, and in how it behaves from call to call."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.case import Case
from conformance.mutants import settings
from conformance.mutants.mutant import Mutant
from spec.backend import Model
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays


def _of_table(change, number: int = 0):
    def changed(spec: ModelSpec, batch: Batch) -> Batch:
        indices = list(batch.indices)
        indices[number] = change(spec.tables[number].rows, batch.indices[number]).astype(np.int64)
        return replace(batch, indices=tuple(indices))
    return changed


def _dense(change):
    return lambda spec, batch: replace(batch, dense=np.ascontiguousarray(change(batch.dense), np.float32))


def _label(change):
    return lambda spec, batch: replace(batch, label=np.ascontiguousarray(change(batch.label), np.float32))


def _swapped_tables(spec: ModelSpec, batch: Batch) -> Batch:
    """The ids of tables 0 and 1, modulo the rows of the table that gets them."""
    indices, lengths = list(batch.indices), list(batch.lengths)
    indices[0], indices[1] = (indices[1] % spec.tables[0].rows, indices[0] % spec.tables[1].rows)
    lengths[0], lengths[1] = lengths[1], lengths[0]
    return replace(batch, indices=tuple(indices), lengths=tuple(lengths))


def _same_half(spec: ModelSpec, batch: Batch) -> Batch:
    """Two workers that both read the first half of the dense features."""
    half = batch.size // 2
    return replace(batch, dense=np.concatenate([batch.dense[:half], batch.dense[:half], batch.dense[2 * half:]]))


def _reversed_lengths(spec: ModelSpec, batch: Batch) -> Batch:
    return replace(batch, lengths=(batch.lengths[0][::-1].copy(), *batch.lengths[1:]))


def _below(bits: int, what: str):
    def reason(case: Case) -> str:
        rows = case.spec.tables[0].rows
        return f"all indices are below {2**bits:,}, which {what} holds exactly" if rows <= 2**bits else ""
    return reason


def _short_bags(case: Case) -> str:
    longest = max(int(lengths.max()) for batch in case.batches for lengths in batch.lengths)
    return f"no bag has more than {longest} rows, which uint8 holds" if longest < 256 else ""


def _uint8_lengths(spec: ModelSpec, batch: Batch) -> Batch:
    return replace(batch, lengths=tuple(lengths.astype(np.uint8).astype(np.int32) for lengths in batch.lengths))


class Behaviour:
    """A model that does one thing in another way. `create` makes another model like it."""

    def __init__(self, model: Model, create: Callable[[], Model]) -> None:
        self._model, self._create = model, create

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _StalePredictions(Behaviour):
    """Predicts with the parameters that it was made with, whatever it has learned."""

    _first: Model | None = None

    def predict(self, batch: Batch) -> np.ndarray:
        self._first = self._first or self._create()
        return self._first.predict(batch)

    def close(self) -> None:
        self._model.close()
        if self._first:
            self._first.close()


class _LossAfterwards(Behaviour):
    """Returns the loss after the update."""

    def train_step(self, batch: Batch) -> float:
        self._model.train_step(batch)
        return float(self._model.trace(batch)["loss"])


class _Wandering(Behaviour):
    """A trace is a training step too."""

    def trace(self, batch: Batch) -> Arrays:
        trace = self._model.trace(batch)
        self._model.train_step(batch)
        return trace


class _FirstBatch(Behaviour):
    """Trains on the first batch again and again: the feeds of later ones are ignored."""

    _first: Batch | None = None

    def train_step(self, batch: Batch) -> float:
        self._first = self._first or batch
        return self._model.train_step(self._first)


DATA = [
    Mutant("data-shifted-labels", "data", "every sample has its neighbour's label", named=("loss", "probability_grad"),
           batch=_label(lambda label: np.roll(label, 1, 0))),
    Mutant("data-inverted-labels", "data", "1 - label", named=("loss", "probability_grad"),
           batch=_label(lambda label: 1 - label)),
    Mutant("data-one-label", "data", "one sample's label is flipped", named=("loss", "probability_grad"),
           batch=_label(lambda label: np.concatenate([1 - label[:1], label[1:]]))),
    Mutant("data-swapped-features", "data", "two dense features change places", named=("bottom.0.preactivation",),
           batch=_dense(lambda dense: dense[:, [1, 0, *range(2, dense.shape[1])]])),
    Mutant("data-feature-memory-order", "data", "dense features are read column by column",
           named=("bottom.0.preactivation",), batch=_dense(lambda dense: dense.T.reshape(dense.shape))),
    Mutant("data-log-features", "data", "the logarithm of dense features is taken once more",
           named=("bottom.0.preactivation",), batch=_dense(np.log1p)),
    Mutant("data-float16-features", "precision", "dense features go through float16",
           named=("bottom.0.preactivation",), batch=_dense(lambda dense: dense.astype(np.float16))),
    Mutant("data-same-half", "data", "two workers read the same half of the dense features",
           named=("bottom.0.preactivation",), batch=_same_half),
    Mutant("data-swapped-tables", "data", "the lookups of tables 0 and 1 change places",
           named=("tables.*.pooled",), setting=settings.ragged_pair, batch=_swapped_tables),
    Mutant("data-reversed-lengths", "data", "bags have each other's lengths", named=("tables.0.pooled",),
           setting=settings.RAGGED_SUM, batch=_reversed_lengths),
    Mutant("data-one-based", "data", "ids are taken to count from 1", named=("tables.0.pooled",),
           batch=_of_table(lambda rows, indices: np.maximum(indices - 1, 0))),
    Mutant("data-last-row", "data", "the last row is taken for padding: row 0", named=("tables.0.pooled",),
           setting=settings.table(0, rows=20),
           batch=_of_table(lambda rows, indices: np.where(indices == rows - 1, 0, indices))),
    Mutant("data-one-index", "data", "one index of the batch is wrong", named=("tables.0.pooled",),
           batch=_of_table(lambda rows, indices: np.append(indices[:-1], (indices[-1] + 1) % rows))),
    Mutant("data-sorted-indices", "data", "the ids of a table are sorted over the batch", named=("tables.0.pooled",),
           batch=_of_table(lambda rows, indices: np.sort(indices))),
    Mutant("data-int8-indices", "data", "ids go through uint8", named=("tables.0.pooled",),
           batch=_of_table(lambda rows, indices: indices.astype(np.uint8)), equivalent=_below(8, "uint8")),
    Mutant("data-float32-indices", "data", "ids go through float32", named=("tables.0.pooled",),
           batch=_of_table(lambda rows, indices: indices.astype(np.float32)), equivalent=_below(24, "float32")),
    Mutant("data-uint8-lengths", "data", "lengths go through uint8", named=("tables.0.pooled",),
           setting=settings.RAGGED_SUM, batch=_uint8_lengths, equivalent=_short_bags),
    Mutant("step-loss-afterwards", "update", "a step returns the loss after its update", named=("loss",),
           behaviour=_LossAfterwards, optimizer="sgd"),
    Mutant("step-first-batch", "update", "later batches are ignored", named=("loss",), behaviour=_FirstBatch,
           optimizer="sgd"),
    Mutant("trace-trains", "update", "a trace changes the parameters", behaviour=_Wandering, optimizer="sgd"),
    Mutant("predict-stale", "update", "predictions go on with the parameters before the training",
           named=("predict",), behaviour=_StalePredictions, optimizer="sgd"),
]
