"""Tables that are slices of one storage, one after the other: what is looked up in all of them is one lookup."""

from collections.abc import Sequence
from typing import Any


def joined_lookup(tables: Sequence[Any], indices: Sequence[Any]) -> tuple[Any, Any] | None:
    """The storage [rows of all, ...], and the rows of it [T * K] that the indices [K] of each of T tables name.

    None where that cannot be said: the tables are no such slices, the indices are not all of one type and size, or one
    is negative or beyond its table.
    """
    import torch

    storage, (K, *more) = tables[0]._base, indices[0].shape
    if storage is None or more or not K or len({(index.dtype, index.shape) for index in indices}) > 1:
        return None
    whole, strides, start = storage.shape[1:], storage.stride(), storage.storage_offset()
    if any(table._base is not storage or table.shape[1:] != whole or table.stride() != strides for table in tables):
        return None
    places = [divmod(table.storage_offset() - start, strides[0]) for table in tables]
    if any(within for _, within in places):
        return None
    indices_TK = torch.stack(list(indices))
    low_T, high_T = (bound.tolist() for bound in indices_TK.aminmax(dim=1))
    if min(low_T) < 0 or any(high >= table.shape[0] for high, table in zip(high_T, tables, strict=True)):
        return None
    first_T = torch.tensor([first for first, _ in places], dtype=indices_TK.dtype, device=indices_TK.device)
    return storage, indices_TK.add_(first_T[:, None]).view(-1)
