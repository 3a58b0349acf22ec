"""A batch from an .npz file: `numpy.savez(file, **batch.arrays())`. Pickled objects are never loaded."""

import itertools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spec.batch import Batch
from spec.errors import InputError
from spec.model import ModelSpec

_UNREADABLE = (ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, MemoryError,
               zipfile.BadZipFile, zlib.error)


def read_batch(spec: ModelSpec, path: Path) -> Batch:
    """The batch whose arrays the file holds under their names (SPEC.md, 2).

    Raises InputError naming the file, and the array, for anything that is not exactly that.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("a single array")
            arrays = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(str(path), "a readable file", error.strerror or error, "check the path") from None
    except _UNREADABLE as error:
        # of NumPy's text the first sentence alone: the next one recommends to load pickles
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise InputError(str(path), "an .npz archive of plain arrays", f"something else ({reason})",
                         "write it with numpy.savez") from None
    try:
        return Batch.from_arrays(spec, arrays)
    except InputError as error:
        raise error.within(str(path)) from None


def npz_batches(spec: ModelSpec, path: Path) -> Iterator[Batch]:
    """The file's batch, again and again. Raises as `read_batch`, at the call."""
    return itertools.repeat(read_batch(spec, path))
