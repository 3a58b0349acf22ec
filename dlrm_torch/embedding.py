"""The embedding tables: rows looked up and pooled, for all tables at once.

The tables are slices of one storage, so that one lookup serves all those that are looked up alike. Gradients are
sparse, and hold each row once (lookups.py).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_torch.lookups import Lookups, RowGradient
from spec.model import Table

_Array = TypeVar("_Array", Tensor, np.ndarray)


class EmbeddingBag(nn.Module):
    """The parameters of one table: `weight` [N, E], and `pooling` [N] where its rows are weighted."""

    def __init__(self, table: Table, weight: Tensor, pooling: Tensor | None) -> None:
        super().__init__()
        self.table = table
        self.weight = nn.Parameter(weight)
        if pooling is not None:
            self.pooling = nn.Parameter(pooling, requires_grad=table.pooling == "weighted_learned")

    def __getstate__(self) -> dict[str, Any]:
        """With parameters of its own: a slice would be pickled with the whole storage, once for each table."""
        own = {name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in self._parameters.items()}
        return self.__dict__ | {"_parameters": own}


class Group(NamedTuple):
    """Tables that are looked up in one go: numbers of tables with the same `pooling`, all or none of them one-hot."""

    tables: tuple[int, ...]
    one_hot: bool
    pooling: str

    @property
    def weighted(self) -> bool:
        return self.pooling.startswith("weighted")

    @property
    def learned(self) -> bool:
        return self.pooling == "weighted_learned"

    def bags(self, x_BGE: Tensor) -> Tensor:
        """[bags, E], table by table, as `Lookups` has them."""
        return x_BGE.transpose(0, 1).flatten(0, 1)

    def samples(self, bags: Tensor) -> Tensor:
        """[B, G, E], the inverse of `bags`."""
        count, width = len(self.tables), bags.shape[1]
        return bags.view(count, -1, width).transpose(0, 1)


class _Shared(NamedTuple):
    """The storage of all parameters of one name, and where in memory each was found to be a slice of it.

    It is kept alive here, so that nothing else can come to lie at one of the pointers.
    """

    pointers: list[int]
    storage: Tensor


class EmbeddingBags(nn.ModuleList):
    """All tables, of one width; each an EmbeddingBag, whose parameters are slices of those of `shared`."""

    first_row: Tensor
    """int64 [T]: where each table's rows begin in the storage."""

    def __init__(self, tables: Sequence[Table], embedding_dim: int) -> None:
        rows = [table.rows for table in tables]
        weights = torch.empty(sum(rows), embedding_dim).split(rows)
        poolings: Sequence[Tensor | None] = [None] * len(tables)
        if any(table.weighted for table in tables):
            slices = torch.empty(sum(rows)).split(rows)
            poolings = [part if table.weighted else None for table, part in zip(tables, slices, strict=True)]
        super().__init__(map(EmbeddingBag, tables, weights, poolings))
        self.rows = sum(rows)
        self.first = list(accumulate(rows[:-1], initial=0))
        self.register_buffer("first_row", torch.tensor(self.first), persistent=False)
        alike = defaultdict(list)
        for number, table in enumerate(tables):
            one_hot = table.one_hot
            pooling = "sum" if one_hot and table.pooling == "mean" else table.pooling
            alike[one_hot, pooling].append(number)
        self.groups = [Group(tuple(numbers), *kind) for kind, numbers in alike.items()]
        self._shared: dict[str, _Shared] = {}
        # Half the bytes to sort, where they suffice.
        self._index_dtype = torch.int32 if self.rows < 2**31 else torch.int64

    def forward(self, indices: Sequence[Tensor], lengths: Sequence[Tensor]) -> list[Tensor]:
        """Pooled rows, for each table [B, E]; an empty bag gives zeros.

        Args:
            indices: for each table int64 [sum of lengths], sample by sample. Unchecked, unlike those of a `Batch`: a
                row beyond a table's last is one of the next table.
            lengths: for each table int32 [B].
        """
        return self.pool(self.lookups(indices, lengths))

    def lookups(self, indices: Sequence[_Array], lengths: Sequence[_Array],
                join: Callable[[Sequence[_Array]], Tensor] = torch.cat) -> list[Lookups]:
        """Of each group, what it looks up in the storage. `join` makes one tensor of what the arguments consist of."""
        return [self._lookups(group, indices, lengths, join) for group in self.groups]

    def pool(self, lookups: Sequence[Lookups]) -> list[Tensor]:
        """As `forward`."""
        pooled: dict[int, Tensor] = {}
        for group, its in zip(self.groups, lookups, strict=True):
            if torch.is_grad_enabled():
                pooled_BGE = _Pool.apply(self, group, its, *self.trained(group))
            else:
                pooled_BGE = self.pooled(group, its)
            pooled |= zip(group.tables, pooled_BGE.unbind(1), strict=True)
        return [pooled[number] for number in range(len(self))]

    def pooled(self, group: Group, lookups: Lookups) -> Tensor:
        """[B, G, E], unknown to autograd."""
        return group.samples(lookups.pooled(self.shared("weight"), self.shared("pooling") if group.weighted else None))

    def shared(self, name: str) -> Tensor:
        """`weight` [rows, E] or `pooling` [rows] of all tables, one after the other; a table without leaves a gap.

        Whatever has given a table memory of its own (a move to another device or type, a copy of the model) is
        undone here.
        """
        parameters = [bag._parameters.get(name) for bag in self]
        pointers = [0 if p is None else p.data_ptr() for p in parameters]
        held = self._shared.get(name)
        if held is None or held.pointers != pointers:
            with torch.inference_mode(False):  # they are to be trained later, whoever asks first
                held = self._shared[name] = _join(parameters, self.first, self.rows)
        return held.storage

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds its own storage."""
        return self.__dict__ | {"_shared": {}}

    def gradients(self, group: Group, gradient: RowGradient) -> dict[str, Tensor]:
        """Of `weight` [U, E], and of `pooling` [U] where it is learned, at the rows of a gradient without weights.

        A weight belongs to a row, so it multiplies what all bags together give that row.
        """
        rows, values = gradient
        if not group.weighted:
            return {"weight": values}
        gradients = {"weight": values * self.shared("pooling").index_select(0, rows)[:, None]}
        if group.learned:
            gradients["pooling"] = (values * self.shared("weight").index_select(0, rows)).sum(1)
        return gradients

    def slices(self, group: Group, gradient: RowGradient) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the table, gradients) of each parameter of a group, in the order of `trained`."""
        ends = torch.searchsorted(gradient.rows, self.first_row).tolist()
        ends.append(len(gradient.rows))
        for values in self.gradients(group, gradient).values():
            for number in group.tables:
                its = slice(ends[number], ends[number + 1])
                yield gradient.rows[its] - self.first[number], values[its]

    def _lookups(self, group: Group, indices: Sequence[_Array], lengths: Sequence[_Array],
                 join: Callable[[Sequence[_Array]], Tensor]) -> Lookups:
        its = [indices[number] for number in group.tables]
        joined = join(its)
        if group.one_hot:
            first_row = self.first_row if len(its) == len(self) else self.first_row[list(group.tables)]
            return Lookups((joined.view(len(its), -1) + first_row[:, None]).flatten())
        rows = joined.to(self._index_dtype)
        for part, number in zip(rows.split([len(part) for part in its]), group.tables, strict=True):
            part.add_(self.first[number])
        n = join([lengths[number] for number in group.tables])
        # Not mode="mean" of embedding_bag: the spec multiplies by the rounded 1/n.
        factor = n.clamp(min=1).to(self[0].weight.dtype).reciprocal()[:, None] if group.pooling == "mean" else None
        return Lookups(rows, n.to(rows.dtype), factor)

    def trained(self, group: Group) -> list[Tensor]:
        """The parameters with gradients, those of one name together."""
        names = ("weight", "pooling") if group.learned else ("weight",)
        return [self[number]._parameters[name] for name in names for number in group.tables]


