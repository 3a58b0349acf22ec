"""Embedding bags: rows looked up in a table and pooled, with sparse gradients."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spec.model import Table


class EmbeddingBag(nn.Module):
    """One table. Gradients of `weight` [N, E], and of `pooling` [N] where it is learned, are sparse over rows."""

    def __init__(self, table: Table, embedding_dim: int) -> None:
        super().__init__()
        self.table = table
        self.weight = nn.Parameter(torch.empty(table.rows, embedding_dim))
        if table.weighted:
            self.pooling = nn.Parameter(torch.empty(table.rows),
                                        requires_grad=table.pooling == "weighted_learned")

    def forward(self, indices: Tensor, lengths_B: Tensor) -> Tensor:
        """Pooled rows [B, E] of indices int64 [sum of lengths]; an empty bag gives zeros."""
        fixed = self.table.fixed_lookups
        weights = torch.gather(self.pooling, 0, indices, sparse_grad=True) if self.table.weighted else None
        offsets_B = None
        if fixed is None:
            offsets_B = lengths_B.cumsum(0) - lengths_B
        else:
            indices = indices.view(-1, fixed)
            weights = weights.view(-1, fixed) if weights is not None else None
        pooled_BE = F.embedding_bag(indices, self.weight, offsets_B, mode="sum", sparse=True,
                                    per_sample_weights=weights)
        if self.table.pooling == "mean":
            # Not mode="mean": the spec multiplies by the rounded 1/n.
            pooled_BE = pooled_BE * lengths_B.clamp(min=1).to(pooled_BE.dtype).reciprocal()[:, None]
        return pooled_BE
