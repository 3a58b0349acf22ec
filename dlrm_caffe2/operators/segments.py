"""Sums of rows that belong together, as texts that lowerings are made of.

ONNX has no such operator, and a sum by ScatterND(reduction=add) is a data race in ONNX Runtime. These add in an order
that does not depend on threads, and scatter to distinct places only.
"""

CONSTANTS = """
    zero = Constant<value_int = 0>()
    one = Constant<value_int = 1>()
    axis0 = Constant<value_ints = [0]>()
    axis1 = Constant<value_ints = [1]>()
"""
"""What all texts here refer to."""

_TILE_ROWS = 16

_TILING = """
    {to}_radix_less_1 = Sub({to}_radix, one)
    {to}_radix_scalar = Squeeze({to}_radix)
    {to}_lane = Range(zero, {to}_radix_scalar, one)
    {to}_padded = Add({sizes}, {to}_radix_less_1)
    {to}_tiles = Div({to}_padded, {to}_radix)
    {to}_tile_starts = CumSum<exclusive = 1>({to}_tiles, zero)
    {to}_0_and_tiles = Concat<axis = 0>(axis0, {to}_tiles)
    {to}_count = ReduceSum({to}_0_and_tiles)
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
    {to}_offset = Mul({to}_nth_tile, {to}_radix)
    {to}_bag_start = Gather({starts}, {to}_bag)
    {to}_start = Add({to}_bag_start, {to}_offset)
    {to}_size = Gather({sizes}, {to}_bag)
    {to}_left = Sub({to}_size, {to}_offset)
    {to}_start_T1 = Unsqueeze({to}_start, axis1)
    {to}_left_T1 = Unsqueeze({to}_left, axis1)
    {to}_used_TR = Less({to}_lane, {to}_left_T1)
    {to}_last_T1 = Sub({to}_left_T1, one)
    {to}_lane_TR = Min({to}_lane, {to}_last_T1)
    {to}_place_TR = Add({to}_start_T1, {to}_lane_TR)
    {to}_all_tiles = Concat<axis = 0>(axis1, {to}_tiles)
    {to}_most = ReduceMax({to}_all_tiles)
    {to}_more_1 = Greater({to}_most, one)
    {to}_more = Squeeze({to}_more_1)
"""
"""Cuts bags of `sizes` [P] rows, none empty, which begin at `starts`, into `tiles` [P] tiles of `radix` [1] rows; a
bag's last one is shorter.

`place` [T, R] says where the rows of each tile are and `used` which of them it has; the others point at its last.
`more`: some bag has more than one tile, and `most` [1] is how many. Where there is no bag, ONNX Runtime 1.16 would
reduce `tiles` to a scalar; so a 0 goes with them.
"""

KEYS = """
    keys = Cast<to = 7>({indices})
    count = Shape(keys)
"""

SORTED_RUNS = """
    ordered, order = TopK<axis = 0, largest = 0, sorted = 1>(keys, count)
    least = Slice(ordered, axis0, axis1)
    below = Sub(least, one)
    all_but_last = Constant<value_ints = [-1]>()
    ahead = Slice(ordered, axis0, all_but_last)
    previous = Concat<axis = 0>(below, ahead)
    repeated = Equal(ordered, previous)
    new = Not(repeated)
    starts_1U = NonZero(new)
    starts = Squeeze(starts_1U, axis0)
    distinct = Gather(ordered, starts)
    bounds = Concat<axis = 0>(starts, count)
    behind_last = Constant<value_ints = [2147483647]>()
    ends = Slice(bounds, axis1, behind_last)
    sizes = Sub(ends, starts)
    distinct_U1 = Unsqueeze(distinct, axis1)
"""
"""Sorts the KEYS [K], equal ones in the order in which they come: `ordered` is what `order` picks. Of the U `distinct`
ones, number u fills the `sizes`[u] places from `starts`[u] on; its first is `new`."""


def as_matrix(matrix: str, tensor: str, rank: int) -> str:
    """`matrix` [N, W] of a tensor [N, ...]."""
    if rank == 2:
        return f"{matrix} = Identity({tensor})"
    return f"""
        {matrix}_height = Shape<end = 1>({tensor})
        {matrix}_row = Shape<start = 1>({tensor})
        {matrix}_row_and_1 = Concat<axis = 0>(axis1, {matrix}_row)
        {matrix}_width = ReduceProd({matrix}_row_and_1)
        {matrix}_shape = Concat<axis = 0>({matrix}_height, {matrix}_width)
        {matrix} = Reshape<allowzero = 1>({tensor}, {matrix}_shape)
    """


