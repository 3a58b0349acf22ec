"""Embedding lookups: SparseLengths{Sum,Mean,WeightedSum}, Gather, and their gradients.

A table is [N, ...], its indices I [L] are int32 or int64, and the bags' lengths [B] are int32 and add up to L.
Caffe2's gradient operators compare neither len(I) nor the weights with the lengths; ours refuse a mismatch.

The argument `fixed_lookups`, k, is ours: it promises that every bag has k rows. Caffe2 ignores it, and ONNX models are
faster by it.
"""

import math
from collections.abc import Callable, Sequence

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
from dlrm_caffe2.operators.rules import INDEX, bounds, dense, expect_dtype, expect_indices, expect_rank, expect_shape
from dlrm_caffe2.operators.segments import CONSTANTS, as_matrix, bag_sums, scattered

_GRADIENT = "SparseLengthsIndicesInGradient{}Gradient"


def _expect_bags(node: Node, inputs: Sequence[TensorType], indices: int, lengths: int) -> None:
    expect_dtype(node, inputs, *INDEX, at=[indices])
    expect_dtype(node, inputs, INT32, at=[lengths])
    expect_rank(node, inputs, indices, 1, 1)
    expect_rank(node, inputs, lengths, 1, 1)


def expect_total(node: Node, position: int, lengths, total: int) -> None:
    """The lengths are 0 or more, fixed_lookups where that is promised, and add up to `total`."""
    fixed, (least, most) = node.args["fixed_lookups"], bounds(lengths) if lengths.numel() else (0, 0)
    wrong = None
    if least < 0:
        wrong = "a length is negative"
    elif fixed and lengths.numel() and not least == most == fixed:
        wrong = f"a length is not fixed_lookups, {fixed}"
    elif (found := lengths.shape[0] * most if least == most else int(lengths.sum())) != total:
        wrong = f"the sum of lengths should be the number of indices: expected {total}, found {found}"
    if wrong:
        raise node.error(f"input {position} ('{node.inputs[position]}'): {wrong}")


def pool(rows, indices, lengths, weights=None):
    """Sum, in order, of the rows of each bag: [len(lengths), ...] of a table [N, ...]. An empty bag gives zeros."""
    import torch

    shape = (lengths.shape[0], *rows.shape[1:])
    if not indices.numel() or not rows.numel():
        return rows.new_zeros(shape)
    starts = (lengths.cumsum(0) - lengths).to(indices.dtype)
    bags = torch.nn.functional.embedding_bag(indices, rows.reshape(rows.shape[0], -1), starts, mode="sum",
                                             per_sample_weights=weights)
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
    expect_total(node, len(node.inputs) - 1, lengths, indices.shape[0])
    expect_indices(node, len(node.inputs) - 2, indices, table.shape[0])


def _sum_aten(node: Node, table, indices, lengths):
    _expect_lookup(node, table, indices, lengths)
    if node.args["fixed_lookups"] == 1:
        return table.index_select(0, indices)
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


_BAG_SIZE = """
    one_int32 = Cast<to = 6>(axis1)
    lengths_and_1 = Concat<axis = 0>(L, one_int32)
    longest_int32 = ReduceMax(lengths_and_1)
    longest = Cast<to = 7>(longest_int32)
    bags = Shape(L)
"""
"""For bags of a fixed size. It is the longest's: indices that a Reshape to [bags, longest] takes fill every bag."""


def _fixed_bags_onnx(node: Node, ranks: Sequence[int]) -> str:
    """One-hot: rows alone. Otherwise sums of [B, k, ...]. Bags of different sizes are refused."""
    k, rank, weighted = node.args["fixed_lookups"], ranks[0], "Weighted" in node.type
    others = f"others = Constant<value_ints = {list(range(1, rank))}>()" if rank > 1 else ""
    column = f"{others} column = {'Unsqueeze(w, others)' if rank > 1 else 'Identity(w)'}"
    mean = "Mean" in node.type and k > 1
    return function(node, ["D", *(["w"] if weighted else []), "I", "L"], ["Y"], f"""
        {CONSTANTS}
        {_BAG_SIZE}
        looked_up = Gather(D, I)
        {column + " rows = Mul(looked_up, column)" if weighted else "rows = Identity(looked_up)"}
        row = Shape<start = 1>(D)
        shape = Concat<axis = 0>(bags, longest, row)
        rows_by_bag = Reshape<allowzero = 1>(rows, shape)
        {"sums" if mean else "Y"} = {"Squeeze" if k == 1 else "ReduceSum<keepdims = 0>"}(rows_by_bag, axis1)
        {"size = Cast<to = 1>(longest) inverse = Reciprocal(size) Y = Mul(sums, inverse)" if mean else ""}
    """, variant=["one_hot" if k == 1 else "fixed", *(["rank", rank] if rank != 2 else [])])


