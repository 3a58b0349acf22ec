"""Sums of ragged bags in ONNX, which has no operator for them: model-local functions of the domain "dlrm".

A tree. A bag of n rows is cut into tiles of up to 16; a tile is summed by one product with its mask (or with its
rows' weights); the tiles' sums are the rows of the next turn, until every bag has one row left. The work is in
proportion to rows + 16 bags, however skewed the bags are, there is no loop over bags, and the order of additions
does not depend on threads. Sums are scattered to distinct rows only: ScatterND(reduction="add") on rows that repeat
is a data race in ONNX Runtime.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "dlrm"
SUM = f"{DOMAIN}::RaggedSum"
WEIGHTED_SUM = f"{DOMAIN}::RaggedWeightedSum"
TILE_ROWS = 16

_HEAD = '<domain: "dlrm", opset_import: ["": {opset}, "dlrm": 1]>'

_TILES = _HEAD + """
Tiles (sizes_P, radix) => (tiles_P, place_TR, mask_TR, more) {{
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    short_of_next_P = Sub(radix, one)
    padded_P = Add(sizes_P, short_of_next_P)
    tiles_P = Div(padded_P, radix)
    zero_and_tiles = Concat<axis = 0>(axis0, tiles_P)
    count_1 = ReduceSum(zero_and_tiles)
    count = Squeeze(count_1)
    bags = Shape(sizes_P)
    more_1 = Greater(count_1, bags)
    more = Squeeze(more_1)

    first_tile_P = CumSum<exclusive = 1>(tiles_P, zero)
    first_tile_P1 = Unsqueeze(first_tile_P, axis1)
    unmarked_T = ConstantOfShape<value = int64[1] {{0}}>(count_1)
    marks_P = ConstantOfShape<value = int64[1] {{1}}>(bags)
    marked_T = ScatterND(unmarked_T, first_tile_P1, marks_P)
    ordinal_T = CumSum(marked_T, zero)
    bag_T = Sub(ordinal_T, one)

    tile_T = Range(zero, count, one)
    bags_first_tile_T = Gather(first_tile_P, bag_T)
    nth_T = Sub(tile_T, bags_first_tile_T)
    skipped_T = Mul(nth_T, radix)
    bag_start_P = CumSum<exclusive = 1>(sizes_P, zero)
    bag_start_T = Gather(bag_start_P, bag_T)
    start_T = Add(bag_start_T, skipped_T)
    start_T1 = Unsqueeze(start_T, axis1)
    bag_size_T = Gather(sizes_P, bag_T)
    left_T = Sub(bag_size_T, skipped_T)
    left_T1 = Unsqueeze(left_T, axis1)
    last_T1 = Sub(left_T1, one)

    end = Squeeze(radix)
    lane_R = Range(zero, end, one)
    used_TR = Less(lane_R, left_T1)
    mask_TR = Cast<to = 1>(used_TR)
    step_TR = Min(lane_R, last_T1)
    place_TR = Add(start_T1, step_TR)
}}
"""
"""Cuts P bags of sizes int64 [P], none of them 0, into tiles of `radix` int64 [1] rows, a bag's last one shorter.

`tiles`: how many of each bag. `place` [T, R]: where the rows of each tile are; `mask` is 1 for those that it has, and
0 for the rest, which are its last row again. `more`: some bag has more than one tile. Where there is no bag, ONNX
Runtime 1.16 would reduce `tiles` to a scalar; so a 0 goes with them.
"""

_BAGS = _HEAD + """
{name} ({inputs}) => (Y) {{
    zero = Constant<value_int = 0>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
    most_rows = Constant<value_ints = [{rows}]>()
    sizes_B = Cast<to = 7>(lengths)
    filled_1P = NonZero(sizes_B)
    filled_P = Squeeze(filled_1P, axis0)
    filled_P1 = Unsqueeze(filled_P, axis1)
    sizes_P = Gather(sizes_B, filled_P)
    sizes_and_1 = Concat<axis = 0>(axis1, sizes_P)
    longest = ReduceMax(sizes_and_1)
    radix = Min(longest, most_rows)

    tiles_P, place_TR, mask_TR, more = dlrm.Tiles(sizes_P, radix)
    index_TR = Gather(indices, place_TR)
    rows_TRE = Gather(table, index_TR)
    {factors}
    factor_T1R = Unsqueeze(factor_TR, axis1)
    sum_T1E = MatMul(factor_T1R, rows_TRE)
    sum_TE = Squeeze(sum_T1E, axis1)

    last_tiles_P, sum_PE = Loop<body = turn (int64 number, bool going, sizes_in, rows_in)
                                         => (bool next_more, next_tiles, next_sum_TE) {{
        next_tiles, next_place_TR, next_mask_TR, next_more = dlrm.Tiles(sizes_in, radix)
        next_rows_TRE = Gather(rows_in, next_place_TR)
        next_mask_T1R = Unsqueeze(next_mask_TR, axis1)
        next_sum_T1E = MatMul(next_mask_T1R, next_rows_TRE)
        next_sum_TE = Squeeze(next_sum_T1E, axis1)
    }}>(, more, tiles_P, sum_TE)

    batch = Shape(lengths)
    width = Shape<start = 1>(table)
    batch_and_width = Concat<axis = 0>(batch, width)
    zeros_BE = ConstantOfShape(batch_and_width)
    Y = ScatterND(zeros_BE, filled_P1, sum_PE)
}}
"""
"""Y [B, E] of a table [N, E], indices int64 [K], lengths [B]; a row of weights [K] multiplies its row of the table."""


def functions(opset: int) -> "list[onnx.FunctionProto]":
    """The bodies of SUM (table, indices, lengths) and WEIGHTED_SUM (table, weights, indices, lengths)."""
    from onnx import parser

    bags = {
        SUM: ("table, indices, lengths", "factor_TR = Identity(mask_TR)"),
        WEIGHTED_SUM: ("table, weights, indices, lengths",
                       "weight_TR = Gather(weights, place_TR)\nfactor_TR = Mul(mask_TR, weight_TR)"),
    }
    texts = [_TILES.format(opset=opset)]
    for name, (inputs, factors) in bags.items():
        texts.append(_BAGS.format(opset=opset, name=name.split("::")[1], inputs=inputs, factors=factors,
                                  rows=TILE_ROWS))
    return [parser.parse_function(text) for text in texts]
