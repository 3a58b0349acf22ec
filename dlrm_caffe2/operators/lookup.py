"""Embedding lookups: SparseLengths{Sum,Mean,WeightedSum}, Gather, and their gradients.

A table is [N, ...], its indices I [L] are int32 or int64, and the bags' lengths [B] are int32 and add up to L.
Caffe2's gradient operators compare neither len(I) nor the weights with the lengths; ours refuse a mismatch.
"""

import math
from collections.abc import Sequence

from dlrm_caffe2.operators.lowering import function, simple
from dlrm_caffe2.operators.record import (
    FLOAT,
    INT32,
    Arg,
    Gradient,
    GradientOps,
    Node,
    Operator,
    Slice,
    TensorType,
    grad,
    gradient_operator,
)
from dlrm_caffe2.operators.rules import INDEX, dense, expect_dtype, expect_indices, expect_rank, expect_shape
from dlrm_caffe2.operators.segments import CONSTANTS, as_matrix, bag_sums, scattered

_GRADIENT = "SparseLengthsIndicesInGradient{}Gradient"


def _expect_bags(node: Node, inputs: Sequence[TensorType], indices: int, lengths: int) -> None:
    expect_dtype(node, inputs, *INDEX, at=[indices])
    expect_dtype(node, inputs, INT32, at=[lengths])
    expect_rank(node, inputs, indices, 1, 1)
    expect_rank(node, inputs, lengths, 1, 1)


def _expect_total(node: Node, position: int, lengths, total: int) -> None:
    if lengths.numel():
        node.require(int(lengths.min()) >= 0, f"input {position} ('{node.inputs[position]}'): a length is negative")
    found = int(lengths.sum())
    node.require(found == total, f"input {position} ('{node.inputs[position]}'): the sum of lengths should be the "
                                 f"number of indices: expected {total}, found {found}")


def pool(rows, indices, lengths, weights=None):
    """Sum, in order, of the rows of each bag: [len(lengths), ...] of a table [N, ...]. An empty bag gives zeros."""
    import torch

    shape = (len(lengths), *rows.shape[1:])
    if not indices.numel() or not rows.numel():
        return rows.new_zeros(shape)
    ends = lengths.cumsum(0)
    bags = torch.nn.functional.embedding_bag(indices, rows.reshape(len(rows), -1), (ends - lengths).to(indices.dtype),
                                             mode="sum", per_sample_weights=weights)
    return bags.reshape(shape)


def _column(x, like):
    """x [n], shaped so that it multiplies whole rows of `like` [n, ...]."""
    return x.reshape(-1, *[1] * (like.dim() - 1))


def _inverse_lengths(lengths):
    """1/n in float32; 1 for an empty bag."""
    return 1 / lengths.clamp_min(1).float()


def _sum_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """D, I, L or D, w, I, L. float16 tables, which Caffe2 pools into float32, are refused."""
    weighted = len(inputs) == 4
    expect_dtype(node, inputs, FLOAT, at=[0, 1] if weighted else [0])
    expect_rank(node, inputs, 0, 1)
    node.require(math.prod(inputs[0].shape[1:]) > 0, f"the rows of the table {inputs[0]} have no elements")
    _expect_bags(node, inputs, len(inputs) - 2, len(inputs) - 1)
    if weighted:
        expect_shape(node, inputs, 1, inputs[2].shape)
    return [TensorType(FLOAT, inputs[-1].shape + inputs[0].shape[1:])]


def _expect_lookup(node: Node, table, indices, lengths) -> None:
    _expect_total(node, len(node.inputs) - 1, lengths, len(indices))
    expect_indices(node, len(node.inputs) - 2, indices, len(table))


def _sum_aten(node: Node, table, indices, lengths):
    _expect_lookup(node, table, indices, lengths)
    return pool(table, indices, lengths)


def _mean_aten(node: Node, table, indices, lengths):
    _expect_lookup(node, table, indices, lengths)
    sums = pool(table, indices, lengths)
    return sums * _column(_inverse_lengths(lengths), sums)


def _weighted_aten(node: Node, table, weights, indices, lengths):
    _expect_lookup(node, table, indices, lengths)
    return pool(table, indices, lengths, weights)


