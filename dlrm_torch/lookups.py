"""What is looked up in one batch, and the lookup transposed: the gradient of the rows.

A bag's pooled vector is the sum of its rows; a row's gradient is the sum of the gradients of the bags that it was in.
Both are one embedding_bag: over the table with the rows in the order of the bags, and over the gradient with the bags
in the order of the rows. That sums the occurrences of a row before a stateful optimizer sees them, adds nothing twice
into one place, and so gives the same bits in every run. (Under SGD a compiled loop needs no such sums: kernels.py.)
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class RowGradient(NamedTuple):
    """`rows` int64 [U], distinct and ascending; `values` [U, E], the sum of the gradients of the bags each was in."""

    rows: Tensor
    values: Tensor


class Lookups:
    """Bags of rows of one storage.

    Attributes:
        rows: int32 or int64 [K], bag by bag.
        lengths: [bags], of the dtype of `rows`, or None where every bag holds one row.
        factor: [bags, 1], what each bag's sum is multiplied by, or None.
    """

    def __init__(self, rows: Tensor, lengths: Tensor | None = None, factor: Tensor | None = None) -> None:
        self.rows, self.lengths, self.factor = rows, lengths, factor

    def pooled(self, weight: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """[bags, E] for the storage [N, E], each row multiplied by its row weight [N] where they are given."""
        weights_K = None if row_weights is None else row_weights.index_select(0, self.rows)
        if self.lengths is None:
            pooled = weight.index_select(0, self.rows)
            if weights_K is not None:
                pooled.mul_(weights_K[:, None])
        else:
            starts = (self.ends - self.lengths).to(self.rows.dtype)
            pooled = F.embedding_bag(self.rows, weight, starts, mode="sum", per_sample_weights=weights_K)
        return pooled if self.factor is None else pooled.mul_(self.factor)

    def row_gradient(self, gradient: Tensor) -> RowGradient:
        """Of all rows, from the gradient [bags, E] of `pooled`, without the row weights."""
        blocks = list(self.row_gradient_blocks(gradient, max(1, len(self.rows))))
        return blocks[0] if blocks else RowGradient(self.rows, gradient.new_empty(0, gradient.shape[1]))

    def row_gradient_blocks(self, gradient: Tensor, size: int) -> Iterator[RowGradient]:
        """The same, up to `size` rows at a time: what is done with a block finds it in the cache."""
        if self.factor is not None:
            gradient = gradient * self.factor
        rows, bags, starts = self.transposed
        firsts = [*starts[::size].tolist(), len(bags)]
        for number, first in enumerate(firsts[:-1]):
            its = slice(number * size, (number + 1) * size)
            values = F.embedding_bag(bags[first:firsts[number + 1]], gradient, starts[its] - first, mode="sum")
            yield RowGradient(rows[its], values)

    @cached_property
    def ends(self) -> Tensor:
        """int64 [bags]: where the rows of each bag end."""
        return self.lengths.cumsum(0)

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct rows int64 [U], ascending; the bags [K] that hold them, row by row; where each row's bags start [U].

        The latter two are of one dtype, int32 or int64.
        """
        ordered, order = self.rows.sort(stable=True)
        rows, counts = torch.unique_consecutive(ordered, return_counts=True)
        rows, starts = rows.long(), counts.cumsum(0) - counts  # index_add_ is ten times slower with int32
        if self.lengths is None:
            return rows, order, starts
        bag = torch.arange(len(self.lengths), dtype=self.rows.dtype, device=self.rows.device)
        bags = bag.repeat_interleave(self.lengths, output_size=len(self.rows)).index_select(0, order)
        return rows, bags, starts.to(bags.dtype)