def _bags_onnx(node: Node, ranks: Sequence[int]) -> str:
    if node.args["fixed_lookups"]:
        return _fixed_bags_onnx(node, ranks)
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

    expect_total(node, position, lengths, indices.shape[0])
    if node.args["fixed_lookups"] == 1:
        return dy.clone()
    return torch.repeat_interleave(dy, lengths, dim=0, output_size=indices.shape[0])


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
_REPEATED = """
    row = Shape<start = 1>(dY)
    lookups = Shape(I)
    repeats = Concat<axis = 0>(bags, longest, row)
    dY_B1 = Unsqueeze({dy}, axis1)
    dY_Bk = Expand(dY_B1, repeats)
    by_lookup = Concat<axis = 0>(lookups, row)
    {rows} = Reshape<allowzero = 1>(dY_Bk, by_lookup)
"""
"""Each row of dY as often as the longest bag has lookups, as many as there are of them: otherwise refused."""


def _spread_rows(node: Node, rows: str, column: Callable[[str], str]) -> str:
    """What makes `rows` [K, ...] of dY [B, ...]: row b once for each index of bag b."""
    k, mean = node.args["fixed_lookups"], "Mean" in node.type
    if k == 1:
        return f"""
            row = Shape<start = 1>(dY)
            lookups = Shape(I)
            by_lookup = Concat<axis = 0>(lookups, row)
            {rows} = Reshape<allowzero = 1>(dY, by_lookup)
        """
    dy = "divided" if mean else "dY"
    if k:
        divided = "size = Cast<to = 1>(longest) inverse = Reciprocal(size) divided = Mul(dY, inverse)" if mean else ""
        return _BAG_SIZE + divided + _REPEATED.format(dy=dy, rows=rows)
    divided = _DIVIDED.format(column("inverse")) if mean else ""
    return _FILLED + _BAG_OF_EACH + divided + f"{rows} = Gather({dy}, bag)"


def _spread_onnx(node: Node, ranks: Sequence[int]) -> str:
    """The gradient operators: row b of dY, once for each index of bag b."""
    weighted, table = "Weighted" in node.type, "MainInput" in node.type
    rank, fixed = ranks[int(weighted)], node.args["fixed_lookups"]
    others = f"others = Constant<value_ints = {list(range(1, rank))}>()" if rank > 1 else ""

    def column(x: str) -> str:
        return f"Unsqueeze({x}, others)" if rank > 1 else f"Identity({x})"

    body = f"""
        {CONSTANTS}
        {others}
        {_spread_rows(node, "rows" if weighted else "Y", column)}
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
                    ["Y", *(["dw"] if table else [])], body,
                    variant=[*(["one_hot" if fixed == 1 else "fixed"] if fixed else []),
                             *(["rank", rank] if rank != 2 else [])])


def _gather_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Y = D[I], any dtype; along axis 0, the only one supported here."""
    expect_dtype(node, inputs, *INDEX, at=[1])
    expect_rank(node, inputs, 0, 1)
    return [TensorType(inputs[0].dtype, inputs[1].shape + inputs[0].shape[1:])]


def _gather_aten(node: Node, data, indices):
    """An index in [-N, -1] counts from the end, as in Caffe2."""
    expect_indices(node, 1, indices, len(data), least=-len(data))
    places = indices.reshape(-1)
    if len(places) and bounds(indices)[0] < 0:
        places = places % len(data)
    rows = data.index_select(0, places)
    return rows if indices.dim() == 1 else rows.reshape((*indices.shape, *data.shape[1:]))


def _gather_gradient(node: Node, outputs: Sequence[Gradient]) -> GradientOps:
    return GradientOps([], [Slice(node.inputs[1], dense(node, outputs[0])), None])


_FIXED = {"fixed_lookups": Arg("i", 0)}
_WEIGHTED = _FIXED | {"grad_on_weights": Arg("i", 0)}

OPERATORS = [
    Operator("SparseLengthsSum", (3, 3), (1, 1), _sum_infer, _sum_aten, _FIXED, _sum_gradient("Sum"), _bags_onnx),
    Operator("SparseLengthsMean", (3, 3), (1, 1), _sum_infer, _mean_aten, _FIXED, _sum_gradient("Mean"), _bags_onnx),
    Operator("SparseLengthsWeightedSum", (4, 4), (1, 1), _sum_infer, _weighted_aten, _WEIGHTED, _weighted_gradient,
             _bags_onnx),
    Operator(_GRADIENT.format("Sum"), (3, 3), (1, 1), _rows_infer(0, 1, 2), _sum_gradient_aten, _FIXED,
             onnx=_spread_onnx),
    Operator(_GRADIENT.format("Mean"), (3, 3), (1, 1), _rows_infer(0, 1, 2), _mean_gradient_aten, _FIXED,
             onnx=_spread_onnx),
    Operator(_GRADIENT.format("WeightedSum"), (4, 4), (1, 1), _weighted_gradient_infer, _weighted_gradient_aten,
             _WEIGHTED, onnx=_spread_onnx),
    Operator(_GRADIENT.format("WeightedSumWithMainInput"), (5, 5), (2, 2), _main_input_infer, _main_input_aten,
             _WEIGHTED, onnx=_spread_onnx),
    Operator("Gather", (2, 2), (1, 1), _gather_infer, _gather_aten, gradient=_gather_gradient,
             onnx=simple("D, I", "Y = Gather(D, I)")),
]
