"""Faults of the backward pass. Arguments of a step: its right output, then what it reads (`spec.graph`)."""

import math

import numpy as np

from conformance.mutants import settings
from conformance.mutants.mutant import Mutant
from spec.pooling import coalesce


def _wrong_side(y, z, dy):
    return dy * (z <= 0)


def _at_zero(y, z, dy):
    return dy * (z >= 0)


def _with_clip_ignored(y, p, label):
    return np.where(label == 1, -1 / p, 1 / (1 - p)) / len(label)


def _passed_at_the_bound(y, p, label):
    low = np.float32(0.25)
    return np.where((p == low) | (p == 1 - low), _with_clip_ignored(y, p, label), y)


def _one_sided(y, features, dproducts):
    return dproducts @ features


def _whole(values, rows, wanted):
    """A slice with other sums, `wanted` for each distinct row; the first of repeated rows gets all of it."""
    out = np.zeros_like(values)
    _, first = np.unique(rows, return_index=True)
    out[first] = wanted
    return out


def _last_wins(y, dpooled, indices, lengths, rows):
    """The gradient of the last bag that names a row, in place of the sum."""
    bags = np.repeat(np.arange(len(lengths)), lengths)
    distinct = np.unique(indices)
    last = np.zeros(len(distinct), np.int64)
    last[np.searchsorted(distinct, indices)] = bags
    return _whole(y, rows, dpooled[last])


def _duplicates_doubled(y, dpooled, indices, lengths, rows):
    count = np.unique(indices, return_counts=True)[1]
    _, sums = coalesce(rows, y)
    return _whole(y, rows, sums * np.where(count > 1, 2, 1)[:, None])


def _one_duplicate_lost(y, dpooled, indices, lengths, rows):
    """Two threads write one row: of the row that occurs most often, one occurrence is lost."""
    bags = np.repeat(np.arange(len(lengths)), lengths)
    distinct, count = np.unique(indices, return_counts=True)
    row = int(np.argmax(count))
    _, sums = coalesce(rows, y)
    sums[row] -= dpooled[bags[np.flatnonzero(indices == distinct[row])[-1]]]
    return _whole(y, rows, sums)


def _without_mean(y, dpooled, indices, lengths, rows):
    bags = np.repeat(np.arange(len(lengths)), lengths)
    distinct = np.unique(indices)
    sums = np.zeros((len(distinct), dpooled.shape[1]), np.float32)
    np.add.at(sums, np.searchsorted(distinct, indices), dpooled[bags])
    return _whole(y, rows, sums)


def _without_weights(y, dpooled, pooling, indices, lengths, rows):
    return y / pooling[rows][:, None]


def dead_units(parameters):
    """The first unit of every layer but the last has no weights and no bias: its preactivation is exactly 0."""
    changed = {name: array.copy() for name, array in parameters.items()}
    for name, array in changed.items():
        mlp, _, part = name.partition(".")
        if mlp in ("bottom", "top") and part.endswith((".weight", ".bias")) and len(array) > 1:
            array[0] = 0
    return changed


def constant_probability(parameters):
    """Every sample gets the probability 1/4, exactly the bound of a clip."""
    changed = {name: array.copy() for name, array in parameters.items()}
    last = max(int(name.split(".")[1]) for name in changed if name.startswith("top."))
    changed[f"top.{last}.weight"][:] = 0
    changed[f"top.{last}.bias"][:] = math.log(1 / 3)
    return changed


