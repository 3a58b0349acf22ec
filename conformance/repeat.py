"""Whether a backend makes the same bits of the same calls, run after run."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from spec.backend import Model
from spec.batch import Batch
from spec.parameters import Arrays


@dataclass
class Repeat:
    """Attributes:
        promised: whether the backend says so of itself (`spec.backend.Backend.repeatable`).
        calls, tensors: what was compared, over all calls.
        difference: the first tensor, and call, of which the bits differ; "" where none does.
    """

    promised: bool
    calls: int = 0
    tensors: int = 0
    difference: str = ""

    @property
    def broken(self) -> bool:
        """A promise that was not kept. To compare nothing keeps none."""
        return self.promised and (bool(self.difference) or not self.tensors)


class Recorded:
    """A Model that notes every call of the one inside and the bits of what it returned."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._calls: list[tuple[str, tuple[Batch, ...], dict[str, bytes]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, batch: Batch) -> np.ndarray:
        return self._noted("predict", batch)

    def trace(self, batch: Batch) -> Arrays:
        return self._noted("trace", batch)

    def train_step(self, batch: Batch) -> float:
        return self._noted("train_step", batch)

    def parameters(self) -> Arrays:
        return self._noted("parameters")

    def optimizer_state(self) -> Arrays:
        return self._noted("optimizer_state")

    def _noted(self, call: str, *given: Batch) -> Any:
        result = getattr(self._model, call)(*given)
        self._calls.append((call, given, _bits(call, result)))
        return result

    def compare(self, other: Model, promised: bool) -> Repeat:
        """Make the same calls of a new model; up to the first difference."""
        repeat = Repeat(promised)
        for call, given, bits in self._calls:
            again = _bits(call, getattr(other, call)(*given))
            repeat.calls += 1
            repeat.tensors += len(bits)
            differing = [name for name in bits | again if bits.get(name) != again.get(name)]
            if differing:
                step = sum(name == "train_step" for name, _, _ in self._calls[:repeat.calls])
                repeat.difference = f"{differing[0]} of {call}" + (f", after {step} training steps" if step else "")
                break
        return repeat


def _bits(call: str, result: Any) -> dict[str, bytes]:
    """A digest of each array; what is no array, which the judge sees to, goes by its text."""
    named = result if isinstance(result, dict) else {"loss" if call == "train_step" else "probability": result}
    return {name: blake2b(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray | np.generic)
                          else repr(value).encode(), digest_size=16).digest() for name, value in named.items()}
