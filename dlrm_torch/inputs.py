"""A Batch as PyTorch takes it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm_torch.embedding import EmbeddingBags
from dlrm_torch.lookups import Lookups
from spec.batch import Batch


class Inputs(NamedTuple):
    """A Batch as tensors: dense [B, D], what each group of tables looks up, label [B, 1]."""

    dense: Tensor
    lookups: list[Lookups]
    label: Tensor


def inputs_from(batch: Batch, tables: EmbeddingBags, device: str = "cpu") -> Inputs:
    """The batch's own memory where PyTorch can use it as it is.

    Lookups are joined by NumPy: 26 small tensors cost more than all that is done with them, and a GPU gets one.
    """
    def join(arrays: Sequence[np.ndarray]) -> Tensor:
        return tensor_from(np.concatenate(arrays), device)

    return Inputs(tensor_from(batch.dense, device), tables.lookups(batch.indices, batch.lengths, join),
                  tensor_from(batch.label, device))


def tensor_from(array: np.ndarray, device: str) -> Tensor:
    """The array's own memory where PyTorch can use it as it is."""
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    return torch.from_numpy(array).to(device)
