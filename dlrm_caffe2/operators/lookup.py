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


_TILE_ROWS = 16

_TILING = """
    {to}_padded = Add({sizes}, radix_less_1)
    {to}_tiles = Div({to}_padded, radix)
    {to}_bag_starts = CumSum<exclusive = 1>({sizes}, zero)
    {to}_tile_starts = CumSum<exclusive = 1>({to}_tiles, zero)
    {to}_count = ReduceSum({to}_tiles)
    {to}_zeros = ConstantOfShape<value = int64[1] {{0}}>({to}_count)
    {to}_bags = Shape({to}_tiles)
    {to}_ones = ConstantOfShape<value = int64[1] {{1}}>({to}_bags)
    {to}_tile_starts_P1 = Unsqueeze({to}_tile_starts, axis1)
    {to}_marks = ScatterND({to}_zeros, {to}_tile_starts_P1, {to}_ones)
    {to}_ordinal = CumSum({to}_marks, zero)
    {to}_bag = Sub({to}_ordinal, one)
    {to}_count_scalar = Squeeze({to}_count)
    {to}_tile = Range(zero, {to}_count_scalar, one)
    {to}_first_tile = Gather({to}_tile_starts, {to}_bag)
    {to}_nth_tile = Sub({to}_tile, {to}_first_tile)
    {to}_offset = Mul({to}_nth_tile, radix)
    {to}_bag_start = Gather({to}_bag_starts, {to}_bag)
    {to}_start = Add({to}_bag_start, {to}_offset)
    {to}_size = Gather({sizes}, {to}_bag)
    {to}_left = Sub({to}_size, {to}_offset)
    {to}_start_T1 = Unsqueeze({to}_start, axis1)
    {to}_left_T1 = Unsqueeze({to}_left, axis1)
    {to}_used_TR = Less(lane, {to}_left_T1)
    {to}_last_T1 = Sub({to}_left_T1, one)
    {to}_lane_TR = Min(lane, {to}_last_T1)
    {to}_place_TR = Add({to}_start_T1, {to}_lane_TR)
    {to}_all_tiles = Concat<axis = 0>(axis1, {to}_tiles)
    {to}_most = ReduceMax<keepdims = 0>({to}_all_tiles)
    {to}_more = Greater({to}_most, one)
"""
"""Cuts bags of `sizes` [P] rows, none empty, into `tiles` [P] tiles of `radix` rows, a bag's last one shorter.

`place` [T, R] says where the rows of each tile are and `used` which of them it has; the others point at its last.
`more`: some bag has more than one tile.
"""

_AS_MATRIX = """
    row = Shape<start = 1>(D)
    row_and_1 = Concat<axis = 0>(axis1, row)
    row_size = ReduceProd(row_and_1)
    places = Shape(index_TR)
    places_by_width = Concat<axis = 0>(places, row_size)
    rows_TR = Gather(D, index_TR)
    rows_TRW = Reshape<allowzero = 1>(rows_TR, places_by_width)
"""
_AS_ROWS = """
    bags_by_row = Concat<axis = 0>(bags, row)
    Y = Reshape<allowzero = 1>({}, bags_by_row)
"""
"""Tables of another rank than 2: their rows as vectors, and the sums back in the rows' shape."""
_WEIGHTED_MASK = """
    nothing = Constant<value_float = 0.0>()
    weight_TR = Gather(w, first_place_TR)
    mask_TR = Where(first_used_TR, weight_TR, nothing)
"""
_AVERAGE = """
    divisor = Max(sizes_B, one)
    divisor_float = Cast<to = 1>(divisor)
    inverse = Reciprocal(divisor_float)
    inverse_B1 = Unsqueeze(inverse, axis1)
    {} = Mul(sums_BW, inverse_B1)
"""