_FILLED = """
    sizes_B = Cast<to = 7>(L)
    filled_1P = NonZero(sizes_B)
    filled = Squeeze(filled_1P, axis0)
    sizes = Gather(sizes_B, filled)
    filled_P1 = Unsqueeze(filled, axis1)
"""
"""The P bags that have something in them, and how much."""
_AVERAGES = """
    divisor = Cast<to = 1>(sizes)
    inverse = Reciprocal(divisor)
    inverse_P1 = Unsqueeze(inverse, axis1)
    averages = Mul(sums, inverse_P1)
"""


def _bags_onnx(node: Node, ranks: Sequence[int]) -> str:
    weighted, mean = "Weighted" in node.type, "Mean" in node.type
    body = f"""
        {CONSTANTS}
        {_FILLED}
        {as_matrix("table", "D", ranks[0])}
        {bag_sums("table", "I", "w" if weighted else None)}
        {_AVERAGES if mean else ""}
        bags = Shape(L)
        {scattered("Y", "averages" if mean else "sums", "filled_P1", "bags", "D", ranks[0])}
    """
    return function(node, ["D", *(["w"] if weighted else []), "I", "L"], ["Y"], body,
                    variant=() if ranks[0] == 2 else ("rank", ranks[0]))


def _sum_gradient(kind: str):
    def gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
        table, indices, lengths = node.inputs
        values = grad(table) + "_values"
        operator = gradient_operator(_GRADIENT.format(kind), [dense(node, outputs[0]), lengths, indices], [values],
                                     **node.given)
        return GradientOps([operator], [Slice(indices, values), None, None])
    return gradient


def _weighted_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    table, weights, indices, lengths = node.inputs
    dy, values = dense(node, outputs[0]), grad(table) + "_values"
    if node.args["grad_on_weights"]:
        operator = gradient_operator(_GRADIENT.format("WeightedSumWithMainInput"),
                                     [weights, dy, lengths, table, indices], [values, grad(weights)], **node.given)
        return GradientOps([operator], [Slice(indices, values), grad(weights), None, None])
    operator = gradient_operator(_GRADIENT.format("WeightedSum"), [weights, dy, lengths, indices], [values],
                                 **node.given)
    return GradientOps([operator], [Slice(indices, values), None, None, None])


def _rows_infer(dy: int, lengths: int, indices: int):
    """A rule: dY [B, ...], lengths [B] and indices [L], at these positions, give rows [L, ...]."""
    def infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
        expect_dtype(node, inputs, FLOAT, at=[dy])
        expect_rank(node, inputs, dy, 1)
        _expect_bags(node, inputs, indices, lengths)
        expect_shape(node, inputs, dy, inputs[lengths].shape + inputs[dy].shape[1:])
        return [TensorType(FLOAT, inputs[indices].shape + inputs[dy].shape[1:])]
    return infer


def _spread(node: Node, dy, lengths, indices, position: int):
    """Row b of dY, once for each index of bag b. `position` is that of the lengths among the inputs."""
    import torch

    _expect_total(node, position, lengths, len(indices))
    return torch.repeat_interleave(dy, lengths, dim=0, output_size=len(indices))


def _sum_gradient_aten(node: Node, dy, lengths, indices):
    return _spread(node, dy, lengths, indices, 1)


def _mean_gradient_aten(node: Node, dy, lengths, indices):
    return _spread(node, dy * _column(_inverse_lengths(lengths), dy), lengths, indices, 1)


def _weighted_gradient_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT, at=[0])
    expect_shape(node, inputs, 0, inputs[3].shape)
    return _rows_infer(1, 2, 3)(node, inputs)


def _weighted_gradient_aten(node: Node, weights, dy, lengths, indices):
    rows = _spread(node, dy, lengths, indices, 2)
    return rows * _column(weights, rows)


def _main_input_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    weights, dy, _, table, indices = inputs
    expect_dtype(node, inputs, FLOAT, at=[0, 3])
    expect_rank(node, inputs, 3, 1)
    expect_shape(node, inputs, 0, indices.shape)
    rows = _rows_infer(1, 2, 4)(node, inputs)
    node.require(table.shape[1:] == dy.shape[1:], f"rows of the table {table} and of dY {dy} differ in shape")
    return [*rows, weights]


def _main_input_aten(node: Node, weights, dy, lengths, table, indices):
    expect_indices(node, 4, indices, len(table))
    rows = _spread(node, dy, lengths, indices, 2)
    dot = (rows * table.index_select(0, indices)).reshape(len(indices), math.prod(table.shape[1:])).sum(1)
    return rows * _column(weights, rows), dot


