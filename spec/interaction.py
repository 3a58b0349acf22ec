"""Reference forward and backward of the feature interaction (SPEC.md, 3)."""

import numpy as np

from spec import rounding
from spec.model import ModelSpec
from spec.rounding import Tap, Tracked


def forward(spec: ModelSpec, vectors: list[Tracked], tap: Tap) -> Tracked:
    """The output, from the dense vector and the pooled vectors, F of [B, E]."""
    if spec.interaction.kind == "cat":
        return tap("interaction.output", rounding.concatenate(vectors, 1))
    features_BFE = tap("interaction.features", rounding.stack(vectors, 1))
    products_BFF = tap("interaction.products", _products(features_BFE))
    first, second = _pairs(spec)
    return tap("interaction.output", rounding.concatenate([vectors[0], products_BFF[:, first, second]], 1))


def backward(spec: ModelSpec, features: Tracked | None, doutput: Tracked, tap: Tap) -> list[Tracked]:
    """Gradients of the F vectors; `features` [B, F, E] of `dot`."""
    dimension = spec.embedding_dim
    if spec.interaction.kind == "cat":
        return [doutput[:, i * dimension:(i + 1) * dimension] for i in range(spec.interacting_vectors)]
    batch, vectors = len(doutput.value), spec.interacting_vectors
    dproducts = Tracked(*(np.zeros((batch, vectors, vectors)) for _ in range(2)))
    first, second = _pairs(spec)
    for source, target in zip(doutput, dproducts, strict=True):
        target[:, first, second] = source[:, dimension:]
    dproducts = tap("interaction.products_grad", dproducts)
    dfeatures = tap("interaction.features_grad", _products_gradient(features, dproducts))
    dvectors = [dfeatures[:, i] for i in range(vectors)]
    dvectors[0] = rounding.add(doutput[:, :dimension], dvectors[0])
    return dvectors


def _pairs(spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(spec.pairs, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _products(z: Tracked) -> Tracked:
    """Z Z^T for Z [B, F, E]. On the diagonal both factors are the same number: the error counts twice."""
    terms = z.value.shape[2]
    y = z.value @ z.value.transpose(0, 2, 1)
    squares = z.value**2
    half = (z.variance + rounding.summed(terms, squares, 0) / 2) @ squares.transpose(0, 2, 1)
    variance = half + half.transpose(0, 2, 1)
    diagonal = np.arange(z.value.shape[1])
    variance[:, diagonal, diagonal] *= 2
    return Tracked(y, variance + rounding.summed(terms, 0, y))


def _products_gradient(z: Tracked, dy: Tracked) -> Tracked:
    """(dY + dY^T) Z; engines form the two products apart and add them, which rounds no more than this allows."""
    both = dy.value + dy.value.transpose(0, 2, 1)
    variance = dy.variance + dy.variance.transpose(0, 2, 1)
    diagonal = np.arange(z.value.shape[1])
    variance[:, diagonal, diagonal] *= 2
    terms = 2 * z.value.shape[1]
    dz = both @ z.value
    squares = both**2
    dz_variance = (variance + rounding.summed(terms, squares, 0)) @ z.value**2 + squares @ z.variance
    return Tracked(dz, dz_variance + rounding.summed(terms, 0, dz))
