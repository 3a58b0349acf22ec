"""Shorter number formats, by rounding float32 arrays (bits as IEEE 754 has them)."""

import numpy as np


def keep_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """Round to nearest even with `bits` explicit bits of mantissa: 7 is bfloat16, 10 is TF32."""
    whole = np.ascontiguousarray(x, np.float32).view(np.uint32)
    drop = 23 - bits
    half = np.uint32((1 << (drop - 1)) - 1) + ((whole >> np.uint32(drop)) & np.uint32(1))
    return ((whole + half) & ~np.uint32((1 << drop) - 1)).view(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return keep_bits(x, 7)


def tf32(x: np.ndarray) -> np.ndarray:
    return keep_bits(x, 10)


def float16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def float16_sum(x: np.ndarray) -> np.ndarray:
    """Over the first axis, one after another, each partial sum rounded to float16."""
    total = np.zeros(x.shape[1:], np.float16)
    for part in x:
        total = (total.astype(np.float32) + part).astype(np.float16)
    return total.astype(np.float32)


def float16_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [M, K] b [K, N], the running sum over K held in float16."""
    total = np.zeros((len(a), b.shape[1]), np.float16)
    for k in range(a.shape[1]):
        total = (total.astype(np.float32) + a[:, k, None] * b[None, k]).astype(np.float16)
    return total.astype(np.float32)
