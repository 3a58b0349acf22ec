"""A training step with its backward pass written out: what autograd computes for the modules, without its records.

What is no longer needed is overwritten, and an MLP's weight takes its step as soon as the gradient has passed it. The
gradients of `engine.trace` are autograd's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlrm_torch.compiled import kernels_for
from dlrm_torch.inputs import Inputs
from dlrm_torch.loss import clip_and_weights, loss_and_gradient, mean_loss
from dlrm_torch.model import DLRM, MLP, pair_columns
from dlrm_torch.optimizer import Optimizer

Mark = Callable[[str], None]
"""Told, after each piece of work, which of `spec.backend.PARTS` it was for."""

_aten = torch.ops.aten


def _reverse_relu(gradient: Tensor, y: Tensor) -> Tensor:
    """The gradient of y becomes that of what the activation made it of. Returns its sum over the samples."""
    kernels = kernels_for(gradient)
    if kernels is not None:
        return kernels.reverse_relu(gradient, y)
    _aten.threshold_backward.grad_input(gradient, y, 0, grad_input=gradient)
    return gradient.sum(0)


def _reverse_sigmoid(gradient: Tensor, y: Tensor) -> Tensor:
    _aten.sigmoid_backward.grad_input(gradient, y, grad_input=gradient)
    return gradient.sum(0)


_IN_PLACE = {torch.relu: (torch.relu_, _reverse_relu), torch.sigmoid: (torch.sigmoid_, _reverse_sigmoid)}


def unmarked(part: str) -> None:
    pass


class TrainStep:
    """The steps of one model. Holds the modules, and nothing else from one step to the next."""

    def __init__(self, model: DLRM, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._bottom, top = _layers(model.bottom), _layers(model.top)
        self._top, self._last = top[:-1], top[-1]
        self._interaction = _Dot(model) if model.spec.pairs else _Cat(model)
        self._counts = [len(group.tables) for group in model.tables.groups]

    @torch.inference_mode()
    def __call__(self, inputs: Inputs, mark: Mark = unmarked) -> float:
        """The loss before the update."""
        tables = self._model.tables
        pooled = [tables.pooled(*of_group) for of_group in zip(tables.groups, inputs.lookups, strict=True)]
        mark("embedding")
        bottom = _forward(self._bottom, inputs.dense, mark)
        features_BFE = torch.cat([bottom[-1][:, None], *pooled], 1)
        output = self._interaction.forward(features_BFE)
        mark("interaction")
        top = _forward(self._top, output, mark)
        loss, gradient = self._loss(top[-1], inputs.label, mark)

        first = self._model.top[0].padded()
        gradient = self._reverse_linear(self._last, top[-1], gradient, gradient.sum(0),
                                        self._last.weight if self._top else first, mark)
        gradient = self._reverse(self._top, top, gradient, first, mark)
        gradient_BFE = self._interaction.reverse(gradient, features_BFE)
        mark("interaction")
        bottom_gradient_B1E, *gradients = gradient_BFE.split([1, *self._counts], 1)
        self._reverse(self._bottom, bottom, bottom_gradient_B1E.flatten(1), None, mark)
        self._optimizer.update_tables(inputs.lookups, gradients)
        mark("optimizer")
        return loss

    def _loss(self, x: Tensor, label_B1: Tensor, mark: Mark) -> tuple[float, Tensor]:
        """For what the last hidden layer made; and its gradient with respect to the logit."""
        logit_B1 = torch.addmm(self._last.bias, x, self._last.weight.t())
        mark("fc")
        probability_B1 = logit_B1.sigmoid()
        mark("activation")
        loss, kernels = self._model.spec.loss, kernels_for(probability_B1)
        if kernels is not None and loss.kind in ("bce", "wbce"):
            made = kernels.cross_entropy(probability_B1, label_B1, *clip_and_weights(loss))
            mark("loss")
            return made
        value, gradient_B1 = loss_and_gradient(loss, logit_B1, probability_B1, label_B1)
        mark("loss")
        if loss.kind != "bce_logits":
            _reverse_sigmoid(gradient_B1, probability_B1)
            mark("activation")
        return value.item(), gradient_B1

    def _reverse(self, layers: Sequence["_Layer"], xs: Sequence[Tensor], gradient: Tensor, first: Tensor | None,
                 mark: Mark) -> Tensor | None:
        """From the gradient of the last of `xs`, which `_forward` made, that of the first.

        `first` is the weight of the first layer, or None where nobody wants to know.
        """
        for number in reversed(range(len(layers))):
            layer = layers[number]
            sums = layer.reverse(gradient, xs[number + 1])
            mark("activation")
            gradient = self._reverse_linear(layer, xs[number], gradient, sums, layer.weight if number else first, mark)
        return gradient

    def _reverse_linear(self, layer: "_Layer", x: Tensor, gradient: Tensor, sums: Tensor, to_x: Tensor | None,
                        mark: Mark) -> Tensor | None:
        """Updates the layer, from the gradient [B, out] of what it made of x [B, in], and its sums over the samples.

        Returned is the gradient of x, where it is wanted: the product with `to_x` [out, in].
        """
        weight, bias, _, _ = layer
        gradient_of_x = None if to_x is None else gradient.mm(to_x)
        if self._optimizer.adds_product(weight, len(x)):
            weight.t().addmm_(x.t(), gradient, alpha=-self._optimizer.rate)
            updates = (bias,), (sums,)
        else:
            updates = (weight, bias), (x.t().mm(gradient).t(), sums)
        mark("fc")
        self._optimizer.update(*updates)
        mark("optimizer")
        return gradient_of_x


class AutogradStep:
    """The same by autograd, from the pooled rows on, for modules that are compiled, tampered with, or have hooks."""

    def __init__(self, model: DLRM, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def __call__(self, inputs: Inputs, mark: Mark = unmarked) -> float:
        """Marks also what compiled graphs do, "compiled/forward" and "compiled/backward"."""
        tables = self._model.tables
        with torch.no_grad():
            pooled = [x.requires_grad_() for x in tables.pool(inputs.lookups)]
        mark("embedding")
        outputs = self._model.outputs(inputs.dense, pooled)
        mark("compiled/forward")
        loss = mean_loss(self._model.spec.loss, *outputs, inputs.label)
        mark("loss")
        gradients = torch.autograd.grad(loss, [*pooled, *self._optimizer.dense.values()])
        mark("compiled/backward")
        pooled_gradients = [torch.stack([gradients[number] for number in group.tables], 1) for group in tables.groups]
        self._optimizer.step(gradients[len(pooled):], inputs.lookups, pooled_gradients)
        mark("optimizer")
        return loss.item()


class _Layer(NamedTuple):
    """Looked up once: a module takes as long to find a parameter as to multiply small matrices."""

    weight: nn.Parameter
    bias: nn.Parameter
    apply: Callable[[Tensor], Tensor]
    reverse: Callable[[Tensor, Tensor], Tensor]


def _layers(mlp: MLP) -> list[_Layer]:
    return [_Layer(linear.weight, linear.bias, *_IN_PLACE[activation])
            for linear, (_, activation) in zip(mlp, mlp.activations, strict=True)]


def _forward(layers: Sequence[_Layer], x: Tensor, mark: Mark) -> list[Tensor]:
    """x, and what each layer makes of it."""
    xs = [x]
    for weight, bias, apply, _ in layers:
        x = torch.addmm(bias, x, weight.t())
        mark("fc")
        xs.append(apply(x))
        mark("activation")
    return xs


def _places(model: DLRM) -> list[int]:
    """Where each vector of the spec stands among those of a step: the dense one, then the tables group by group."""
    vectors = [0, *(1 + number for group in model.tables.groups for number in group.tables)]
    return [vectors.index(vector) for vector in range(len(vectors))]


class _Dot:
    """`DotInteraction`, both ways."""

    def __init__(self, model: DLRM) -> None:
        spec, places = model.spec, torch.tensor(_places(model))
        pairs_P2 = places[torch.tensor(spec.pairs)]
        device = model.interaction.pairs.device
        self._pairs = (pairs_P2[:, 0] * len(places) + pairs_P2[:, 1]).to(device)
        self._columns_FF = pair_columns(pairs_P2, len(places), spec.embedding_dim).to(device)
        self._width, self._self_interaction = spec.embedding_dim, spec.interaction.self_interaction

    def forward(self, features_BFE: Tensor) -> Tensor:
        """Of the vectors of a step."""
        kernels = kernels_for(features_BFE)
        if kernels is not None:
            return kernels.dot_products(features_BFE, self._columns_FF, self._width + len(self._pairs))
        products = features_BFE.bmm(features_BFE.transpose(1, 2)).flatten(1)
        return torch.cat([features_BFE[:, 0], products.index_select(1, self._pairs)], 1)

    def reverse(self, gradient: Tensor, features_BFE: Tensor) -> Tensor:
        """Of the vectors [B, F, E]; the gradient may have more columns than the output.

        The gradient of a product x y is shared by both: they are one symmetric matrix.
        """
        kernels = kernels_for(features_BFE)
        if kernels is not None:
            return kernels.dot_gradient(gradient, features_BFE, self._columns_FF)
        batch, count, width = features_BFE.shape
        both_BFF = gradient.index_select(1, self._columns_FF.flatten()).view(batch, count, count)
        diagonals = both_BFF.diagonal(dim1=1, dim2=2)
        diagonals.mul_(2) if self._self_interaction else diagonals.zero_()
        gradient_BFE = both_BFF.bmm(features_BFE)
        gradient_BFE[:, 0] += gradient[:, :width]
        return gradient_BFE


class _Cat:
    """`CatInteraction`, both ways."""

    def __init__(self, model: DLRM) -> None:
        places = _places(model)
        self._places = torch.tensor(places, device=model.tables.first_row.device)
        self._vectors = self._places.argsort()
        self._in_order = places == sorted(places)

    def forward(self, features_BFE: Tensor) -> Tensor:
        return (features_BFE if self._in_order else features_BFE.index_select(1, self._places)).flatten(1)

    def reverse(self, gradient: Tensor, features_BFE: Tensor) -> Tensor:
        gradient_BFE = gradient[:, :features_BFE[0].numel()].view(features_BFE.shape)
        return gradient_BFE if self._in_order else gradient_BFE.index_select(1, self._vectors)
