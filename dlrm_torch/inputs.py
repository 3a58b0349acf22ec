"""A Batch as PyTorch takes it."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spec.batch import Batch


class Inputs(NamedTuple):
    """A Batch as tensors: dense [B, D], for each table indices and lengths, label [B, 1].

    Lengths are None where they say nothing: each bag holds one row.
    """

    dense: Tensor
    indices: list[Tensor]
    lengths: list[Tensor | None]
    label: Tensor


def inputs_from(batch: Batch, device: str = "cpu", one_hot: Collection[int] = ()) -> Inputs:
    """The batch's own memory where PyTorch can use it as it is. `one_hot` are tables with one row in each bag."""
    lengths = [None if number in one_hot else tensor_from(array, device) for number, array in enumerate(batch.lengths)]
    return Inputs(tensor_from(batch.dense, device), [tensor_from(array, device) for array in batch.indices], lengths,
                  tensor_from(batch.label, device))


def tensor_from(array: np.ndarray, device: str) -> Tensor:
    """The array's own memory where PyTorch can use it as it is."""
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    return torch.from_numpy(array).to(device)