def _join(parameters: Sequence[Tensor | None], first: Sequence[int], rows: int) -> _Shared:
    """`EmbeddingBags.shared`, given for each table its parameter, if it has one, and its first row."""
    found = [(at, parameter) for at, parameter in zip(first, parameters, strict=True) if parameter is not None]
    at, parameter = found[0]
    shape = rows, *parameter.shape[1:]
    width = math.prod(shape[1:])
    item, start = parameter.element_size(), parameter.storage_offset() - at * width
    base = parameter.data_ptr() - at * width * item
    fits = start >= 0 and (start + rows * width) * item <= parameter.untyped_storage().nbytes()
    if fits and all(other.data_ptr() == base + at * width * item and other.is_contiguous() for at, other in found):
        storage = parameter.detach().as_strided((rows * width,), (1,), start).view(shape)
    else:
        storage = parameter.detach().new_empty(shape)
        for at, other in found:
            other.data = storage[at:at + len(other)].copy_(other.detach())
    return _Shared([0 if p is None else p.data_ptr() for p in parameters], storage)


class _Pool(torch.autograd.Function):
    """`EmbeddingBags.pooled` for autograd. Each parameter's gradient is sparse and coalesced."""

    @staticmethod
    def forward(ctx, bags: EmbeddingBags, group: Group, lookups: Lookups, *parameters: Tensor) -> Tensor:
        ctx.bags, ctx.group, ctx.lookups = bags, group, lookups
        return bags.pooled(group, lookups)

    @staticmethod
    def backward(ctx, gradient_BGE: Tensor) -> tuple[Tensor | None, ...]:
        row_gradient = ctx.lookups.row_gradient(ctx.group.bags(gradient_BGE))
        return None, None, None, *(
            torch.sparse_coo_tensor(rows[None], values, parameter.shape, is_coalesced=True, check_invariants=False)
            for parameter, (rows, values) in zip(
                ctx.bags.trained(ctx.group), ctx.bags.slices(ctx.group, row_gradient), strict=True))
