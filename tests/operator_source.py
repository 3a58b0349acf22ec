"""What a case of an operator is, and where its generator (operator_cases.py) takes its choices from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import record
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef


@dataclass(frozen=True)
class Case:
    definition: OperatorDef
    inputs: tuple[np.ndarray, ...]

    @property
    def blobs(self) -> dict[str, np.ndarray]:
        return dict(zip(self.definition.input, self.inputs, strict=True))


def make_case(type: str, inputs: list[Any], outputs: int = 1, **arguments: Any) -> Case:
    """Blobs are named i0, i1, ... and o0, o1, ...; what is updated in place keeps its input's name."""
    names = [f"i{number}" for number in range(len(inputs))]
    in_place = record(type).in_place
    outs = [names[in_place[number]] if number in in_place else f"o{number}" for number in range(outputs)]
    return Case(make_operator(type, names, outs, **arguments), tuple(np.asarray(array) for array in inputs))


class Source:
    """Where a generator takes its choices from: sizes and options are Hypothesis's, to shrink; values are seeded."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def size(self, low: int = 0, high: int = 5) -> int:
        return self.draw(st.integers(low, high))

    def shape(self, low: int = 0, high: int = 3, least: int = 0) -> tuple[int, ...]:
        """A shape of low to high dimensions, each at least `least`."""
        return tuple(self.draw(st.lists(st.integers(least, 4), min_size=low, max_size=high)))

    def choice(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def floats(self, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        values = self.rng.normal(size=shape) * 10.0 ** self.rng.integers(-2, 2)
        return np.asarray(np.where(self.rng.random(shape) < 0.1, 0, values), dtype)

    def positive(self, *shape: int) -> np.ndarray:
        return np.asarray(self.rng.uniform(0.01, 4, shape), np.float32)

    def numbers(self, dtype: Any, *shape: int) -> np.ndarray:
        if np.dtype(dtype).kind == "f":
            return self.floats(*shape, dtype=dtype)
        low = 0 if np.dtype(dtype).kind in "ub" else -50
        return self.rng.integers(low, 50, shape).astype(dtype)

    def indices(self, count: int, rows: int) -> np.ndarray:
        """Few distinct values, so that most repeat. No rows, no indices."""
        values = self.rng.integers(0, rows, count) if rows else np.empty(0)
        return values.astype(self.choice(np.int32, np.int64))

    def updated_rows(self, count: int, rows: int) -> tuple[np.ndarray, dict[str, int]]:
        """(indices, arguments): any rows, or different ones with the promise that they are."""
        indices = self.indices(count, rows)
        if self.choice(True, False):
            return indices, {}
        return self.rng.permutation(np.unique(indices)), {"distinct_rows": 1}

    def bags(self, rows: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """(indices, lengths, arguments), with empty bags or with bags of a fixed size."""
        fixed = self.size(0, 3) if rows else 0
        lengths = self.rng.integers(fixed, fixed + 1 if fixed or not rows else 4, self.size()).astype(np.int32)
        return self.indices(int(lengths.sum()), rows), lengths, {"fixed_lookups": fixed} if fixed else {}
