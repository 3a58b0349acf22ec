"""Times every ATen operator of a step, and tells what each works for."""

import time
from bisect import bisect
from collections import defaultdict

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spec.tensors import part_of


class Stopwatch(TorchDispatchMode):
    """Times every operator that reaches a kernel. torch.profiler does too, but writes to stderr from C++.

    Its `tap` goes into the forward pass. What runs between two activations works for the later one; autograd numbers
    the nodes that it records, so the backward pass of each is known too. What runs after the loss and outside of
    autograd is the optimizer, and the gradient of the tables that is fused with it.

    Attributes:
        seconds: by "part/operator": one of `spec.backend.PARTS`, and ATen's name.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._finish = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._since_tap: list[tuple[str, float]] = []
        self._ends: list[int] = []
        """Each part's first number that is no longer its own."""
        self._parts: list[str] = []
        self._forward = True

    def tap(self, name: str, x: Tensor) -> Tensor:
        part = part_of(name)
        for operator, seconds in self._since_tap:
            self.seconds[f"{part}/{operator}"] += seconds
        self._since_tap.clear()
        self._ends.append(torch.autograd._get_sequence_nr())
        self._parts.append(part)
        self._forward = name != "loss"
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self._finish()
        seconds, operator = time.perf_counter() - start, str(func.overloadpacket)
        node = torch._C._current_autograd_node()
        if self._forward:
            self._since_tap.append((operator, seconds))
        elif node is None:
            self.seconds[f"optimizer/{operator}"] += seconds
        else:
            self.seconds[f"{self._parts[bisect(self._ends, node._sequence_nr())]}/{operator}"] += seconds
        return result
