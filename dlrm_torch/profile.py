"""Times the operators of a step, and tells what each works for."""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spec.tensors import part_of


class Stopwatch(TorchDispatchMode):
    """Times every operator that reaches a kernel. torch.profiler does too, but writes to stderr from C++.

    Attributes:
        seconds: by "part/operator": one of `spec.backend.PARTS`, and ATen's name.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._finish = _finisher(device)
        self._since_mark: list[tuple[str, float]] = []

    def mark(self, part: str) -> None:
        """What ran since the last mark worked for this part."""
        for operator, seconds in self._since_mark:
            self.seconds[f"{part}/{operator}"] += seconds
        self._since_mark.clear()

    def tap(self, name: str, x: Tensor) -> Tensor:
        """Goes into the forward pass."""
        self.mark(part_of(name))
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self._finish()
        self._since_mark.append((str(func.overloadpacket), time.perf_counter() - start))
        return result


class Clock:
    """Times what lies between two marks: compiled graphs have no operators that a dispatch mode could see.

    Attributes:
        seconds: by part.
    """

    def __init__(self, device: str) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._finish = _finisher(device)
        self._since = time.perf_counter()

    def mark(self, part: str) -> None:
        self._finish()
        before, self._since = self._since, time.perf_counter()
        self.seconds[part] += self._since - before


def _finisher(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None
