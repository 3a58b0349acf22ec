"""The least time that a step can take on this machine: its GEMMs at the best rate measured, then its rows of
embeddings at the best bandwidth measured. Everything else (activations, interaction, loss) is taken to be free.

    FLOP, inference   2 B (sum of in x out over all layers)
    FLOP, training    three times that (output, weight gradient, input gradient), less 2 B D out of the first bottom
                      layer, whose input's gradient nobody needs
    bytes, inference  4 E K: K rows are read, E numbers each, over all tables
    bytes, training   4 E K + 8 E U: then U distinct rows are read and written back by the optimizer
    bytes, Adagrad    ... + 8 E U (adagrad) or + 8 U (rowwise_adagrad): so is its state

K and U are counted in the batches that are timed. Where a table fits into the processor's caches its rows may come
faster than from memory: the bandwidth is measured on a table as large as the spec's largest, of at most 256 MiB.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spec.batch import Batch
from spec.model import ModelSpec


class Work(NamedTuple):
    """Of one step, on average over the batches."""

    flop: float
    bytes: float

    def seconds(self, gemm: float, gather: float) -> float:
        """At `gemm` FLOP/s and `gather` bytes/s."""
        return self.flop / gemm + self.bytes / gather


def work(spec: ModelSpec, batches: Sequence[Batch], training: bool) -> Work:
    return Work(flop(spec, batches[0].size, training),
                float(np.mean([moved_bytes(spec, batch, training) for batch in batches])))


def flop(spec: ModelSpec, batch_size: int, training: bool) -> int:
    layers = (layer for layers in spec.layer_sizes.values() for layer in layers)
    forward = 2 * batch_size * sum(inputs * outputs for inputs, outputs in layers)
    first = 2 * batch_size * spec.dense_features * spec.bottom.widths[0]
    return 3 * forward - first if training else forward


def moved_bytes(spec: ModelSpec, batch: Batch, training: bool) -> int:
    read = 4 * spec.embedding_dim * sum(len(indices) for indices in batch.indices)
    if not training:
        return read
    row = {"sgd": 0, "adagrad": spec.embedding_dim, "rowwise_adagrad": 1}[spec.optimizer.kind]
    distinct = sum(len(np.unique(indices)) for indices in batch.indices)
    return read + 8 * (spec.embedding_dim + row) * distinct