def bag_sums(rows: str, places: str, weights: str | None = None) -> str:
    """`sums` [P, W]: of a matrix of rows, those at the first `sizes`[0] places, those at the next `sizes`[1] and so on.
    No size is 0. `places` [K] and `weights` [K], which each row is multiplied by, are in the order of the bags.

    A bag of one row is that row. The sum of any other is a tree: a tile of up to 16 rows is summed by one product with
    its mask (or weights), and the tiles' sums are the rows of the next turn, until every bag has one row left. A tile
    has at most twice as many rows as the bags have on average, so that the work is in proportion to the rows, however
    skewed the bags are. Unused places are multiplied by 0, so that an infinite row may give NaN.
    """
    mask, once = "mask_TR = Cast<to = 1>(first_used_TR)", "row_of_each = Identity(first_row)"
    if weights is not None:
        mask = f"""
            nothing = Constant<value_float = 0.0>()
            weight_TR = Gather({weights}, first_place_TR)
            mask_TR = Where(first_used_TR, weight_TR, nothing)
        """
        once = f"""
            first_weight = Gather({weights}, bag_starts)
            first_weight_P1 = Unsqueeze(first_weight, axis1)
            row_of_each = Mul(first_row, first_weight_P1)
        """
    return f"""
        bag_starts = CumSum<exclusive = 1>(sizes, zero)
        first_of_each = Gather({places}, bag_starts)
        first_row = Gather({rows}, first_of_each)
        {once}
        is_several = Greater(sizes, one)
        several_1S = NonZero(is_several)
        several = Squeeze(several_1S, axis0)
        several_S1 = Unsqueeze(several, axis1)
        several_sizes = Gather(sizes, several)
        several_starts = Gather(bag_starts, several)

        tile_rows = Constant<value_ints = [{_TILE_ROWS}]>()
        sizes_and_1 = Concat<axis = 0>(axis1, several_sizes)
        longest = ReduceMax(sizes_and_1)
        total = ReduceSum(sizes_and_1)
        number = Shape(sizes_and_1)
        mean = Div(total, number)
        mean_and_1 = Add(mean, one)
        twice_mean = Add(mean_and_1, mean_and_1)
        first_radix = Min(longest, tile_rows, twice_mean)
        {_TILING.format(to="first", sizes="several_sizes", starts="several_starts")}
        place_TR = Gather({places}, first_place_TR)
        rows_TRW = Gather({rows}, place_TR)
        {mask}
        mask_T1R = Unsqueeze(mask_TR, axis1)
        sum_T1W = MatMul(mask_T1R, rows_TRW)
        first_sums = Squeeze(sum_T1W, axis1)
        tiles, most, tree_sums = Loop<body = turn (int64 turn_number, bool going, sizes_in, most_in, rows_in)
                                          => (bool next_more, next_tiles, next_most, next_sums) {{
            next_radix = Min(most_in, tile_rows)
            next_starts = CumSum<exclusive = 1>(sizes_in, zero)
            {_TILING.format(to="next", sizes="sizes_in", starts="next_starts")}
            next_rows_TRW = Gather(rows_in, next_place_TR)
            next_mask_TR = Cast<to = 1>(next_used_TR)
            next_mask_T1R = Unsqueeze(next_mask_TR, axis1)
            next_sum_T1W = MatMul(next_mask_T1R, next_rows_TRW)
            next_sums = Squeeze(next_sum_T1W, axis1)
        }}>(, first_more, first_tiles, first_most, first_sums)
        sums = ScatterND(row_of_each, several_S1, tree_sums)
    """


def scattered(output: str, values: str, places_P1: str, count: str, like: str, rank: int) -> str:
    """`output` [count, ...]: the rows of a matrix at distinct places, zeros elsewhere, each row shaped like those of
    `like`, a tensor of this rank."""
    matrix = output if rank == 2 else f"{output}_matrix"
    text = f"""
        {output}_width = Shape<start = 1>({values})
        {output}_by_width = Concat<axis = 0>({count}, {output}_width)
        {output}_zeros = ConstantOfShape({output}_by_width)
        {matrix} = ScatterND({output}_zeros, {places_P1}, {values})
    """
    if rank == 2:
        return text
    return text + f"""
        {output}_row_shape = Shape<start = 1>({like})
        {output}_shape = Concat<axis = 0>({count}, {output}_row_shape)
        {output} = Reshape<allowzero = 1>({matrix}, {output}_shape)
    """
