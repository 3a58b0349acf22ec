"""Tensors that lie in one storage: what is done to each of them can be done at once.

What is found out about them is kept on the first of them, and holds as long as they are where they were.
"""

from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter, ge, methodcaller
from typing import Any, NamedTuple

_place, _shape, _dtype, _contiguous = (methodcaller("data_ptr"), attrgetter("shape"), attrgetter("dtype"),
                                       methodcaller("is_contiguous"))


class _Ranges(NamedTuple):
    """Of each table, in what joins them: its first row, int64 [T, 1], and how many it has."""

    first_T1: Any
    counts: list[int]


class _Tables(NamedTuple):
    """Attributes:

    places, shapes: of the tables.
    storage: [N, ...], all rows from the first to the last of them.
    """

    places: list[int]
    shapes: list[tuple[int, ...]]
    storage: Any
    ranges: _Ranges


class _Rows(NamedTuple):
    """Attributes:

    places, version: of the indices.
    ranges: of the tables that they are for. (Those themselves would be kept alive.)
    rows: [T * K], of the joined tables.
    """

    places: list[int]
    version: int
    ranges: _Ranges
    rows: Any


def joined_lookup(tables: Sequence[Any], indices: Sequence[Any]) -> tuple[Any, Any] | None:
    """A tensor [N, ...] with the rows of T tables, and the rows of it [T * K] that the indices [K] of each name.

    None where that cannot be said: the tables do not lie in one storage, the indices are not all of one type and size,
    or one is negative or beyond its table.
    """
    joined = _joined(tables)
    rows = None if joined is None else _joined_rows(indices, joined.ranges)
    return None if rows is None else (joined.storage, rows)


def _joined(tables: Sequence[Any]) -> _Tables | None:
    import torch

    places, shapes = list(map(_place, tables)), list(map(_shape, tables))
    known = getattr(tables[0], "_dlrm_joined", None)
    if known and known.places == places and known.shapes == shapes:
        return known
    start = min(places)
    lowest = tables[places.index(start)]
    row, whole = lowest.stride(0) * lowest.element_size(), lowest.shape[1:]
    if not (row and _alike(map(_dtype, tables)) and _alike(shape[1:] for shape in shapes)
            and all(map(_contiguous, tables))):
        return None
    first, within = zip(*(divmod(place - start, row) for place in places), strict=True)
    counts = [shape[0] for shape in shapes]
    rows = max(map(sum, zip(first, counts, strict=True)))
    if any(within) or start + rows * row > _end(lowest):
        return None
    storage = lowest.as_strided((rows, *whole), lowest.stride())
    first_T1 = torch.tensor(first, device=lowest.device)[:, None]
    tables[0]._dlrm_joined = joined = _Tables(places, shapes, storage, _Ranges(first_T1, counts))
    return joined


def _joined_rows(indices: Sequence[Any], ranges: _Ranges) -> Any | None:
    """Remembered on indices that lie together, until they are written to: a step looks up and then updates the same
    rows."""
    import torch

    first, places = indices[0], list(map(_place, indices))
    known = getattr(first, "_dlrm_rows", None)
    if known and known.places == places and known.version == first._version and known.ranges is ranges:
        return known.rows
    if first.dim() != 1 or not first.numel() or not (_alike(map(_dtype, indices)) and _alike(map(_shape, indices))):
        return None
    indices_TK = torch.stack(list(indices))
    low_T, high_T = (bound.tolist() for bound in indices_TK.aminmax(dim=1))
    if min(low_T) < 0 or any(map(ge, high_T, ranges.counts)):
        return None
    rows = (indices_TK + ranges.first_T1).view(-1)
    # Of one storage, they count their writes together; PyTorch counts none to inference tensors.
    if not first.is_inference() and places[0] == min(places) and max(places) + first.nbytes <= _end(first):
        first._dlrm_rows = _Rows(places, first._version, ranges, rows)
    return rows


def _alike(values: Iterable[Hashable]) -> bool:
    return len(set(values)) == 1


def _end(tensor: Any) -> int:
    """Where its storage ends."""
    memory = tensor.untyped_storage()
    return memory.data_ptr() + memory.nbytes()
