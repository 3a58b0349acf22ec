"""The text of a model-local ONNX function, which is what an operator becomes in an exported model."""

from collections.abc import Iterable, Sequence

import numpy as np

from dlrm_caffe2.operators.record import Node, Onnx

DOMAIN = "caffe2"
OPSET = 18


def function(node: Node, inputs: Iterable[str], outputs: Iterable[str], body: str, *, attributes: Iterable[str] = (),
             variant: Iterable[object] = ()) -> str:
    """A function in onnx.parser's syntax.

    Args:
        body: its nodes, of ONNX's own operators.
        attributes: arguments of the operator that the body refers to as `@name`; they are written on every node.
        variant: what else the body depends on, where that is not the usual; it goes into the function's name, for
            two operators of one type whose bodies differ are two functions.
    """
    name = "_".join([node.type, *(str(part).replace("-", "minus") for part in variant)])
    declared = f"<{', '.join(attributes)}>" if attributes else ""
    return (f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
            f"{name} {declared}({', '.join(inputs)}) => ({', '.join(outputs)}) {{{body}}}")


def simple(inputs: str, body: str, *attributes: str, outputs: str = "Y") -> Onnx:
    """A lowering that is the same function for every node: comma-separated inputs and outputs."""
    def onnx(node: Node, ranks: Sequence[int]) -> str:
        return function(node, [inputs], [outputs], body, attributes=attributes)
    return onnx


def as_scalar(scalar: str, tensor: str, rank: int) -> str:
    """A tensor of one element without its dimensions."""
    if rank == 0:
        return f"{scalar} = Identity({tensor})"
    return f"{scalar}_axes = Constant<value_ints = {list(range(rank))}>() {scalar} = Squeeze({tensor}, {scalar}_axes)"


def reshaped(output: str, tensor: str, like: str) -> str:
    """The elements of a tensor in the shape of another."""
    return f"{output}_shape = Shape({like}) {output} = Reshape<allowzero = 1>({tensor}, {output}_shape)"


def onnx_type(dtype: np.dtype) -> int:
    """The number of a data type in ONNX."""
    from onnx.helper import np_dtype_to_tensor_dtype

    return np_dtype_to_tensor_dtype(dtype)


def numbered(prefix: str, count: int) -> list[str]:
    """Names of the inputs or outputs of an operator that may have any number of them."""
    return [f"{prefix}{number}" for number in range(count)]
