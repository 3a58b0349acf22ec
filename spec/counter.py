"""Counter-based random numbers, keyed by name: the same bits in any order and on any machine.

Philox4x64-10 (Salmon et al. 2011), the generator under numpy.random.Philox. Only its raw 64-bit words
are used, whose sequence NumPy guarantees, never NumPy's distributions, whose sequence it does not.
"""

import hashlib
import math

import numpy as np

_CHUNK = 1 << 22  # words drawn at a time; even, so that a chunk ends at a whole 64-bit word


def words(seed: int, name: str, count: int) -> np.ndarray:
    """`count` random 32-bit words of the stream (seed, name): uint32 [count].

    The key is the first 16 bytes, little-endian, of SHA-256 of "{seed}:{name}"; every 64-bit output
    gives its low half, then its high half.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2)
    return raw.astype("<u8").view("<u4")[:count]


def uniform(seed: int, name: str, shape: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """low + (high - low) * w / 2^24 with w the top 24 bits of a word, in float64, then rounded: float32."""
    out = np.empty(math.prod(shape), np.float32)
    stream = words(seed, name, out.size)
    for start in range(0, out.size, _CHUNK):
        part = stream[start:start + _CHUNK] >> 8
        out[start:start + _CHUNK] = low + (high - low) * (part * 2.0**-24)
    return out.reshape(shape)


def integers(seed: int, name: str, count: int, low: int, high: int) -> np.ndarray:
    """low + floor(w * (high - low) / 2^32): int64 [count] in [low, high). high - low is at most 2^31."""
    return low + (words(seed, name, count).astype(np.int64) * (high - low) >> 32)
