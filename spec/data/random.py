"""Random batches (Naumov et al. 2019, section 4): uniform; any batch can be drawn alone (SPEC.md, 8)."""

import itertools
from collections.abc import Iterator

import numpy as np

from spec.batch import Batch
from spec.counter import integers, uniform
from spec.model import ModelSpec


def random_batch(spec: ModelSpec, size: int, seed: int, number: int) -> Batch:
    """Batch `number` of the stream `seed`, `size` samples; the bits depend on nothing else.

    dense uniform in [0, 1); lengths uniform in the table's [min, max], or its fixed number; indices uniform
    over the rows; labels 0 or 1, equally likely, under every loss.
    """
    stream = f"batch.{number}"
    dense = uniform(seed, f"{stream}.dense", (size, spec.dense_features), 0.0, 1.0)
    label = integers(seed, f"{stream}.label", size, 0, 2).astype(np.float32).reshape(size, 1)
    indices, lengths = [], []
    for table_number, table in enumerate(spec.tables):
        name = f"{stream}.tables.{table_number}"
        low, high = table.lookups if table.fixed_lookups is None else (table.lookups, table.lookups)
        bags = integers(seed, f"{name}.lengths", size, low, high + 1)
        lengths.append(bags.astype(np.int32))
        indices.append(integers(seed, f"{name}.indices", int(bags.sum()), 0, table.rows))
    batch = Batch(dense, tuple(indices), tuple(lengths), label)
    batch.validate(spec)
    return batch


def random_batches(spec: ModelSpec, size: int, seed: int) -> Iterator[Batch]:
    """Batches 0, 1, 2, ... without end."""
    return (random_batch(spec, size, seed, number) for number in itertools.count())
