"""How fast PyTorch's own libraries multiply and gather: the entry point `torch` of the group `dlrm.ceilings`."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

BAG = 50


def kernels(gemm: tuple[int, int, int], rows: int, width: int, lookups: int,
            ) -> tuple[str, Callable[[], object], Callable[[], object]]:
    """The library, one multiplication [m, k] by [k, n] for gemm (m, n, k), and one lookup of so many rows."""
    m, n, k = gemm
    a, b, c = torch.ones(m, k), torch.ones(k, n), torch.empty(m, n)
    table, indices = torch.ones(rows, width), torch.randint(rows, (lookups // BAG, BAG))

    def multiply() -> None:
        torch.mm(a, b, out=c)

    def gather() -> None:
        with torch.inference_mode():
            F.embedding_bag(indices, table, mode="sum")

    return f"PyTorch {torch.__version__}", multiply, gather
