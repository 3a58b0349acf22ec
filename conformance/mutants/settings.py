"""Specs that have the operator which a fault needs, made from the one that was asked for."""

from typing import Any

from spec.model import ModelSpec


def changed(spec: ModelSpec, **parts: Any) -> ModelSpec:
    return ModelSpec.model_validate(spec.model_dump() | parts)


def table(number: int, **parts: Any):
    """Another pooling, or other lookups, of one table."""
    def setting(spec: ModelSpec) -> ModelSpec:
        tables = [part.model_dump() for part in spec.tables]
        tables[number] |= parts
        return changed(spec, tables=tables)
    return setting


def loss(**parts: Any):
    return lambda spec: changed(spec, loss=parts)


def interaction(**parts: Any):
    return lambda spec: changed(spec, interaction=parts)


RAGGED_SUM = table(0, pooling="sum", lookups=[0, 6])
RAGGED_MEAN = table(1, pooling="mean", lookups=[0, 6])
FIXED_WEIGHTS = table(2, pooling="weighted_fixed", lookups=[0, 4])
LEARNED_WEIGHTS = table(2, pooling="weighted_learned", lookups=[0, 4])
CLIP = loss(kind="bce", clip=0.45)
WEIGHTED = loss(kind="wbce", weights=[0.5, 3.0])
MSE = loss(kind="mse")
LOGITS = loss(kind="bce_logits")
CAT = interaction(kind="cat")
SELF = interaction(kind="dot", self_interaction=True)


def ragged_pair(spec: ModelSpec) -> ModelSpec:
    """Two tables whose bags may exchange their lengths."""
    return table(1, lookups=[0, 6])(table(0, lookups=[0, 6])(spec))
