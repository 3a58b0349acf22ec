"""Faults of the forward pass. Arguments of a step: its right output, then what it reads (`spec.graph`)."""

import numpy as np

from conformance.case import Case
from conformance.mutants import settings
from conformance.mutants.mutant import Mutant
from spec.pooling import segment_sum

_FC = "top.0.preactivation"


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _bags(lengths: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


def _transposed(y, x, w, b):
    return x @ w.reshape(w.shape[::-1]) + b


def _lost_input(y, x, w, b):
    return x[:, :-1] @ w[:, :-1].T + b


def _last_row_stale(y, *_):
    return np.concatenate([y[:-1], y[-2:-1]])


def _empty_bag(y, weight, indices, lengths):
    return np.where(lengths[:, None] == 0, weight[0], y)


def _longest(y, weight, indices, lengths):
    n = np.maximum(lengths, 1)[:, None]
    return y * n / n.max()


def _shifted_bags(y, weight, indices, lengths):
    moved = lengths.copy()
    donor = int(np.flatnonzero(lengths[1:])[0]) + 1
    moved[0] += 1
    moved[donor] -= 1
    return segment_sum(weight[indices], moved)


def _duplicates_once(y, weight, indices, lengths):
    pairs = np.unique(np.stack([_bags(lengths), indices]), axis=1)
    out = np.zeros_like(y)
    np.add.at(out, pairs[0], weight[pairs[1]])
    return out


def _by_position(y, weight, pooling, indices, lengths):
    place = np.arange(len(indices)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return segment_sum(weight[indices] * pooling[place % len(pooling)][:, None], lengths)


def _without_weights(y, weight, pooling, indices, lengths):
    return segment_sum(weight[indices], lengths)


def _exchanged(y, *vectors):
    return np.stack([vectors[0], vectors[2], vectors[1], *vectors[3:]], 1)


def _next_sample(y, z):
    return z @ np.roll(z, -1, 0).transpose(0, 2, 1)


def _swapped_pairs(y, bottom, products):
    e = bottom.shape[1]
    return np.concatenate([y[:, :e], y[:, e + 1:e + 2], y[:, e:e + 1], y[:, e + 2:]], 1)


def _upper_triangle(y, bottom, products):
    first, second = np.triu_indices(products.shape[1], 1)
    return np.concatenate([bottom, products[:, first, second]], 1)


def _one_row_a_bag(case: Case) -> str:
    ones = all((batch.lengths[0] == 1).all() for batch in case.batches)
    return "every bag of the table holds one row, whose mean is its sum" if ones else ""


def _few_vectors(case: Case) -> str:
    return ("with two interacting vectors there is one pair, which is in one order"
            if case.spec.interacting_vectors == 2 else "")


FORWARD = [
    Mutant("fc-transposed-weight", "forward", "W read in the memory order of its transpose", _FC, step=_transposed),
    Mutant("fc-lost-bias", "forward", "the bias is left out", _FC, step=lambda y, x, w, b: x @ w.T),
    Mutant("fc-double-bias", "forward", "the bias is added twice", "bottom.0.preactivation",
           step=lambda y, x, w, b: y + b),
    Mutant("fc-shifted-bias", "forward", "each output gets its neighbour's bias", "bottom.1.preactivation",
           step=lambda y, x, w, b: x @ w.T + np.roll(b, 1)),
    Mutant("fc-short-loop", "forward", "the sum ends one input early", _FC, step=_lost_input),
    Mutant("fc-stale-tail", "forward", "the last sample of the batch gets the result of the one before", _FC,
           step=_last_row_stale),
    Mutant("relu-absent", "forward", "no activation function", "bottom.0.activation", step=lambda y, z: z),
    Mutant("relu-leaky", "forward", "a slope of 0.01 below zero", "bottom.0.activation",
           step=lambda y, z: np.maximum(z, np.float32(0.01) * z)),
    Mutant("relu-absolute", "forward", "|z| in place of max(z, 0)", "top.0.activation", step=lambda y, z: np.abs(z)),
    Mutant("sigmoid-hard", "forward", "0.5 + z / 4 within [0, 1]", "probability",
           step=lambda y, z: np.clip(0.5 + z / 4, 0, 1)),
    Mutant("sigmoid-sign", "forward", "1 / (1 + exp(z)): the other class", "probability",
           step=lambda y, z: _sigmoid(-z)),
    Mutant("pool-mean-for-sum", "forward", "mean over a bag in place of its sum, on one-hot lookups",
           "tables.0.pooled", setting=settings.table(0, pooling="sum", lookups=1),
           step=lambda y, weight, indices, lengths: y / np.maximum(lengths, 1)[:, None], equivalent=_one_row_a_bag),
    Mutant("pool-mean-for-ragged-sum", "forward", "mean over a bag in place of its sum", "tables.0.pooled",
           setting=settings.RAGGED_SUM,
           step=lambda y, weight, indices, lengths: y / np.maximum(lengths, 1)[:, None], equivalent=_one_row_a_bag),
    Mutant("pool-sum-for-mean", "forward", "sum over a bag in place of its mean", "tables.1.pooled",
           setting=settings.RAGGED_MEAN,
           step=lambda y, weight, indices, lengths: segment_sum(weight[indices], lengths)),
    Mutant("pool-mean-by-longest", "forward", "mean over the longest bag's length", "tables.0.pooled",
           setting=settings.RAGGED_SUM, step=_longest),
    Mutant("pool-empty-bag", "forward", "an empty bag pools to row 0", "tables.0.pooled", setting=settings.RAGGED_SUM,
           step=_empty_bag),
    Mutant("pool-next-row", "forward", "every index is one too high", "tables.0.pooled", setting=settings.RAGGED_SUM,
           step=lambda y, weight, indices, lengths: segment_sum(weight[(indices + 1) % len(weight)], lengths)),
    Mutant("pool-shifted-offset", "forward", "one bag starts a row late, and another has that row", "tables.0.pooled",
           setting=settings.RAGGED_SUM, step=_shifted_bags),
    Mutant("pool-duplicates-once", "forward", "a row that stands twice in a bag counts once", "tables.0.pooled",
           setting=settings.RAGGED_SUM, step=_duplicates_once),
    Mutant("pool-weights-by-position", "forward", "weights belong to places in the bag, not to rows",
           "tables.2.pooled", setting=settings.FIXED_WEIGHTS, step=_by_position),
    Mutant("pool-weights-ignored", "forward", "rows are summed without their weights", "tables.2.pooled",
           setting=settings.LEARNED_WEIGHTS, step=_without_weights),
    Mutant("interaction-exchanged-tables", "forward", "tables 0 and 1 change places", "interaction.features",
           setting=settings.interaction(kind="dot"), step=_exchanged),
    Mutant("interaction-next-sample", "forward", "products with the vectors of the next sample",
           "interaction.products", setting=settings.interaction(kind="dot"), step=_next_sample),
    Mutant("interaction-swapped-pairs", "forward", "the first two pairs change places", "interaction.output",
           setting=settings.interaction(kind="dot"), step=_swapped_pairs, equivalent=_few_vectors),
    Mutant("interaction-upper-triangle", "forward", "pairs of the upper triangle, row by row", "interaction.output",
           setting=settings.interaction(kind="dot"), step=_upper_triangle, equivalent=_few_vectors),
    Mutant("interaction-self-for-none", "forward", "the diagonal of the products is doubled", "interaction.products",
           setting=settings.SELF, step=lambda y, z: y * (1 + np.eye(y.shape[1], dtype=np.float32))),
    Mutant("interaction-cat-order", "forward", "the dense vector comes last", "interaction.output",
           setting=settings.CAT, step=lambda y, *vectors: np.concatenate([*vectors[1:], vectors[0]], 1)),
    Mutant("loss-sum", "forward", "sum over the batch in place of the mean", "loss",
           step=lambda y, p, label: y * len(label)),
    Mutant("loss-half-square", "forward", "half the square, as Caffe2's operator has it", "loss",
           setting=settings.MSE, step=lambda y, p, label: y / 2),
    Mutant("loss-last-sample", "forward", "the mean leaves the last sample out", "loss", setting=settings.MSE,
           step=lambda y, p, label: np.mean(np.square(p - label)[:-1])),
    Mutant("loss-swapped-weights", "forward", "the weights of the two classes change places",
           named=("loss", "probability_grad"), setting=settings.WEIGHTED,
           spec=settings.loss(kind="wbce", weights=[3.0, 0.5])),
    Mutant("loss-normalised-weights", "forward", "divided by the sum of the weights in place of B", "loss",
           setting=settings.WEIGHTED,
           step=lambda y, p, label: y * len(label) / np.where(label == 1, 3.0, 0.5).sum()),
    Mutant("loss-unclipped", "forward", "the probability is not clipped", named=("loss", "probability_grad"),
           setting=settings.CLIP, spec=settings.loss(kind="bce")),
]
