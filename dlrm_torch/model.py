"""DLRM as PyTorch modules (Naumov et al. 2019, figure 1). The names of a state_dict are the spec's own."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from dlrm_torch.compiled import kernels_for
from dlrm_torch.embedding import EmbeddingBags
from spec.model import ModelSpec

Tap = Callable[[str, Tensor], Tensor]
"""Sees every activation under its name (`spec.tensors.activations`) and returns what the model goes on with."""


def untapped(name: str, x: Tensor) -> Tensor:
    return x


ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid}  # relu: gradient 0 at 0, as the spec has it


class Linear(nn.Linear):
    """Its weight [out, in] lies in memory as [in, out], followed by zeros up to a multiple of 8 rows.

    MKL multiplies matrices of an odd width, such as 13 or 367 inputs, up to twice as slowly: the gradient of the weight
    gets a width that is even, and so can that of x (`padded`).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(_in_eights(inputs), outputs)[:inputs].t())

    def padded(self) -> Tensor:
        """[out, in or up to 7 more]: the weight and columns of zeros; without them if it lies elsewhere by now."""
        weight = self.weight.detach()
        outputs, inputs = weight.shape
        end = (weight.storage_offset() + _in_eights(inputs) * outputs) * weight.element_size()
        if weight.stride() != (1, outputs) or end > weight.untyped_storage().nbytes():
            return weight
        return weight.as_strided((outputs, _in_eights(inputs)), weight.stride())

    def reset_parameters(self) -> None:
        """Draws nothing: parameters are loaded. (`skip_init` imports a second of PyTorch's compiler for that.)"""


def _in_eights(inputs: int) -> int:
    return -(-inputs // 8) * 8


class MLP(nn.ModuleList):
    """The layers of "bottom" or "top"; the top's last activation is the probability, a sigmoid."""

    def __init__(self, spec: ModelSpec, name: str) -> None:
        sizes = spec.layer_sizes[name]
        super().__init__(Linear(inputs, outputs) for inputs, outputs in sizes)
        activation = ACTIVATIONS[getattr(spec, name).activation]
        self.activations = [(f"{name}.{layer}.activation", activation) for layer in range(len(sizes))]
        if name == "top":
            self.activations[-1] = ("probability", torch.sigmoid)
        self.preactivations = [f"{name}.{layer}.preactivation" for layer in range(len(sizes))]

    def forward(self, x: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """(preactivation, activation) of the last layer, both [B, out], for x [B, in]."""
        for linear, before, (after, activation) in zip(self, self.preactivations, self.activations, strict=True):
            z = tap(before, linear(x))
            x = tap(after, activation(z))
        return z, x


class DotInteraction(nn.Module):
    """The dense vector, then the dot products of the spec's pairs (Naumov et al. 2019, section 2.2)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        count, width = spec.interacting_vectors, spec.embedding_dim
        pairs_P2 = torch.tensor(spec.pairs).reshape(-1, 2)
        self.width = spec.interaction_width
        self.register_buffer("pairs", pairs_P2[:, 0] * count + pairs_P2[:, 1], persistent=False)
        self.register_buffer("columns", pair_columns(pairs_P2, count, width), persistent=False)
        every_P2 = torch.tril_indices(count, count).T
        self.register_buffer("every_column", pair_columns(every_P2, count, width), persistent=False)

    def forward(self, vectors: Sequence[Tensor], tap: Tap) -> Tensor:
        """[B, E + P] for F vectors [B, E], the dense one first."""
        features_BFE = tap("interaction.features", torch.stack(vectors, 1))
        kernels = kernels_for(features_BFE)
        if kernels is not None and tap is untapped and not torch.is_grad_enabled():
            return kernels.dot_products(features_BFE, self.columns, self.width)
        products_BFF = tap("interaction.products", self._products(kernels, features_BFE))
        return torch.cat([vectors[0], products_BFF.flatten(1).index_select(1, self.pairs)], 1)

    def _products(self, kernels: ModuleType | None, features_BFE: Tensor) -> Tensor:
        """[B, F, F]. By the loop that training steps and predictions take, where there is one: a trace has their very
        bits, and so every activation on the same side of its kink."""
        if kernels is None:
            return features_BFE @ features_BFE.transpose(1, 2)
        return _Products.apply(features_BFE, kernels, self.every_column)


class _Products(torch.autograd.Function):
    """X X', and its gradient."""

    @staticmethod
    def forward(ctx, features_BFE: Tensor, kernels: ModuleType, every_column_FF: Tensor) -> Tensor:
        ctx.save_for_backward(features_BFE)
        _, count, width = features_BFE.shape
        output = kernels.dot_products(features_BFE.contiguous(), every_column_FF, width + count * (count + 1) // 2)
        return output.index_select(1, every_column_FF.flatten()).view(-1, *every_column_FF.shape)

    @staticmethod
    def backward(ctx, gradient_BFF: Tensor) -> tuple[Tensor, None, None]:
        (features_BFE,) = ctx.saved_tensors
        return (gradient_BFF + gradient_BFF.transpose(1, 2)) @ features_BFE, None, None


def pair_columns(pairs_P2: Tensor, count: int, first: int) -> Tensor:
    """int64 [count, count], symmetric: `first` for the first pair, the next for the second, ...; 0 for what is none."""
    column_FF = torch.zeros(count, count, dtype=torch.int64)
    column_FF[pairs_P2[:, 0], pairs_P2[:, 1]] = torch.arange(first, first + len(pairs_P2))
    return torch.maximum(column_FF, column_FF.T)


class CatInteraction(nn.Module):
    """All vectors side by side."""

    def forward(self, vectors: Sequence[Tensor], tap: Tap) -> Tensor:
        """[B, F E] for F vectors [B, E], the dense one first."""
        return torch.cat(list(vectors), 1)


class DLRM(nn.Module):
    """One DLRM, float32. Its parameters are not initialised: load a state_dict of `spec.parameters`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.bottom = MLP(spec, "bottom")
        self.top = MLP(spec, "top")
        self.tables = EmbeddingBags(spec.tables, spec.embedding_dim)
        self.interaction = DotInteraction(spec) if spec.interaction.kind == "dot" else CatInteraction()

    def forward(self, dense_BD: Tensor, indices: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """The probability [B, 1].

        Args:
            dense_BD: float32 [B, D].
            indices: for each table int64 [sum of lengths], sample by sample.
            lengths: for each table int32 [B].
        """
        return self.outputs(dense_BD, self.tables(indices, lengths))[1]

    def outputs(self, dense_BD: Tensor, pooled: Sequence[Tensor], tap: Tap = untapped) -> tuple[Tensor, Tensor]:
        """(last preactivation, probability), both [B, 1]: some losses start from the one, some from the other.

        `pooled` is what the tables give, [B, E] each.
        """
        pooled = [tap(f"tables.{number}.pooled", x) for number, x in enumerate(pooled)]
        _, bottom_BE = self.bottom(dense_BD, tap)
        return self.top(tap("interaction.output", self.interaction([bottom_BE, *pooled], tap)), tap)
