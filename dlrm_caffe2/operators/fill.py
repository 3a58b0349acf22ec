"""Operators that make tensors out of their arguments."""

import math
from collections.abc import Sequence

import numpy as np

from dlrm_caffe2.net import DTYPES
from dlrm_caffe2.operators.lowering import function, onnx_type
from dlrm_caffe2.operators.record import FLOAT, INT32, INT64, Arg, Node, Operator, TensorType
from dlrm_caffe2.operators.rules import no_gradient, torch_dtype


def _shape(node: Node) -> tuple[int, ...]:
    node.require(all(length >= 0 for length in node.args["shape"]),
                 f"expected lengths of 0 or more, found shape {list(node.args['shape'])}")
    return node.args["shape"]


def _constant_dtype(node: Node) -> np.dtype:
    """Without `dtype`, that of the value: an integer is int64, a float (and no value at all) float32."""
    value, number = node.args["value"], node.args["dtype"]
    if number is None:
        return INT64 if isinstance(value, int) else FLOAT
    node.require(number in DTYPES and DTYPES[number] != np.float16, f"data type {number} is not supported")
    dtype = DTYPES[number]
    node.require(value is None or isinstance(value, float) == (dtype.kind == "f"),
                 f"value {value!r} is in the wrong field for {dtype}")
    return dtype


def _constant_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """The shape is the argument's or, where there is an input, the input's (not both)."""
    node.require(not inputs or "shape" not in node.given, "give a shape or an input, not both")
    return [TensorType(_constant_dtype(node), inputs[0].shape if inputs else _shape(node))]


def _constant_aten(node: Node, like=None):
    import torch

    dtype, value = torch_dtype(_constant_dtype(node)), node.args["value"] or 0
    return torch.full(_shape(node), value, dtype=dtype) if like is None else torch.full_like(like, value, dtype=dtype)


def _constant_onnx(node: Node, ranks: Sequence[int]) -> str:
    dtype, value, like = _constant_dtype(node), node.args["value"], bool(ranks)
    kind = "float" if isinstance(value, float) else "int"
    attributes = [*(["value"] if value is not None else []), *([] if like else ["shape"])]
    return function(node, ["X"] if like else [], "Y", f"""
        given = Constant<{"value_int = 0" if value is None else f"value_{kind}: {kind} = @value"}>()
        value = Cast<to = {onnx_type(dtype)}>(given)
        shape = {"Shape(X)" if like else "Constant<value_ints: ints = @shape>()"}
        Y = Expand(value, shape)
    """, attributes=attributes, variant=[dtype, *(["zero"] if value is None else []), *(["like"] if like else [])])


def _given_infer(dtype: np.dtype):
    def infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
        shape, values = _shape(node), node.args["values"]
        node.require(math.prod(shape) == len(values),
                     f"expected {math.prod(shape)} values for shape {list(shape)}, found {len(values)}")
        if dtype.kind == "i" and len(values):
            limits = np.iinfo(dtype)
            node.require(limits.min <= values.min() and values.max() <= limits.max, f"a value is outside {dtype}")
        return [TensorType(dtype, shape)]
    return infer


def _given_aten(dtype: np.dtype):
    def aten(node: Node):
        import torch

        return torch.from_numpy(node.args["values"].astype(dtype)).reshape(node.args["shape"])
    return aten


def _given_onnx(dtype: np.dtype, field: str):
    def onnx(node: Node, ranks: Sequence[int]) -> str:
        return function(node, [], "Y", f"""
            given = Constant<value_{field}: {field} = @values>()
            values = Cast<to = {onnx_type(dtype)}>(given)
            shape = Constant<value_ints: ints = @shape>()
            Y = Reshape<allowzero = 1>(values, shape)
        """, attributes=["values", "shape"])
    return onnx


def _given(type: str, dtype: np.dtype, field: str) -> Operator:
    return Operator(type, (0, 0), (1, 1), _given_infer(dtype), _given_aten(dtype),
                    {"values": Arg(field, required=True, array=True), "shape": Arg("ints", ())}, no_gradient,
                    _given_onnx(dtype, field))


OPERATORS = [
    Operator("ConstantFill", (0, 1), (1, 1), _constant_infer, _constant_aten,
             {"value": Arg("f|i"), "dtype": Arg("i"), "shape": Arg("ints", ())}, no_gradient,
             _constant_onnx),
    _given("GivenTensorFill", FLOAT, "floats"),
    _given("GivenTensorInt64Fill", INT64, "ints"),
    _given("GivenTensorIntFill", INT32, "ints"),
    _given("GivenTensorDoubleFill", np.dtype(np.float64), "floats"),
    _given("GivenTensorBoolFill", np.dtype(np.bool_), "ints"),
]
