"""The losses in PyTorch: their values against float64 NumPy, and their gradients where autograd's own differ."""

import math

import numpy as np
import pytest
import torch

from dlrm_torch.loss import mean_loss
from spec.loss import FLOOR
from spec.model import Loss


def evaluate(loss, x, label, of_logit=False):
    """(loss, gradient [B]) in float32 for probabilities x, or logits."""
    leaf = torch.tensor(x, dtype=torch.float32).reshape(-1, 1).requires_grad_()
    label = torch.tensor(label, dtype=torch.float32).reshape(-1, 1)
    value = mean_loss(loss, leaf, torch.sigmoid(leaf) if of_logit else leaf, label)
    assert value.shape == () and value.dtype == torch.float32
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient.numpy()[:, 0]


@pytest.mark.parametrize("loss, value, gradient", [
    (Loss(kind="mse"), (0.25**2 + 0.125**2) / 2, [(0.25 - 0) * 2 / 2, (0.875 - 1) * 2 / 2]),
    (Loss(kind="bce"), -(math.log(0.75) + math.log(0.875)) / 2, [1 / 0.75 / 2, -1 / 0.875 / 2]),
    (Loss(kind="wbce", weights=(0.5, 3.0)), -(0.5 * math.log(0.75) + 3 * math.log(0.875)) / 2,
     [0.5 / 0.75 / 2, -3 / 0.875 / 2]),
    (Loss(kind="bce", clip=0.2), -(math.log(0.75) + math.log(0.8)) / 2, [1 / 0.75 / 2, 0]),
])
def test_value_and_gradient(loss, value, gradient):
    found, found_gradient = evaluate(loss, [0.25, 0.875], [0, 1])
    assert found == pytest.approx(value, rel=4 * 2**-24)
    np.testing.assert_allclose(found_gradient, gradient, rtol=4 * 2**-24)


@pytest.mark.parametrize("label", [0, 1])
def test_no_gradient_at_the_bounds_of_the_clip_nor_beyond(label):
    clip = np.float32(0.1)
    low, high = clip, np.float32(1) - clip
    inside = [np.nextafter(low, np.float32(1)), np.nextafter(high, np.float32(0))]
    outside = [low, high, np.nextafter(low, np.float32(0)), np.nextafter(high, np.float32(1)), 0.0, 1.0]
    for kind in (Loss(kind="bce", clip=0.1), Loss(kind="wbce", clip=0.1, weights=(2.0, 2.0))):
        assert (evaluate(kind, inside, [label] * 2)[1] != 0).all()
        assert (evaluate(kind, outside, [label] * 6)[1] == 0).all()


def test_the_logarithm_has_a_floor_and_a_finite_gradient():
    """Caffe2's LabelCrossEntropy: -log(max(p, 1e-20)), gradient -1 / max(p, 1e-20)."""
    value, gradient = evaluate(Loss(kind="bce"), [0.0, 1.0], [1, 0])
    assert value == pytest.approx(-math.log(1e-20), rel=1e-6)
    np.testing.assert_allclose(gradient, [-1 / FLOOR / 2, 1 / FLOOR / 2], rtol=1e-6)


@pytest.mark.parametrize("logit", [-80.0, -30.0, -17.0, -1.0, 0.0, 1.0, 17.0, 30.0, 80.0])
@pytest.mark.parametrize("label", [0.0, 0.25, 1.0])
def test_bce_logits_keeps_its_relative_accuracy_for_large_logits(logit, label):
    """In float64: label softplus(-z) + (1 - label) softplus(z), softplus(z) = log(1 + exp(z))."""
    expected = label * np.logaddexp(0, -logit) + (1 - label) * np.logaddexp(0, logit)
    sigmoid, other = 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(logit))
    value, gradient = evaluate(Loss(kind="bce_logits"), [logit], [label], of_logit=True)
    assert value == pytest.approx(expected, rel=8 * 2**-24, abs=0)
    scale = label * other + (1 - label) * sigmoid
    assert abs(gradient[0] - ((1 - label) * sigmoid - label * other)) <= 8 * 2**-24 * scale