_BAG_OF_EACH = """
    starts = CumSum<exclusive = 1>(sizes, zero)
    starts_P1 = Unsqueeze(starts, axis1)
    lookups = Shape(I)
    unmarked = ConstantOfShape<value = int64[1] {0}>(lookups)
    bags = Shape(filled)
    marks = ConstantOfShape<value = int64[1] {1}>(bags)
    marked = ScatterND(unmarked, starts_P1, marks)
    ordinal = CumSum(marked, zero)
    nth = Sub(ordinal, one)
    bag = Gather(filled, nth)
"""
"""For each index, the number of its bag."""
_DIVIDED = """
    least = Max(sizes_B, one)
    divisor = Cast<to = 1>(least)
    inverse = Reciprocal(divisor)
    inverse_column = {}
    divided = Mul(dY, inverse_column)
"""


def _spread_onnx(node: Node, ranks: Sequence[int]) -> str:
    """The gradient operators: row b of dY, once for each index of bag b."""
    weighted, table = "Weighted" in node.type, "MainInput" in node.type
    rank = ranks[int(weighted)]
    others = f"others = Constant<value_ints = {list(range(1, rank))}>()" if rank > 1 else ""

    def column(x: str) -> str:
        return f"Unsqueeze({x}, others)" if rank > 1 else f"Identity({x})"

    body = f"""
        {CONSTANTS}
        {_FILLED}
        {_BAG_OF_EACH}
        {others}
        {_DIVIDED.format(column("inverse")) if "Mean" in node.type else ""}
        {"rows" if weighted else "Y"} = Gather({"divided" if "Mean" in node.type else "dY"}, bag)
    """
    if weighted:
        body += f"weights = {column('w')} Y = Mul(rows, weights)"
    if table:
        body += f"""
            looked_up = Gather(D, I)
            products = Mul(rows, looked_up)
            dw = {"ReduceSum<keepdims = 0>(products, others)" if rank > 1 else "Identity(products)"}
        """
    return function(node, [*(["w"] if weighted else []), "dY", "L", *(["D"] if table else []), "I"],
                    ["Y", *(["dw"] if table else [])], body, variant=() if rank == 2 else ("rank", rank))


def _gather_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Y = D[I], any dtype; along axis 0, the only one supported here."""
    expect_dtype(node, inputs, *INDEX, at=[1])
    expect_rank(node, inputs, 0, 1)
    return [TensorType(inputs[0].dtype, inputs[1].shape + inputs[0].shape[1:])]


def _gather_aten(node: Node, data, indices):
    """An index in [-N, -1] counts from the end, as in Caffe2."""
    expect_indices(node, 1, indices, len(data), least=-len(data))
    wrapped = indices.reshape(-1) % max(len(data), 1)
    return data.index_select(0, wrapped).reshape((*indices.shape, *data.shape[1:]))


def _gather_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    return GradientOps([], [Slice(node.inputs[1], dense(node, outputs[0])), None])


_WEIGHTS = {"grad_on_weights": Arg("i", 0)}

OPERATORS = [
    Operator("SparseLengthsSum", (3, 3), (1, 1), _sum_infer, _sum_aten, gradient=_sum_gradient("Sum"),
             onnx=_bags_onnx),
    Operator("SparseLengthsMean", (3, 3), (1, 1), _sum_infer, _mean_aten, gradient=_sum_gradient("Mean"),
             onnx=_bags_onnx),
    Operator("SparseLengthsWeightedSum", (4, 4), (1, 1), _sum_infer, _weighted_aten, _WEIGHTS, _weighted_gradient,
             _bags_onnx),
    Operator(_GRADIENT.format("Sum"), (3, 3), (1, 1), _rows_infer(0, 1, 2), _sum_gradient_aten,
             onnx=_spread_onnx),
    Operator(_GRADIENT.format("Mean"), (3, 3), (1, 1), _rows_infer(0, 1, 2), _mean_gradient_aten,
             onnx=_spread_onnx),
    Operator(_GRADIENT.format("WeightedSum"), (4, 4), (1, 1), _weighted_gradient_infer, _weighted_gradient_aten,
             _WEIGHTS, onnx=_spread_onnx),
    Operator(_GRADIENT.format("WeightedSumWithMainInput"), (5, 5), (2, 2), _main_input_infer, _main_input_aten,
             _WEIGHTS, onnx=_spread_onnx),
    Operator("Gather", (2, 2), (1, 1), _gather_infer, _gather_aten, gradient=_gather_gradient,
             onnx=simple("D, I", "Y = Gather(D, I)")),
]
