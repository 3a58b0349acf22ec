"""Checks and shapes that several records share. All raise OperatorError through the node."""

import math
from collections.abc import Sequence
from functools import cache
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np

from dlrm_caffe2.operators.record import FLOAT, INT32, INT64, Gradient, GradientOps, Node, TensorType

DOUBLE = np.dtype(np.float64)
INDEX = (INT32, INT64)
NUMERIC = (FLOAT, DOUBLE, INT32, INT64)
ANY_NUMBER = 2**31 - 1
"""The greatest number of inputs or outputs of an operator that has no limit."""


def size(type: TensorType) -> int:
    """Number of elements."""
    return math.prod(type.shape)


def expect_dtype(node: Node, inputs: Sequence[TensorType], *allowed: np.dtype,
                 at: Sequence[int] | None = None) -> None:
    """Every input, or those at the given positions, has one of the allowed dtypes."""
    for position in range(len(inputs)) if at is None else at:
        node.require(inputs[position].dtype in allowed,
                     f"input {position} ('{node.inputs[position]}'): expected {' or '.join(map(str, allowed))}, "
                     f"found {inputs[position].dtype}")


def expect_shape(node: Node, inputs: Sequence[TensorType], position: int, shape: tuple[int, ...]) -> None:
    node.require(inputs[position].shape == shape, f"input {position} ('{node.inputs[position]}'): expected shape "
                 f"{list(shape)}, found {list(inputs[position].shape)}")


def expect_size(node: Node, inputs: Sequence[TensorType], position: int, elements: int) -> None:
    node.require(size(inputs[position]) == elements, f"input {position} ('{node.inputs[position]}'): expected "
                 f"{elements} elements, found {size(inputs[position])}")


def expect_rank(node: Node, inputs: Sequence[TensorType], position: int, least: int,
                greatest: int | None = None) -> None:
    rank = len(inputs[position].shape)
    node.require(least <= rank and (greatest is None or rank <= greatest),
                 f"input {position} ('{node.inputs[position]}'): expected rank {least}"
                 f"{'' if greatest == least else ' or more' if greatest is None else f' to {greatest}'}, found {rank}")


@cache
def torch_dtype(dtype: np.dtype) -> Any:
    """PyTorch's of the same name."""
    import torch

    return getattr(torch, dtype.name)


_is_cpu, _is_contiguous, _dtype = attrgetter("is_cpu"), methodcaller("is_contiguous"), attrgetter("dtype")


def are_contiguous(*tensors) -> bool:
    return all(map(_is_contiguous, tensors))


def are_plain(*tensors) -> bool:
    """Whether they are what compiled loops take (kernels.py): float32, on the CPU, contiguous."""
    return ({*map(_dtype, tensors)} == {torch_dtype(FLOAT)} and all(map(_is_cpu, tensors))
            and are_contiguous(*tensors))


def have_plain_rows(*tensors) -> bool:
    """Whether they are, but that their rows may lie apart."""
    return {*map(_dtype, tensors)} == {torch_dtype(FLOAT)} and all(map(_is_cpu, tensors)) and all(
        x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1) for x in tensors)


def bounds(integers) -> tuple[int, int]:
    """The least and the greatest element of a tensor that is not empty.

    Remembered on the tensor until it is written to: the operators of one table all check the same indices.
    """
    if integers.is_inference():  # PyTorch counts no writes to these
        return _bounds(integers)
    version, known = integers._version, getattr(integers, "_dlrm_bounds", None)
    if known is None or known[0] != version:
        integers._dlrm_bounds = known = version, _bounds(integers)
    return known[1]


def _bounds(integers) -> tuple[int, int]:
    low, high = integers.aminmax()
    return int(low), int(high)


def expect_indices(node: Node, position: int, indices, rows: int, least: int = 0) -> None:
    """Values of an index tensor lie in [least, rows). Reads the tensor."""
    if indices.numel():
        low, high = bounds(indices)
        if low < least or high >= rows:
            raise node.error(f"input {position} ('{node.inputs[position]}'): index "
                             f"{low if low < least else high} is out of bounds: expected {least} to {rows - 1}")


def same_as_input(position: int = 0, *dtypes: np.dtype):
    """An infer rule: one output with the type of an input; every input has the one dtype and shape."""
    def infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
        expect_dtype(node, inputs, *(dtypes or (FLOAT,)))
        for other in range(len(inputs)):
            expect_dtype(node, inputs, inputs[0].dtype, at=[other])
            expect_shape(node, inputs, other, inputs[0].shape)
        return [inputs[position]]
    return infer


def dense(node: Node, gradient: Gradient) -> str:
    """The blob name of a gradient that must be there and be dense."""
    if not isinstance(gradient, str):
        raise node.error(f"expected a dense gradient of each output, found {gradient}")
    return gradient


def no_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    """For operators that Caffe2 declares to have none: the backward pass ends there."""
    return GradientOps([], [None] * len(node.inputs))
