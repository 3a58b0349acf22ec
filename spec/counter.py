"""Counter-based random numbers, keyed by name: the same bits in any order and on any machine.

Philox4x64-10 (Salmon et al. 2011), the generator under numpy.random.Philox. Only its raw 64-bit words
are used, whose sequence NumPy guarantees, never NumPy's distributions, whose sequence it does not.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.random import Philox  # now: NumPy loads it at its first use, and an interrupt meanwhile can be lost

_CHUNK = 1 << 20  # words drawn at a time, for the sake of memory; even, so that none is left over


def words(seed: int, name: str, count: int) -> Iterator[np.ndarray]:
    """`count` random 32-bit words of the stream (seed, name), in pieces: uint32.

    The key is the first 16 bytes, little-endian, of SHA-256 of "{seed}:{name}"; every 64-bit output
    gives its low half, then its high half.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator = Philox(key=key)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        yield generator.random_raw((size + 1) // 2).astype("<u8", copy=False).view("<u4")[:size]


def uniform(seed: int, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """low + (high - low) * w / 2^24 with w the top 24 bits of a word, in float64, then rounded: float32."""
    out = np.empty(math.prod(shape), np.float32)
    start = 0
    for part in words(seed, name, out.size):
        out[start:start + len(part)] = low + (high - low) * ((part >> 8) * 2.0**-24)
        start += len(part)
    return out.reshape(shape)


def integers(seed: int, name: str, count: int, low: int, high: int) -> np.ndarray:
    """low + floor(w * (high - low) / 2^32): int64 [count] in [low, high). high - low is at most 2^31."""
    out = np.empty(count, np.int64)
    start = 0
    for part in words(seed, name, count):
        out[start:start + len(part)] = low + (part.astype(np.int64) * (high - low) >> 32)
        start += len(part)
    return out
