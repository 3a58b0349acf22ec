"""The spec's update rules, in place (SPEC.md, 7). torch.optim differs: its Adagrad has no row-wise form."""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dlrm_torch.compiled import kernels_for
from dlrm_torch.embedding import Group
from dlrm_torch.lookups import Lookups
from dlrm_torch.model import DLRM
from spec.parameters import is_sparse, moment_name, trained_parameters

ADDED_SAMPLES, ADDED_WIDTH = 256, 64
"""Of so many samples at most MKL adds up a product of matrices at least so wide before it adds it to anything: to a
weight too, which is rounded once then. It rounds a thin weight, or in a larger batch, many times."""

BLOCK_BYTES = 2**22
"""Of the gradient of rows that is made and used up at a time, so that it stays in the cache."""


class Optimizer:
    """Updates a model's parameters and holds their state.

    Attributes:
        dense: the parameters of the MLPs, by name.
        state: tensors of `spec.parameters.state_shapes` by name, zeros at first, in their parameter's dtype; those of
            the tables are slices of one storage, as the tables are.
    """

    def __init__(self, model: DLRM) -> None:
        spec, self._tables = model.spec, model.tables
        # As every engine holds them; it shows only where the parameters are float64.
        self.rate, self.eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
        self._sgd = spec.optimizer.kind == "sgd"
        trained = set(trained_parameters(spec))
        self.dense = {name: p for name, p in model.named_parameters() if name in trained and not is_sparse(name)}
        self.state: dict[str, Tensor] = {}
        self._row_moments: dict[str, Tensor] = {}
        if self._sgd:
            return
        self._moments = {w: torch.zeros_like(w, requires_grad=False) for w in self.dense.values()}
        self.state = {moment_name(name): self._moments[w] for name, w in self.dense.items()}
        for part in ("weight", "pooling"):
            names = [f"tables.{number}.{part}" for number in range(len(self._tables))]
            if trained.isdisjoint(names):
                continue
            rows = self._tables.shared(part)
            rowwise = spec.optimizer.kind == "rowwise_adagrad"
            moment = rows.new_zeros(rows.shape[:1] if rowwise else rows.shape)
            self._row_moments[part] = moment
            slices = moment.split([table.rows for table in spec.tables])
            self.state |= {moment_name(name): its for name, its in zip(names, slices, strict=True) if name in trained}

    def step(self, dense_gradients: Sequence[Tensor], lookups: Sequence[Lookups],
             pooled_gradients: Sequence[Tensor]) -> None:
        """One update of every parameter: `update` with the gradients of `dense`, in its order, and `update_tables`."""
        with torch.no_grad():
            self.update(list(self.dense.values()), dense_gradients)
        self.update_tables(lookups, pooled_gradients)

    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Of some of `dense`, where autograd does not look."""
        if self._sgd:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=-self.rate)
            return
        moments = [self._moments[parameter] for parameter in parameters]
        torch._foreach_addcmul_(moments, gradients, gradients)
        roots = torch._foreach_sqrt(moments)
        torch._foreach_add_(roots, self.eps)
        torch._foreach_addcdiv_(parameters, gradients, roots, value=-self.rate)

    def adds_product(self, weight: Tensor, samples: int) -> bool:
        """Whether the gradient, a product over the samples, may be added to a weight while it is made."""
        return self._sgd and samples <= ADDED_SAMPLES and min(weight.shape) >= ADDED_WIDTH

    def update_tables(self, lookups: Sequence[Lookups], pooled_gradients: Sequence[Tensor]) -> None:
        """Of no other row than those looked up.

        Args:
            lookups: of each group of tables (`EmbeddingBags.lookups`).
            pooled_gradients: of what each group pooled, [B, G, E].
        """
        for group, its, gradient_BGE in zip(self._tables.groups, lookups, pooled_gradients, strict=True):
            kernels = None if group.learned else kernels_for(gradient_BGE)
            if kernels is not None:
                self._update_tables_by(kernels, group, its, gradient_BGE)
                continue
            # Multiplied here there are fewer numbers than rows have; `alpha` of index_add_ takes three times as long.
            gradient = group.bags(gradient_BGE * -self.rate if self._sgd else gradient_BGE)
            if self._sgd and its.lengths is None and not group.weighted:
                # Nothing is saved by summing a row's occurrences first: none was multiplied into many rows.
                self._tables.shared("weight").index_add_(0, its.rows, gradient)
                continue
            size = max(1, BLOCK_BYTES // (gradient.element_size() * gradient.shape[1]))
            for block in its.row_gradient_blocks(gradient, size):
                for part, values in self._tables.gradients(group, block).items():
                    self._update_rows(part, block.rows, values)

    def _update_tables_by(self, kernels: ModuleType, group: Group, its: Lookups, gradient_BGE: Tensor) -> None:
        """`kernels`: see compiled.py. The weights of one group, whose row weights are fixed if it has any."""
        storage = self._tables.shared("weight")
        row_weights = self._tables.shared("pooling") if group.weighted else None
        if self._sgd:
            ends = None if its.lengths is None else its.ends
            kernels.add_to_rows(storage, its.rows, ends, its.factor, row_weights, gradient_BGE, -self.rate)
        else:
            kernels.adagrad_rows(storage, self._row_moments["weight"], *its.transposed, its.factor, row_weights,
                                 group.bags(gradient_BGE).contiguous(), self.rate, self.eps)

    def _update_rows(self, part: str, rows: Tensor, values: Tensor) -> None:
        """`values` [U, ...] is the whole gradient of the distinct `rows` [U], under SGD the step; it is overwritten."""
        w = self._tables.shared(part)
        if not self._sgd:
            h = self._row_moments[part]
            # Its mean over the row where the moment has one number a row.
            squares = values.square() if h.dim() == values.dim() else values.square().mean(1)
            h.index_add_(0, rows, squares)
            root = h.index_select(0, rows).sqrt_().add_(self.eps)
            values.mul_(-self.rate).div_(root if root.dim() == values.dim() else root[:, None])
        w.index_add_(0, rows, values)
