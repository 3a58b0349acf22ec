"""Sources of Batches."""

from collections.abc import Iterator
from pathlib import Path

from spec.batch import Batch
from spec.data.criteo import criteo_batches
from spec.data.npz import npz_batches
from spec.data.random import random_batches
from spec.errors import InputError
from spec.model import ModelSpec


def open_batches(source: str, spec: ModelSpec, batch_size: int, seed: int = 0) -> Iterator[Batch]:
    """An endless stream of validated batches.

    Args:
        source: "random"; "criteo:FILE", rows of Criteo's TSV; "npz:FILE", one batch, again and again.
        batch_size: samples in a batch; a file may hold fewer, and an .npz file has its own size.
        seed: of "random" alone; files are read in order.

    Raises InputError at the call for an unknown source and for a file that is missing or cannot fit the
    spec, and, from the iterator, for a bad row.
    """
    kind, _, argument = source.partition(":")
    if batch_size < 1:
        raise InputError("batch size", "1 or more", batch_size, "ask for at least one sample")
    if source == "random":
        return random_batches(spec, batch_size, seed)
    if kind == "criteo" and argument:
        return criteo_batches(spec, Path(argument), batch_size)
    if kind == "npz" and argument:
        return npz_batches(spec, Path(argument))
    raise InputError(f"data '{source}'", "random, criteo:FILE or npz:FILE", "another source",
                     "for example --data criteo:train.txt")
