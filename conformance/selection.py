"""Batches without kinks: samples on which every correct engine takes the same side of every ReLU and clip.

Where a value lies within reach of a kink, a live run asks the engine's own trace which side it was on. A bundle cannot
ask; but few samples have such a value, and it leaves them out.
"""

from collections.abc import Iterator

import numpy as np

from spec import loss, rounding
from spec.batch import Batch
from spec.errors import InputError
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.reference import evaluate
from spec.rounding import C

_MOST_BATCHES = 8
"""Batches read for each one that is wanted, before fewer samples are taken."""


def without_kinks(spec: ModelSpec, parameters: Arrays, stream: Iterator[Batch], size: int,
                  count: int) -> tuple[list[Batch], int]:
    """(`count` batches of `size` samples of the stream that have no kink, how many samples were passed over).

    Smaller batches where too few of them have none. Raises InputError where not even `count` samples are found.
    """
    kept: list[Batch] = []
    found = passed = 0
    for _ in range(_MOST_BATCHES * count):
        batch = next(stream)
        smooth = np.flatnonzero(~_at_kink(spec, parameters, batch))
        found, passed = found + len(smooth), passed + batch.size - len(smooth)
        kept.append(_take(batch, smooth))
        if found >= size * count:
            break
    size = min(size, found // count)
    if not size:
        raise InputError(f"spec '{spec.name}'", "samples without a ReLU or a clip at its kink",
                         f"{found} in {found + passed}", "use another --seed or other --data")
    joined = _join(kept)
    return [_take(joined, np.arange(i * size, (i + 1) * size)) for i in range(count)], passed


def _at_kink(spec: ModelSpec, parameters: Arrays, batch: Batch) -> np.ndarray:
    """bool [B]: a ReLU may be on either side, or so little is known of the logit's gradient that a live run would
    take the engine's own (a probability at its clip, or saturated)."""
    tensors = evaluate(spec, parameters, batch, gradients=False).tensors
    kink = np.zeros(batch.size, bool)
    for name in tensors:
        if name.endswith(".activation") and getattr(spec, name.split(".")[0]).activation == "relu":
            kink |= rounding.near(tensors[name.replace(".activation", ".preactivation")], 0).any(1)
    logit = tensors[f"top.{len(spec.top.widths) - 1}.preactivation"]
    losses = loss.evaluate(spec.loss, logit, tensors["probability"], batch.label.astype(np.float64))
    dlogit = losses.dlogit(losses.dprobability)
    return kink | (C * dlogit.reach > np.abs(dlogit.value))[:, 0]


def _take(batch: Batch, samples: np.ndarray) -> Batch:
    """The batch of these samples, in this order."""
    indices, lengths = [], []
    for rows, sizes in zip(batch.indices, batch.lengths, strict=True):
        bags = np.split(rows, np.cumsum(sizes[:-1]))
        indices.append(np.concatenate([rows[:0], *(bags[sample] for sample in samples)]))
        lengths.append(sizes[samples])
    return Batch(batch.dense[samples], tuple(indices), tuple(lengths), batch.label[samples])


def _join(batches: list[Batch]) -> Batch:
    """All samples of all of them."""
    return Batch(np.concatenate([batch.dense for batch in batches]),
                 tuple(map(np.concatenate, zip(*(batch.indices for batch in batches), strict=True))),
                 tuple(map(np.concatenate, zip(*(batch.lengths for batch in batches), strict=True))),
                 np.concatenate([batch.label for batch in batches]))
