"""A training step with its backward pass written out: what autograd computes for the modules, without its records.

What is no longer needed is overwritten, and an MLP's weight takes its step as soon as the gradient has passed it. The
gradients of `engine.trace` are autograd's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dlrm_torch.inputs import Inputs
from dlrm_torch.loss import loss_and_gradient, mean_loss
from dlrm_torch.model import DLRM, MLP
from dlrm_torch.optimizer import Optimizer

Mark = Callable[[str], None]
"""Told, after each piece of work, which of `spec.backend.PARTS` it was for."""

_aten = torch.ops.aten
_APPLY = {torch.relu: torch.relu_, torch.sigmoid: torch.sigmoid_}
_REVERSE = {
    torch.relu: lambda gradient, y: _aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient),
    torch.sigmoid: lambda gradient, y: _aten.sigmoid_backward.grad_input(gradient, y, grad_input=gradient),
}
"""The gradient of y becomes that of what the activation made it of."""


def unmarked(part: str) -> None:
    pass


class TrainStep:
    """The steps of one model. Holds the modules, and nothing else from one step to the next."""

    def __init__(self, model: DLRM, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._bottom, top = _layers(model.bottom), _layers(model.top)
        self._top, (self._last, _) = top[:-1], top[-1]
        self._interaction = _Dot(model) if model.spec.pairs else _Cat(model)
        first_row = model.tables.first_row
        self._places = [1 + first_row.new_tensor(group.tables) for group in model.tables.groups]
        """Of each group, where its tables stand among the vectors."""

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, mark: Mark = unmarked) -> float:
        """The loss before the update."""
        tables = self._model.tables
        lookups = tables.lookups(inputs.indices, inputs.lengths)
        pooled = tables.pool(lookups)
        mark("embedding")
        bottom = _forward(self._bottom, inputs.dense, mark)
        interacting, output = self._interaction.forward([bottom[-1], *pooled])
        mark("interaction")
        top = _forward(self._top, output, mark)
        loss, gradient = self._loss(top[-1], inputs.label, mark)

        gradient = self._reverse_linear(self._last, top[-1], gradient, mark)
        gradient = self._reverse(self._top, top, gradient, mark)
        gradient_BFE = self._interaction.reverse(gradient, interacting)
        mark("interaction")
        self._reverse(self._bottom, bottom, gradient_BFE[:, 0].contiguous(), mark, to_input=False)
        gradient_FBE = gradient_BFE.transpose(0, 1)
        pooled_gradients = [gradient_FBE.index_select(0, places).flatten(0, 1) for places in self._places]
        self._optimizer.update_tables(lookups, pooled_gradients)
        mark("optimizer")
        return loss.item()

    def _loss(self, x: Tensor, label_B1: Tensor, mark: Mark) -> tuple[Tensor, Tensor]:
        """For what the last hidden layer made; and its gradient with respect to the logit."""
        logit_B1 = torch.addmm(self._last.bias, x, self._last.weight.t())
        mark("fc")
        probability_B1 = logit_B1.sigmoid()
        mark("activation")
        loss = self._model.spec.loss
        value, gradient_B1 = loss_and_gradient(loss, logit_B1, probability_B1, label_B1)
        mark("loss")
        if loss.kind != "bce_logits":
            _REVERSE[torch.sigmoid](gradient_B1, probability_B1)
            mark("activation")
        return value, gradient_B1

    def _reverse(self, layers: "_Layers", xs: Sequence[Tensor], gradient: Tensor, mark: Mark,
                 to_input: bool = True) -> Tensor | None:
        """From the gradient of the last of `xs`, which `_forward` made, that of the first, where it is wanted."""
        for number in reversed(range(len(layers))):
            linear, activation = layers[number]
            _REVERSE[activation](gradient, xs[number + 1])
            mark("activation")
            gradient = self._reverse_linear(linear, xs[number], gradient, mark, to_input or number > 0)
        return gradient

    def _reverse_linear(self, linear: nn.Linear, x: Tensor, gradient: Tensor, mark: Mark,
                        to_input: bool = True) -> Tensor | None:
        """Updates the layer, from the gradient [B, out] of what it made of x [B, in]; returned is that of x."""
        gradient_of_x = gradient.mm(linear.weight) if to_input else None
        gradients = gradient.t().mm(x), gradient.sum(0)
        mark("fc")
        self._optimizer.update((linear.weight, linear.bias), gradients)
        mark("optimizer")
        return gradient_of_x


class AutogradStep:
    """The same by autograd, from the pooled rows on, for modules that are compiled, tampered with, or have hooks."""

    def __init__(self, model: DLRM, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def __call__(self, inputs: Inputs, mark: Mark = unmarked) -> float:
        """Marks also what compiled graphs do, "compiled/forward" and "compiled/backward"."""
        tables = self._model.tables
        lookups = tables.lookups(inputs.indices, inputs.lengths)
        with torch.no_grad():
            pooled = [x.requires_grad_() for x in tables.pool(lookups)]
        mark("embedding")
        outputs = self._model.outputs(inputs.dense, pooled)
        mark("compiled/forward")
        loss = mean_loss(self._model.spec.loss, *outputs, inputs.label)
        mark("loss")
        gradients = torch.autograd.grad(loss, [*pooled, *self._optimizer.dense.values()])
        mark("compiled/backward")
        pooled_gradients = [torch.cat([gradients[number] for number in group.tables]) for group in tables.groups]
        self._optimizer.step(gradients[len(pooled):], lookups, pooled_gradients)
        mark("optimizer")
        return loss.item()


_Layers = Sequence[tuple[nn.Linear, Callable[[Tensor], Tensor]]]


def _layers(mlp: MLP) -> _Layers:
    return [(linear, activation) for linear, (_, activation) in zip(mlp, mlp.activations, strict=True)]


def _forward(layers: _Layers, x: Tensor, mark: Mark) -> list[Tensor]:
    """x, and what each layer makes of it."""
    xs = [x]
    for linear, activation in layers:
        z = torch.addmm(linear.bias, xs[-1], linear.weight.t())
        mark("fc")
        xs.append(_APPLY[activation](z))
        mark("activation")
    return xs


class _Dot:
    """`DotInteraction`, both ways."""

    def __init__(self, model: DLRM) -> None:
        spec, pairs_P = model.spec, model.interaction.pairs
        count = spec.interacting_vectors
        column_FF = torch.zeros(count, count, dtype=torch.int64, device=pairs_P.device)
        column_FF.view(-1)[pairs_P] = spec.embedding_dim + torch.arange(len(pairs_P), device=pairs_P.device)
        column_FF = torch.maximum(column_FF, column_FF.T)
        self._pairs, self._columns, self._width = pairs_P, column_FF.view(-1), spec.embedding_dim
        self._self_interaction = spec.interaction.self_interaction

    def forward(self, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The vectors [B, F, E], for `reverse`, and the output."""
        features_BFE = torch.stack(list(vectors), 1)
        products = features_BFE.bmm(features_BFE.transpose(1, 2)).flatten(1)
        return features_BFE, torch.cat([vectors[0], products.index_select(1, self._pairs)], 1)

    def reverse(self, gradient: Tensor, features_BFE: Tensor) -> Tensor:
        """Of the vectors [B, F, E]. The gradient of a product x y is shared by both: they are one symmetric matrix."""
        batch, count, width = features_BFE.shape
        both_BFF = gradient.index_select(1, self._columns).view(batch, count, count)
        diagonals = both_BFF.diagonal(dim1=1, dim2=2)
        diagonals.mul_(2) if self._self_interaction else diagonals.zero_()
        gradient_BFE = both_BFF.bmm(features_BFE)
        gradient_BFE[:, 0] += gradient[:, :width]
        return gradient_BFE


class _Cat:
    """`CatInteraction`, both ways."""

    def __init__(self, model: DLRM) -> None:
        self._shape = model.spec.interacting_vectors, model.spec.embedding_dim

    def forward(self, vectors: Sequence[Tensor]) -> tuple[None, Tensor]:
        return None, torch.cat(list(vectors), 1)

    def reverse(self, gradient: Tensor, interacting: None) -> Tensor:
        return gradient.view(-1, *self._shape)
