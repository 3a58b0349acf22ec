"""Batch: the input of one step, checked before any engine sees it (SPEC.md, 2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec.errors import InputError
from spec.model import ModelSpec, Table
from spec.tensors import batch_names

_FLOAT, _INT32, _INT64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)


@dataclass(frozen=True)
class Batch:
    """B samples.

    Attributes:
        dense: float32 [B, D].
        indices: one int64 [sum of lengths] for each table, sample by sample.
        lengths: one int32 [B] for each table; 0 is legal.
        label: float32 [B, 1].
    """

    dense: np.ndarray
    indices: tuple[np.ndarray, ...]
    lengths: tuple[np.ndarray, ...]
    label: np.ndarray

    @property
    def size(self) -> int:
        return len(self.dense)

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of the spec."""
        named = {"dense": self.dense}
        for number, (indices, lengths) in enumerate(zip(self.indices, self.lengths, strict=True)):
            named[f"tables.{number}.indices"] = indices
            named[f"tables.{number}.lengths"] = lengths
        return named | {"label": self.label}

    @classmethod
    def from_arrays(cls, spec: ModelSpec, named: dict[str, np.ndarray]) -> "Batch":
        """The inverse of `arrays`, checked. Raises InputError for a missing, unknown or bad array."""
        tables = range(len(spec.tables))
        known = set(batch_names(spec))
        for name in sorted(known - named.keys()):
            raise InputError(name, "an array", "none", "a batch holds every input of the spec")
        for name in sorted(named.keys() - known):
            raise InputError(name, f"only the inputs of spec '{spec.name}'", "an array of this name", "remove it")
        batch = cls(named["dense"], tuple(named[f"tables.{n}.indices"] for n in tables),
                    tuple(named[f"tables.{n}.lengths"] for n in tables), named["label"])
        batch.validate(spec)
        return batch

    def validate(self, spec: ModelSpec) -> None:
        """Raise InputError naming the first array, and its first element, that the spec does not allow."""
        _expect("dense", self.dense, _FLOAT, ("B", spec.dense_features))
        if self.size == 0:
            raise InputError("dense", "at least one sample", "none", "the mean over no samples has no value")
        _expect("label", self.label, _FLOAT, (self.size, 1))
        for name, array in (("dense", self.dense), ("label", self.label)):
            if not np.isfinite(array).all():
                place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
                raise InputError(f"{name}{list(place)}", "a finite number", array[place], "clean the data first")
        if spec.loss.kind != "mse":
            _expect_labels(self.label, soft=spec.loss.kind == "bce_logits")
        for what, arrays in (("indices", self.indices), ("lengths", self.lengths)):
            if len(arrays) != len(spec.tables):
                raise InputError(what, f"{len(spec.tables)} arrays, one for each table", len(arrays),
                                 "give every table its lookups")
        one_hot = [number for number, table in enumerate(spec.tables) if table.one_hot]
        known = one_hot and _rows_exist([self.indices[number] for number in one_hot],
                                        [self.lengths[number] for number in one_hot],
                                        [spec.tables[number].rows for number in one_hot], self.size)
        for number in sorted(set(range(len(spec.tables))).difference(one_hot if known else ())):
            _expect_lookups(f"tables.{number}", self.indices[number], self.lengths[number], self.size,
                            spec.tables[number])


def _expect(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int | str, ...]) -> None:
    """A letter in `shape` stands for any size."""
    if not isinstance(array, np.ndarray):
        raise InputError(name, "a NumPy array", type(array).__name__, "convert it with numpy.asarray")
    if array.dtype != dtype:
        raise InputError(name, f"dtype {dtype}", array.dtype, f"convert it with .astype('{dtype}')")
    if array.shape != shape and (array.ndim != len(shape) or any(
            want != have for want, have in zip(shape, array.shape, strict=True) if isinstance(want, int))):
        raise InputError(name, f"shape [{', '.join(map(str, shape))}]", list(array.shape), "see SPEC.md, 2")


def _expect_labels(label: np.ndarray, soft: bool) -> None:
    bad = (label < 0) | (label > 1) if soft else (label != 0) & (label != 1)
    if bad.any():
        sample = int(np.argwhere(bad)[0][0])
        raise InputError(f"label[{sample}, 0]", "a number in [0, 1]" if soft else "0 or 1", label[sample, 0],
                         "use another loss, or round the labels")


def _rows_exist(indices: Sequence[np.ndarray], lengths: Sequence[np.ndarray], rows: Sequence[int], size: int) -> bool:
    """Whether one-hot lookups are allowed, of all their tables at once: of 26 of them a small batch is else checked for
    as long as it is looked up."""
    arrays = [*indices, *lengths]
    if not ({*map(type, arrays)} == {np.ndarray} and {array.shape for array in arrays} == {(size,)}
            and {array.dtype for array in indices} == {_INT64} and {array.dtype for array in lengths} == {_INT32}):
        return False
    # As unsigned numbers, negative ones are the greatest.
    found = np.concatenate(indices).view(np.uint64).reshape(len(rows), size).max(1)
    return bool((np.concatenate(lengths) == 1).all() and (found < np.array(rows, np.uint64)).all())


def _expect_lookups(name: str, indices: np.ndarray, lengths: np.ndarray, size: int, table: Table) -> None:
    """Looks at each array once where all is well: a batch of 26 tables is checked in a small part of a step."""
    _expect(f"{name}.lengths", lengths, _INT32, (size,))
    _expect(f"{name}.indices", indices, _INT64, ("K",))
    fixed = table.fixed_lookups
    if fixed is not None and not (lengths == fixed).all():
        sample = int(np.flatnonzero(lengths != fixed)[0])
        raise InputError(f"{name}.lengths[{sample}]", f"{fixed}, the table's fixed number of lookups", lengths[sample],
                         "declare the table ragged: lookups = [min, max]")
    if fixed is None and lengths.min() < 0:
        sample = int(np.flatnonzero(lengths < 0)[0])
        raise InputError(f"{name}.lengths[{sample}]", "0 or more", lengths[sample], "an empty bag has length 0")
    total = int(lengths.sum(dtype=np.int64)) if fixed is None else fixed * size
    if total != len(indices):
        raise InputError(f"{name}.lengths", f"a sum of {len(indices)}, the number of indices", total,
                         "every index belongs to one sample")
    if indices.view(np.uint64).max(initial=0) >= table.rows:  # as unsigned numbers, negative ones are the greatest
        place = int(np.flatnonzero((indices < 0) | (indices >= table.rows))[0])
        raise InputError(f"{name}.indices[{place}]", f"0 to {table.rows - 1}, a row of the table", indices[place],
                         "map the ids into the table, for example modulo its rows")
