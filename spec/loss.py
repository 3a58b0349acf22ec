"""Reference forward and backward of the losses (SPEC.md, 6)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from spec import rounding
from spec.alike import alike
from spec.model import Loss
from spec.rounding import FLIP, FUNCTION, ROUND, UNDERFLOW, C, Tracked, U

FLOOR = float(np.float32(1e-20))
"""Least probability whose logarithm is taken (Caffe2's LabelCrossEntropy)."""


class LossResult(NamedTuple):
    """`loss` scalar; `dprobability` [B, 1], None for bce_logits; `dlogit` gives the gradient [B, 1] of the logit from
    the gradient of the probability; `kinks`: samples at a kink."""

    loss: Tracked
    dprobability: Tracked | None
    dlogit: Callable[[Tracked | None], Tracked]
    kinks: int


def evaluate(loss: Loss, logit: Tracked, probability: Tracked, label: np.ndarray,
             engine_probability: np.ndarray | None = None, replay: bool = False) -> LossResult:
    """Mean loss over the batch, and its gradients, for logit, probability and label [B, 1].

    `engine_probability` decides on which side of a clip's bound the engine is, where it may be on either. In a
    `replay` the probability is the engine's, and what follows from it does not follow from the logit.
    """
    if loss.kind == "bce_logits":
        return _bce_logits(logit, label)
    logit = None if replay else logit
    if loss.kind == "mse":
        return _mse(logit, probability, label)
    return _bce(loss, logit, probability, label, engine_probability)


def _mean(terms: Tracked) -> Tracked:
    batch = max(terms.value.size, 1)
    total = terms.value.sum()
    m = rounding.occurrences(terms.value)[:, None]
    variance = (m * terms.variance).sum() + rounding.summed(batch - 1, (terms.value**2).sum(), total)
    variance += rounding.drift(alike(terms.value), (terms.value**2).sum(), total).item()
    return Tracked(total / batch, variance / batch**2 + 2 * ROUND * (total / batch) ** 2 + UNDERFLOW**2)


def _mse(logit: Tracked | None, probability: Tracked, label: np.ndarray) -> LossResult:
    batch = len(label)
    difference = probability.value - label
    variance = probability.variance + ROUND * difference**2
    square = difference**2
    expanded = ROUND * (probability.value**2 + label**2) ** 2  # Caffe2's SquaredL2Distance sums x^2 - 2xy + y^2
    local = 2 * ROUND * square**2 + expanded + UNDERFLOW**2
    squares = Tracked(square, 4 * square * variance + C**2 * variance**2 + local)
    gradient = 2 * difference / batch
    dprobability = Tracked(gradient, (2 / batch) ** 2 * variance + 3 * ROUND * gradient**2)
    return LossResult(_mean(squares), dprobability, partial(rounding.sigmoid_gradient, logit, probability), 0)


def _bce_logits(logit: Tracked, label: np.ndarray) -> LossResult:
    z, batch = logit.value, len(label)
    linear = z * ((z > 0) - label)
    value = linear + np.log1p(np.exp(-np.abs(z)))
    sigmoid = rounding.sigmoid(logit)
    slope = sigmoid.value * (1 - label) - rounding.sigmoid_value(-z) * label  # sigmoid(z) - label, never cancelling
    # As it is written in SPEC.md: the rounding of 1 + exp(-|z|), up to u, is that of its logarithm.
    terms = Tracked(value, slope**2 * logit.variance + FUNCTION * (value**2 + linear**2) + ROUND)
    dlogit = Tracked(slope / batch, (sigmoid.variance + 3 * ROUND * slope**2) / batch**2)
    return LossResult(_mean(terms), None, lambda _: dlogit, 0)


def _bce(loss: Loss, logit: Tracked | None, probability: Tracked, label: np.ndarray,
         engine_probability: np.ndarray | None) -> LossResult:
    """-w log(max(q, FLOOR)) with q the probability of the sample's own class, after the clip.

    A saturated sample, whose q is within reach of 0, may be anything up to the floor's: there an engine that
    has rounded q to 0 gives a gradient of 0 where the true one is about w / B.
    """
    batch, positive = len(label), label == 1
    weight = np.ones_like(label) if loss.weights is None else np.where(
        positive, *(float(np.float32(w)) for w in reversed(loss.weights)))
    own = np.where(positive, probability.value, rounding.complement(logit, probability))
    variance = probability.variance + np.where(positive, 0, ROUND * own**2)
    inside, edge = np.ones_like(positive), np.zeros_like(positive)
    if loss.clip:
        low, high = float(np.float32(loss.clip)), 1 - float(np.float32(loss.clip))
        inside = (probability.value > low) & (probability.value < high)
        edge = rounding.near(probability, low) | rounding.near(probability, high)
        variance = np.where(inside | edge, variance, 0) + np.where(inside & ~edge, 0, (2 * U) ** 2)
        own = np.clip(own, low, high)
        if engine_probability is not None:
            among = (engine_probability > np.float32(low)) & (engine_probability < np.float32(high))
            inside = np.where(edge, among, inside)
    floored = np.maximum(own, FLOOR)
    saturated = own <= C * np.sqrt(variance)

    value = -weight * np.log(floored)
    deepest = -weight * np.log(FLOOR)
    terms = Tracked(value, np.where(saturated, deepest**2, (weight / floored) ** 2 * variance) + FUNCTION * value**2)

    sign = np.where(positive, -1.0, 1.0)
    unclipped = sign * weight / (batch * floored)
    gradient_variance = (unclipped / floored) ** 2 * variance + 4 * ROUND * unclipped**2
    gradient_variance = np.where(saturated, (weight / (batch * FLOOR)) ** 2, gradient_variance)
    flip = np.where(edge, FLIP * unclipped**2, 0) if engine_probability is None else 0
    dprobability = Tracked(np.where(inside, unclipped, 0), np.where(inside | edge, gradient_variance, 0) + flip)

    true = np.where(inside, sign * weight / batch * (1 - own), 0)

    def logit_gradient(dprobability: Tracked) -> Tracked:
        dlogit = rounding.sigmoid_gradient(logit, probability, dprobability)
        return Tracked(np.where(saturated, true, dlogit.value),
                       np.where(saturated, (weight / batch) ** 2, dlogit.variance))

    return LossResult(_mean(terms), dprobability, logit_gradient, int((saturated | edge).sum()))
