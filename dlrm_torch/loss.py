"""The losses, each a mean over the batch, with the gradient that the spec wants."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spec.loss import FLOOR
from spec.model import Loss


def mean_loss(loss: Loss, logit_B1: Tensor, probability_B1: Tensor, label_B1: Tensor) -> Tensor:
    """The loss, shape (), for autograd."""
    return _MeanLoss.apply(loss, logit_B1, probability_B1, label_B1)


def loss_and_gradient(loss: Loss, logit_B1: Tensor, probability_B1: Tensor, label_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, shape (), and its gradient [B, 1]: by the logit for `bce_logits`, otherwise by the probability."""
    if loss.kind == "mse":
        difference_B1 = probability_B1 - label_B1
        terms_B1, gradient_B1 = difference_B1.square(), difference_B1.mul_(2)
    elif loss.kind == "bce_logits":
        # No term is negative, so nothing cancels; binary_cross_entropy_with_logits subtracts two numbers as
        # large as the logit, and loses a small loss altogether.
        negative_B1 = 1 - label_B1
        terms_B1 = label_B1 * F.softplus(-logit_B1) + negative_B1 * F.softplus(logit_B1)
        gradient_B1 = negative_B1 * torch.sigmoid(logit_B1) - label_B1 * torch.sigmoid(-logit_B1)
    else:
        terms_B1, gradient_B1 = _cross_entropy(loss, probability_B1, label_B1)
    return terms_B1.mean(), gradient_B1.div_(len(label_B1))


def _cross_entropy(loss: Loss, p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """-w log(max(q, FLOOR)) for q the probability of the sample's own class, w that class's weight; labels are 0 or 1.

    By q its gradient is -w / max(q, FLOOR), below the floor too (Caffe2's LabelCrossEntropyGradient), but 0 where p is
    clipped, and at the bounds themselves (ClipGradient).
    """
    positive = label == 1
    low, high, *class_weights = clip_and_weights(loss)
    if loss.clip:
        inside = (p > low) & (p < high)
        p = p.clamp(low, high)
    floored = torch.where(positive, p, 1 - p).clamp_(min=FLOOR)
    terms, inverse = floored.log().neg_(), floored.reciprocal_()
    gradient = torch.where(positive, -inverse, inverse)
    if loss.weights is not None:
        negative_weight, positive_weight = map(terms.new_tensor, class_weights)
        weights = torch.where(positive, positive_weight, negative_weight)
        terms, gradient = terms * weights, gradient * weights
    return terms, gradient * inside if loss.clip else gradient


def clip_and_weights(loss: Loss) -> tuple[float, float, float, float]:
    """Of a cross-entropy, as float32: the least and the greatest probability, the weights of the classes 0 and 1."""
    low = float(np.float32(loss.clip)) if loss.clip else -math.inf
    high = 1 - low
    negative, positive = (float(np.float32(weight)) for weight in loss.weights or (1, 1))
    return low, high, negative, positive


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Loss, logit_B1: Tensor, probability_B1: Tensor, label_B1: Tensor) -> Tensor:
        value, gradient_B1 = loss_and_gradient(loss, logit_B1, probability_B1, label_B1)
        ctx.save_for_backward(gradient_B1)
        ctx.by_logit = loss.kind == "bce_logits"
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_B1,) = ctx.saved_tensors
        gradient_B1 = gradient_B1 * gradient
        return (None, gradient_B1, None, None) if ctx.by_logit else (None, None, gradient_B1, None)
