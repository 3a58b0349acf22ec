"""Where compiled loops stand for several kernels of PyTorch's."""

from types import ModuleType

import torch
from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """dlrm_torch/kernels.py, whose loops take float32 on a CPU; None for anything else, which PyTorch's kernels do, and
    where PyTorch compiles or exports the caller.

    Importing it takes a second, or some when it is compiled for the first time, so it waits for the first batch.
    """
    if x.dtype is not torch.float32 or not x.is_cpu or torch.compiler.is_compiling():
        return None
    from dlrm_torch import kernels
    return kernels
