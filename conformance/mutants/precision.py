"""Faults of precision: right formulas in fewer digits. Arguments as in forward.py and backward.py."""

import numpy as np

from conformance.mutants import settings
from conformance.mutants.mutant import Mutant
from conformance.mutants.rounded import bfloat16, float16, float16_matmul, float16_sum, tf32
from spec.pooling import segment_sum


def _fast_sigmoid(y, z):
    """exp with an error of 2^-12, as of a table."""
    return 1 / (1 + np.exp(-z) * np.float32(1 + 2.0**-12))


def _one_element(y, *_):
    """The largest element of the middle row, by 2^-10 of itself."""
    wrong = y.copy()
    row = wrong.reshape(len(y), -1)[len(y) // 2]
    row[np.argmax(np.abs(row))] *= np.float32(1 + 2.0**-10)
    return wrong


def _float16_rows(y, weight, indices, lengths):
    return segment_sum(float16(weight)[indices], lengths)


def _expanded(y, p, label):
    """-log through the difference of two logarithms in float16."""
    return float16_sum(-np.log(np.where(label == 1, p, 1 - p)) / np.float32(len(p)))[0]


PRECISION = [
    Mutant("fc-tf32", "precision", "factors of one product are rounded to TF32", "top.0.preactivation",
           step=lambda y, x, w, b: tf32(x) @ tf32(w).T + b),
    Mutant("fc-bfloat16", "precision", "factors of one product are rounded to bfloat16", "bottom.1.preactivation",
           step=lambda y, x, w, b: bfloat16(x) @ bfloat16(w).T + b),
    Mutant("fc-float16-sum", "precision", "a product's running sum is held in float16", "top.0.preactivation",
           step=lambda y, x, w, b: float16_matmul(x, w.T) + b),
    Mutant("fc-bfloat16-output", "precision", "an activation is stored in bfloat16", "bottom.0.activation",
           step=lambda y, z: bfloat16(y)),
    Mutant("pool-float16-rows", "precision", "rows of a table are read from float16", "tables.0.pooled",
           setting=settings.RAGGED_SUM, step=_float16_rows),
    Mutant("pool-float16-sum", "precision", "pooled rows are stored in float16", "tables.1.pooled",
           setting=settings.RAGGED_MEAN, step=lambda y, *_: float16(y)),
    Mutant("interaction-tf32", "precision", "factors of the dot products are rounded to TF32", "interaction.products",
           setting=settings.interaction(kind="dot"), step=lambda y, z: tf32(z) @ tf32(z).transpose(0, 2, 1)),
    Mutant("interaction-bfloat16", "precision", "the stacked vectors are stored in bfloat16", "interaction.features",
           setting=settings.interaction(kind="dot"), step=lambda y, *_: bfloat16(y)),
    Mutant("sigmoid-fast", "precision", "exp is off by 2^-12", "probability", step=_fast_sigmoid),
    Mutant("loss-float16-mean", "precision", "the mean over the batch is summed in float16", "loss",
           setting=settings.loss(kind="bce"), step=_expanded),
    Mutant("grad-weight-tf32", "precision", "factors of a weight's gradient are rounded to TF32", "top.0.weight_grad",
           step=lambda y, x, dz: tf32(dz).T @ tf32(x)),
    Mutant("grad-weight-bfloat16", "precision", "a weight's gradient is sent in bfloat16", "bottom.1.weight_grad",
           step=lambda y, *_: bfloat16(y)),
    Mutant("grad-weight-float16-sum", "precision", "the sum over the batch is held in float16", "top.0.weight_grad",
           step=lambda y, x, dz: float16_matmul(dz.T, x)),
    Mutant("grad-bias-float16-sum", "precision", "the sum over the batch is held in float16", "top.0.bias_grad",
           step=lambda y, dz: float16_sum(dz)),
    Mutant("grad-input-tf32", "precision", "factors of an input's gradient are rounded to TF32",
           "bottom.0.activation_grad", step=lambda y, w, dz: tf32(dz) @ tf32(w)),
    Mutant("grad-features-bfloat16", "precision", "factors of the dot products' gradient are rounded to bfloat16",
           "interaction.features_grad", setting=settings.interaction(kind="dot"),
           step=lambda y, z, dp: bfloat16(dp + dp.transpose(0, 2, 1)) @ bfloat16(z)),
    Mutant("grad-rows-float16", "precision", "a sparse gradient is sent in float16", "tables.0.weight_grad_values",
           step=lambda y, *_: float16(y)),
    Mutant("one-activation", "precision", "one element, by 2^-10 of itself", "top.0.preactivation", step=_one_element),
    Mutant("one-product", "precision", "one element, by 2^-10 of itself", "interaction.products",
           setting=settings.interaction(kind="dot"), step=_one_element),
    Mutant("one-gradient", "precision", "one element of the largest gradient, by 2^-10 of itself", "top.0.weight_grad",
           step=_one_element),
]