def _bags_onnx(node: Node, ranks: Sequence[int]) -> str:
    """Sums of ragged bags, as a tree: a tile of up to 16 rows is summed by one product with its mask (or weights),
    and the tiles' sums are the rows of the next turn, until every bag has one row left.

    ONNX has no such operator. This one works in proportion to rows + 16 bags, however skewed the bags are; adds in
    an order that does not depend on threads; and scatters to distinct rows only: a sum by ScatterND(reduction=add)
    is a data race in ONNX Runtime. Unused places are multiplied by 0, so that an infinite row may give NaN.
    """
    weighted, mean, matrix = "Weighted" in node.type, "Mean" in node.type, ranks[0] == 2
    body = f"""
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        axis0 = Constant<value_ints = [0]>()
        axis1 = Constant<value_ints = [1]>()
        tile_rows = Constant<value_ints = [{_TILE_ROWS}]>()
        sizes_B = Cast<to = 7>(L)
        filled_1P = NonZero(sizes_B)
        filled = Squeeze(filled_1P, axis0)
        sizes = Gather(sizes_B, filled)
        all_sizes = Concat<axis = 0>(axis1, sizes)
        longest = ReduceMax(all_sizes)
        radix = Min(longest, tile_rows)
        radix_less_1 = Sub(radix, one)
        radix_scalar = Squeeze(radix)
        lane = Range(zero, radix_scalar, one)
        {_TILING.format(to="first", sizes="sizes")}
        index_TR = Gather(I, first_place_TR)
        {"rows_TRW = Gather(D, index_TR)" if matrix else _AS_MATRIX}
        {_WEIGHTED_MASK if weighted else "mask_TR = Cast<to = 1>(first_used_TR)"}
        mask_T1R = Unsqueeze(mask_TR, axis1)
        sum_T1W = MatMul(mask_T1R, rows_TRW)
        first_sums = Squeeze(sum_T1W, axis1)
        tiles, sums = Loop<body = turn (int64 number, bool going, sizes_in, rows_in)
                                    => (bool next_more, next_tiles, next_sums) {{
            {_TILING.format(to="next", sizes="sizes_in")}
            next_rows_TRW = Gather(rows_in, next_place_TR)
            next_mask_TR = Cast<to = 1>(next_used_TR)
            next_mask_T1R = Unsqueeze(next_mask_TR, axis1)
            next_sum_T1W = MatMul(next_mask_T1R, next_rows_TRW)
            next_sums = Squeeze(next_sum_T1W, axis1)
        }}>(, first_more, first_tiles, first_sums)
        filled_P1 = Unsqueeze(filled, axis1)
        bags = Shape(L)
        width = Shape<start = 2>(rows_TRW)
        bags_by_width = Concat<axis = 0>(bags, width)
        empty_BW = ConstantOfShape(bags_by_width)
        {"sums_BW" if mean or not matrix else "Y"} = ScatterND(empty_BW, filled_P1, sums)
        {_AVERAGE.format("Y" if matrix else "mean_BW") if mean else ""}
        {"" if matrix else _AS_ROWS.format("mean_BW" if mean else "sums_BW")}
    """
    return function(node, ["D", *(["w"] if weighted else []), "I", "L"], ["Y"], body,
                    variant=() if matrix else ("rank", ranks[0]))


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
    Operator(_GRADIENT.format("Sum"), (3, 3), (1, 1), _rows_infer(0, 1, 2), _sum_gradient_aten),
    Operator(_GRADIENT.format("Mean"), (3, 3), (1, 1), _rows_infer(0, 1, 2), _mean_gradient_aten),
    Operator(_GRADIENT.format("WeightedSum"), (4, 4), (1, 1), _weighted_gradient_infer, _weighted_gradient_aten,
             _WEIGHTS),
    Operator(_GRADIENT.format("WeightedSumWithMainInput"), (5, 5), (2, 2), _main_input_infer, _main_input_aten,
             _WEIGHTS),
    Operator("Gather", (2, 2), (1, 1), _gather_infer, _gather_aten, gradient=_gather_gradient,
             onnx=simple("D, I", "Y = Gather(D, I)")),
]
