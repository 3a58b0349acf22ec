"""The losses, each a mean over the batch, differentiable as the spec wants it."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spec.loss import FLOOR
from spec.model import Loss


def mean_loss(loss: Loss, logit_B1: Tensor, probability_B1: Tensor, label_B1: Tensor) -> Tensor:
    """The loss, shape ()."""
    if loss.kind == "mse":
        terms_B1 = (probability_B1 - label_B1) ** 2
    elif loss.kind == "bce_logits":
        # No term is negative, so nothing cancels; binary_cross_entropy_with_logits subtracts two numbers as
        # large as the logit, and loses a small loss altogether.
        terms_B1 = label_B1 * F.softplus(-logit_B1) + (1 - label_B1) * F.softplus(logit_B1)
    else:
        terms_B1 = _cross_entropy(loss, probability_B1, label_B1)
    return terms_B1.mean()


def _cross_entropy(loss: Loss, p: Tensor, label: Tensor) -> Tensor:
    """-w log(q) for q the probability of the sample's own class, w that class's weight; labels are 0 or 1."""
    positive = label == 1
    if loss.clip:
        low = float(np.float32(loss.clip))
        high = 1 - low
        # torch.clamp passes the gradient at the bounds; the spec wants none (Caffe2's ClipGradient).
        p = torch.where((p > low) & (p < high), p, p.detach().clamp(low, high))
    terms = -_FlooredLog.apply(torch.where(positive, p, 1 - p))
    if loss.weights is not None:
        negative_weight, positive_weight = (terms.new_tensor(np.float32(weight)) for weight in loss.weights)
        terms = torch.where(positive, positive_weight, negative_weight) * terms
    return terms


class _FlooredLog(torch.autograd.Function):
    """log(max(q, FLOOR)), with the gradient 1 / max(q, FLOOR) everywhere (LabelCrossEntropyGradient)."""

    @staticmethod
    def forward(ctx, q: Tensor) -> Tensor:
        floored = q.clamp(min=FLOOR)
        ctx.save_for_backward(floored)
        return floored.log()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (floored,) = ctx.saved_tensors
        return gradient / floored
