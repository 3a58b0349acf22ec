"""Embedding tables in fewer bits, for serving: how rows are stored and what is read back (SPEC.md, 11).

fp16: half-precision numbers. int8: whole numbers q in [-127, 127] and a scale for each row; w = scale q. uint8-rowwise:
whole numbers q in [0, 255], and a scale and a bias for each row; w = scale q + bias: Caffe2's format, whose
FloatToRowwiseQuantized8Bits gives the same bits.
"""

from collections.abc import Iterator

import numpy as np

from spec.errors import InputError

DTYPES = {"fp16": np.dtype(np.float16), "int8": np.dtype(np.int8), "uint8-rowwise": np.dtype(np.uint8)}
SCALES = {"fp16": 0, "int8": 1, "uint8-rowwise": 2}
"""float32 numbers beside each row."""

_PIECE = 1 << 20
_SAME = np.float32(1e-10)
"""A row whose numbers are closer together is stored as its least one. (Caffe2's threshold.)"""


def row_scales(name: str, table: np.ndarray, kind: str) -> np.ndarray:
    """float32 [N, SCALES[kind]]: scale, and bias, of each row of a table float32 [N, E].

    Raises InputError, naming the row, for numbers that are not finite or that `kind` cannot hold.
    """
    scales = np.empty((len(table), SCALES[kind]), np.float32)
    for rows in _pieces(table):
        piece = np.asarray(table[rows])
        low, high = piece.min(1), piece.max(1)
        with np.errstate(over="ignore", invalid="ignore"):
            extent = {"fp16": np.abs(piece).max(1).astype(np.float16), "int8": np.maximum(high, -low),
                      "uint8-rowwise": high - low}[kind]
        if not np.isfinite(extent).all():
            row = int(np.flatnonzero(~np.isfinite(extent))[0])
            raise InputError(f"{name}[{rows.start + row}]", f"finite numbers that fit into {kind}",
                             f"{low[row]:.6g} to {high[row]:.6g}", "keep this model's tables in float32")
        if kind == "int8":
            scales[rows, 0] = np.where(extent < np.finfo(np.float32).tiny * 127, 1, extent / np.float32(127))
        elif kind == "uint8-rowwise":
            scales[rows, 0] = np.where(extent < _SAME, 1, extent / np.float32(255))
            scales[rows, 1] = low
    return scales


def quantize(table: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """DTYPES[kind] [N, E]: the nearest numbers that can be stored, with the `row_scales` of the table."""
    stored = np.empty(table.shape, DTYPES[kind])
    for rows in _pieces(table):
        piece = np.asarray(table[rows])
        if kind == "int8":
            piece = np.rint(piece / scales[rows])
        elif kind == "uint8-rowwise":
            piece = np.floor((piece - scales[rows, 1:]) * (1 / scales[rows, :1]) + np.float32(0.5))
        stored[rows] = piece
    return stored


def dequantize(stored: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [N, E]: what an engine computes with."""
    values = stored.astype(np.float32)
    if scales.shape[1] > 0:
        values *= scales[:, :1]
    if scales.shape[1] > 1:
        values += scales[:, 1:]
    return values


def _pieces(table: np.ndarray) -> Iterator[slice]:
    """Of so many rows that what is computed from them does not count beside the table."""
    step = max(1, _PIECE // max(table.shape[1], 1))
    return (slice(start, min(start + step, len(table))) for start in range(0, len(table), step))