BACKWARD = [
    Mutant("grad-missing-mean", "backward", "1 / B is missing", "probability_grad", setting=settings.loss(kind="bce"),
           step=lambda y, p, label: y * len(label)),
    Mutant("grad-logits-missing-mean", "backward", "1 / B is missing", "top.{top}.preactivation_grad",
           setting=settings.LOGITS, step=lambda y, z, label: y * len(label)),
    Mutant("grad-half", "backward", "p - y in place of 2 (p - y)", "probability_grad", setting=settings.MSE,
           step=lambda y, p, label: y / 2),
    Mutant("grad-sigmoid-half", "backward", "dy y in place of dy y (1 - y)", "top.{top}.preactivation_grad",
           setting=settings.loss(kind="bce"), step=lambda y, p, dp: dp * p),
    Mutant("grad-clip-ignored", "backward", "the clip has gradient 1 everywhere", "probability_grad",
           setting=settings.CLIP, step=_with_clip_ignored),
    Mutant("grad-clip-at-bound", "backward", "the clip has gradient 1 at its bounds, as torch.clamp has",
           "probability_grad", setting=settings.loss(kind="bce", clip=0.25), corner=constant_probability,
           step=_passed_at_the_bound),
    Mutant("grad-weight-sign", "backward", "the gradient of one weight is negated", "top.0.weight_grad",
           step=lambda y, x, dz: -y),
    Mutant("grad-weight-transposed", "backward", "dz^T x written in the memory order of its transpose",
           "top.0.weight_grad", step=lambda y, x, dz: y.T.reshape(y.shape)),
    Mutant("grad-weight-overwrites", "backward", "accumulation overwrites: only the last half of the batch is left",
           "top.0.weight_grad", step=lambda y, x, dz: dz[len(dz) // 2:].T @ x[len(x) // 2:]),
    Mutant("grad-weight-wrong-input", "backward", "the samples of x are one off those of dz", "bottom.1.weight_grad",
           step=lambda y, x, dz: dz.T @ np.roll(x, 1, 0)),
    Mutant("grad-bias-lost", "backward", "a bias gradient stays 0", "bottom.0.bias_grad", step=lambda y, dz: 0 * y),
    Mutant("grad-bias-mean", "backward", "mean over the batch in place of the sum", "top.0.bias_grad",
           step=lambda y, dz: dz.mean(0)),
    Mutant("grad-bias-last-sample", "backward", "the sum leaves the last sample out", "bottom.1.bias_grad",
           step=lambda y, dz: dz[:-1].sum(0)),
    Mutant("grad-input-transposed", "backward", "dz times W in the memory order of its transpose",
           "interaction.output_grad", step=lambda y, w, dz: dz @ w.T.reshape(w.shape)),
    Mutant("grad-relu-wrong-side", "backward", "the mask of ReLU is of the wrong side", "bottom.0.preactivation_grad",
           step=_wrong_side),
    Mutant("grad-relu-no-mask", "backward", "ReLU hands every gradient on", "top.0.preactivation_grad",
           step=lambda y, z, dy: dy),
    Mutant("grad-relu-at-zero", "backward", "ReLU has gradient 1 at 0", "top.0.preactivation_grad", corner=dead_units,
           step=_at_zero),
    Mutant("grad-relu-from-gradient", "backward", "ReLU's mask is that of dy", "top.0.preactivation_grad",
           step=lambda y, z, dy: dy * (dy > 0)),
    Mutant("grad-products-one-sided", "backward", "dP Z without dP^T Z", "interaction.features_grad",
           setting=settings.interaction(kind="dot"), step=_one_sided),
    Mutant("grad-products-symmetric", "backward", "the gradient of a pair at (j, i) too", "interaction.products_grad",
           setting=settings.interaction(kind="dot"), step=lambda y, *_: y + y.transpose(0, 2, 1)),
    Mutant("grad-self-pair-once", "backward", "d(v.v) = v in place of 2 v", "interaction.features_grad",
           setting=settings.SELF,
           step=lambda y, z, dp: y - dp * np.eye(dp.shape[1], dtype=np.float32) @ z),
    Mutant("grad-dense-vector-lost", "backward", "the dense vector's own part of the output's gradient is lost",
           "bottom.{last}.activation_grad", setting=settings.interaction(kind="dot"),
           step=lambda y, doutput, dfeatures: dfeatures[:, 0]),
    Mutant("grad-dense-products-lost", "backward", "the dense vector's part through the products is overwritten",
           "bottom.{last}.activation_grad", setting=settings.interaction(kind="dot"),
           step=lambda y, doutput, dfeatures: doutput[:, :y.shape[1]]),
    Mutant("grad-exchanged-tables", "backward", "a table gets the gradient of the next", "tables.0.pooled_grad",
           setting=settings.interaction(kind="dot"), step=lambda y, dfeatures: dfeatures[:, 2]),
    Mutant("grad-cat-dense", "backward", "the dense vector gets the gradient of table 0",
           "bottom.{last}.activation_grad", setting=settings.CAT,
           step=lambda y, doutput: doutput[:, y.shape[1]:2 * y.shape[1]]),
    Mutant("grad-duplicates-overwritten", "backward", "of a repeated row the last gradient counts",
           "tables.0.weight_grad_values", setting=settings.RAGGED_SUM, step=_last_wins),
    Mutant("grad-duplicates-doubled", "backward", "a repeated row's gradient counts twice",
           "tables.0.weight_grad_values", setting=settings.RAGGED_SUM, step=_duplicates_doubled),
    Mutant("grad-duplicate-lost", "backward", "a race: one occurrence of one row is lost",
           "tables.0.weight_grad_values", setting=settings.RAGGED_SUM, step=_one_duplicate_lost),
    Mutant("grad-mean-lost", "backward", "the rows of a mean get the gradient of a sum", "tables.1.weight_grad_values",
           setting=settings.RAGGED_MEAN, step=_without_mean),
    Mutant("grad-weights-lost", "backward", "the rows of a weighted sum get the gradient of a plain one",
           "tables.2.weight_grad_values", setting=settings.FIXED_WEIGHTS, step=_without_weights),
    Mutant("grad-pooling-lost", "backward", "a learned row weight gets no gradient", "tables.2.pooling_grad_values",
           setting=settings.LEARNED_WEIGHTS, step=lambda y, *_: 0 * y),
]
