"""The update of parameters: SGD, Adagrad, coalescing of a table's gradient, iteration and learning rate.

Updates add `lr * gradient`, so the learning rate is negative. Caffe2's sparse operators check no negative index
(ScatterWeightedSum none at all) and write outside the table; ours refuse one before anything is written.
A row listed several times is updated once for each time, in order, as in Caffe2.

The argument `distinct_rows` is ours: it promises that the rows are all different. Caffe2 ignores it, and ONNX models
need not sort them. A promise that is broken is not noticed there: one of a row's updates is lost.
"""

from collections.abc import Iterator, Sequence

from dlrm_caffe2.operators.lookup import pool
from dlrm_caffe2.operators.lowering import as_scalar, function, numbered, reshaped, simple
from dlrm_caffe2.operators.record import FLOAT, INT32, INT64, Arg, Node, Operator, TensorType
from dlrm_caffe2.operators.rules import (
    ANY_NUMBER,
    INDEX,
    expect_dtype,
    expect_indices,
    expect_rank,
    expect_shape,
    expect_size,
    no_gradient,
    size,
)
from dlrm_caffe2.operators.segments import CONSTANTS, KEYS, SORTED_RUNS, as_matrix, bag_sums, scattered


def _weighted_sum_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """X0, w0, X1, w1, ...: tensors of one size (their shape is not compared) and weights of one element."""
    node.require(len(inputs) % 2 == 0, f"expected pairs of a tensor and its weight, found {len(inputs)} inputs")
    expect_dtype(node, inputs, FLOAT)
    for position in range(0, len(inputs), 2):
        expect_size(node, inputs, position, size(inputs[0]))
        expect_size(node, inputs, position + 1, 1)
    return [inputs[0]]


def _weighted_sum_aten(node: Node, x, weight, *others):
    """A weight of 1 multiplies nothing; X0 is written into where it is the output, too."""
    first = float(weight)
    in_place = node.outputs[0] == node.inputs[0] and node.inputs[0] not in node.inputs[2:]
    total = x if in_place else x.clone()
    if first != 1:
        total *= first
    for other, weight in zip(others[::2], others[1::2], strict=True):
        total.add_(other.reshape(x.shape), alpha=float(weight))
    return total


def _weighted_sum_onnx(node: Node, ranks: Sequence[int]) -> str:
    count = len(ranks) // 2
    body = f"{as_scalar('w0s', 'w0', ranks[1])} sum0 = Mul(X0, w0s)"
    for number in range(1, count):
        body += f"""
            {reshaped(f"x{number}", f"X{number}", "X0")}
            {as_scalar(f"w{number}s", f"w{number}", ranks[2 * number + 1])}
            term{number} = Mul(x{number}, w{number}s)
            sum{number} = Add(sum{number - 1}, term{number})
        """
    names = [name for pair in zip(numbered("X", count), numbered("w", count), strict=True) for name in pair]
    return function(node, names, "Y", f"{body} Y = Identity(sum{count - 1})", variant=[count, "rank", *ranks])


def _occurrences(indices) -> Iterator:
    """Positions of the first occurrence of every index, of the second, ...: within each, all indices differ."""
    import torch

    if (indices[1:] > indices[:-1]).all():  # what Unique gives: one round, with nothing to sort
        yield slice(None)
        return
    ordered, order = indices.sort(stable=True)
    positions = torch.arange(len(indices), device=indices.device)
    rank = positions - (positions * _run_starts(ordered)).cummax(0).values
    for number in range(int(rank.max()) + 1):
        yield order[rank == number]


def _run_starts(ordered):
    """Where a new value begins in a sorted tensor."""
    import torch

    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


def _expect_rows(node: Node, inputs: Sequence[TensorType], indices: int, gradient: int) -> None:
    """One gradient row for each index, each with the size of a row of input 0."""
    expect_dtype(node, inputs, *INDEX, at=[indices])
    expect_rank(node, inputs, 0, 1)
    expect_rank(node, inputs, indices, 1, 1)
    expect_shape(node, inputs, gradient, inputs[indices].shape + inputs[0].shape[1:])


def _scatter_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """X, w0, I, X1, w1, of which Caffe2 allows several last pairs."""
    expect_dtype(node, inputs, FLOAT, at=[0, 1, 3, 4])
    _expect_rows(node, inputs, 2, 3)
    for weight in (1, 4):
        expect_size(node, inputs, weight, 1)
    return [inputs[0]]


def _scatter_aten(node: Node, x, w0, indices, x1, w1):
    """Each listed row times w0, once for every time it is listed; then X[I[k]] += w1 * X1[k], in the order of k."""
    expect_indices(node, 2, indices, x.shape[0])
    indices = indices.long()  # what index_copy_ takes; index_add_ is ten times slower with int32
    if not x1.numel():
        return x
    if float(w0) != 1:
        for positions in _occurrences(indices):
            rows = indices[positions]
            x.index_copy_(0, rows, x.index_select(0, rows) * w0.reshape(()))
    # Scaled first: index_add_ is several times slower with an alpha of its own.
    x.view(x.shape[0], -1).index_add_(0, indices, (x1 * float(w1)).reshape(indices.shape[0], -1))
    return x


def _scatter_onnx(node: Node, ranks: Sequence[int]) -> str:
    """A row's updates are summed first."""
    distinct = node.args["distinct_rows"]
    return function(node, ["X", "w0", "I", "X1", "w1"], _UPDATED[len(node.outputs) == 2], f"""
        {CONSTANTS}
        {as_scalar("old_weight", "w0", ranks[1])}
        {as_scalar("new_weight", "w1", ranks[4])}
        {_SCATTER_ONCE if distinct else _scatter_often(ranks)}
        {"" if len(node.outputs) == 2 else _scattered("Y", "X", "values")}
    """, variant=["rank", *ranks, *_variant(distinct, len(node.outputs) == 2)])


_SCATTER_ONCE = """
    rows = Cast<to = 7>(I)
    old = Gather(X, rows)
    kept = Mul(old, old_weight)
    added = Mul(X1, new_weight)
    values = Add(kept, added)
"""


def _scatter_often(ranks: Sequence[int]) -> str:
    return f"""
        {KEYS.format(indices="I")}
        {SORTED_RUNS}
        {as_matrix("updates", "X1", ranks[3])}
        {bag_sums("updates", "order")}
        rows = Identity(distinct)
        old = Gather(X, rows)
        times = Cast<to = 1>(sizes)
        factor = Pow(old_weight, times)
        {_column("factor", ranks[0])}
        kept = Mul(old, factor_column)
        {reshaped("sums_of_rows", "sums", "old")}
        added = Mul(sums_of_rows, new_weight)
        values = Add(kept, added)
    """


def _variant(distinct: int, rows_alone: bool) -> list[str]:
    return [*(["distinct"] if distinct else []), *(["rows"] if rows_alone else [])]


SPARSE_UPDATES = ("ScatterWeightedSum", "SparseAdagrad", "RowWiseSparseAdagrad")
_UPDATED = {False: ["Y"], True: ["rows", "values"]}
"""What a sparse update returns: the whole table or, with one output more than Caffe2's, the rows that changed alone."""


def _scattered(output: str, table: str, values: str) -> str:
    return f"{output}_rows_U1 = Unsqueeze(rows, axis1) {output} = ScatterND({table}, {output}_rows_U1, {values})"


def _column(x: str, rank: int) -> str:
    """x [U], shaped so that it multiplies whole rows of a tensor of this rank."""
    if rank == 1:
        return f"{x}_column = Identity({x})"
    return f"{x}_axes = Constant<value_ints = {list(range(1, rank))}>() {x}_column = Unsqueeze({x}, {x}_axes)"


def _unique_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, *INDEX)
    expect_rank(node, inputs, 0, 1, 1)
    return [TensorType(inputs[0].dtype, (-1,)), TensorType(INT32, inputs[0].shape)][:len(node.outputs)]


def _unique_aten(node: Node, indices):
    """The distinct indices, ascending, and for each index its place among them.

    By sorting, which was 50 times faster than torch.unique with return_inverse on 100,000 indices (PyTorch 2.13).
    """
    import torch

    ordered, order = indices.sort()
    first = _run_starts(ordered)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = first.cumsum(0, dtype=torch.int32) - 1
    return (ordered[first], places)[:len(node.outputs)]


def _unique_onnx(node: Node, ranks: Sequence[int]) -> str:
    """Not ONNX's Unique: ONNX Runtime's was 7 times slower on 100,000 indices (1.32). With two outputs more than
    Caffe2's, it also returns `order` and `sizes` of SORTED_RUNS."""
    places = """
        new_int = Cast<to = 7>(new)
        ordinal = CumSum(new_int, zero)
        nth = Sub(ordinal, one)
        unplaced = ConstantOfShape<value = int64[1] {0}>(count)
        order_K1 = Unsqueeze(order, axis1)
        placed = ScatterND(unplaced, order_K1, nth)
        places = Cast<to = 6>(placed)
    """ if len(node.outputs) > 1 else ""
    return function(node, "I", ["values", "places", "order", "sizes"][:len(node.outputs)], f"""
        {CONSTANTS}
        {KEYS.format(indices="I")}
        {SORTED_RUNS}
        values = CastLike(distinct, I)
        {places}
    """, variant=[len(node.outputs)])


def _segment_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    expect_dtype(node, inputs, FLOAT, at=[0])
    expect_dtype(node, inputs, INT32, at=[1])
    expect_rank(node, inputs, 0, 1)
    expect_shape(node, inputs, 1, inputs[0].shape[:1])
    rows = node.args["num_segments"]
    return [TensorType(FLOAT, (rows if rows >= 0 else -1, *inputs[0].shape[1:]))]


def _segment_aten(node: Node, data, ids):
    """Y[s] = sum, in order, of the rows whose id is s; `num_segments` of them, or as many as the greatest id asks.

    Looks the rows up in the order of their ids: faster than adding them one by one, and deterministic.
    """
    rows = node.args["num_segments"]
    if rows < 0:
        rows = int(ids.max()) + 1 if len(ids) else 0
    expect_indices(node, 1, ids, rows)
    return pool(data, ids.argsort(stable=True), ids.bincount(minlength=rows))


def _segment_onnx(node: Node, ranks: Sequence[int]) -> str:
    """With two inputs more than Caffe2's, `order` and `sizes` from the Unique that made I, nothing is sorted again."""
    if len(ranks) == 4:
        return function(node, ["D", "I", "order", "sizes"], "Y", f"""
            {CONSTANTS}
            {as_matrix("rows", "D", ranks[0])}
            {bag_sums("rows", "order")}
            segments = Shape(sizes)
            row = Shape<start = 1>(D)
            shape = Concat<axis = 0>(segments, row)
            Y = Reshape<allowzero = 1>(sums, shape)
        """, variant=["sorted", *(["rank", ranks[0]] if ranks[0] != 2 else [])])
    given = node.args["num_segments"] >= 0
    segments = "segments = Constant<value_ints = [{}]>()".format(node.args["num_segments"]) if given else """
        none = Constant<value_ints = [-1]>()
        all_keys = Concat<axis = 0>(none, keys)
        greatest = ReduceMax(all_keys)
        segments = Add(greatest, one)
    """
    return function(node, ["D", "I"], "Y", f"""
        {CONSTANTS}
        {KEYS.format(indices="I")}
        {SORTED_RUNS}
        {as_matrix("rows", "D", ranks[0])}
        {bag_sums("rows", "order")}
        {segments}
        {scattered("Y", "sums", "distinct_U1", "segments", "D", ranks[0])}
    """, variant=[*(["of", node.args["num_segments"]] if given else []),
                  *(["rank", ranks[0]] if ranks[0] != 2 else [])])


def _adagrad_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """P, M, g of one size, lr of one element. Caffe2 does not check the latter, and can return two more outputs."""
    expect_dtype(node, inputs, FLOAT)
    for position in (1, 2):
        expect_size(node, inputs, position, size(inputs[0]))
    expect_size(node, inputs, 3, 1)
    return [inputs[0], inputs[1]]


def _adagrad_aten(node: Node, parameter, moment, gradient, lr):
    """g += weight_decay P; M = decay M + g^2; P += lr g / (sqrt(M) + epsilon)."""
    args, flat = node.args, gradient.reshape(parameter.shape)
    if args["weight_decay"]:
        flat = flat + args["weight_decay"] * parameter
    moment = args["decay"] * moment + (flat * flat).reshape(moment.shape)
    step = lr.reshape(()) * flat / (moment.reshape(parameter.shape).sqrt() + args["epsilon"])
    return parameter + step, moment


def _constants(node: Node) -> tuple[list[str], str]:
    """Those arguments of an Adagrad that matter, and the constants that hold them."""
    used = ["epsilon", *(["weight_decay"] if node.args["weight_decay"] else []),
            *(["decay"] if node.args.get("decay", 1) != 1 else [])]
    return used, " ".join(f"{name} = Constant<value_float: float = @{name}>()" for name in used)


def _step(node: Node, p: str, h: str, g: str, row: Sequence[int] = (),
          new: tuple[str, str] = ("new_p", "new_h")) -> str:
    """The two of `new` from a parameter, its moment and its gradient, of one shape. With `row`, the axes of a row,
    there is one moment for each row."""
    pull = f"pull = Mul(weight_decay, {p}) gradient = Add({g}, pull)" if node.args["weight_decay"] else \
        f"gradient = Identity({g})"
    mean = f"""
        row = Constant<value_ints = {list(row)}>()
        added = ReduceMean<keepdims = 0>(squares, row)
    """ if row else "added = Identity(squares)"
    return f"""
        {pull}
        squares = Mul(gradient, gradient)
        {mean}
        {new[1]} = Add({h}, added)
        root = Sqrt({new[1]})
        scales = Add(root, epsilon)
        scale = {"Unsqueeze(scales, row)" if row else "Identity(scales)"}
        scaled = Mul(rate, gradient)
        step = Div(scaled, scale)
        {new[0]} = Add({p}, step)
    """


def _adagrad_onnx(node: Node, ranks: Sequence[int]) -> str:
    used, constants = _constants(node)
    return function(node, ["P", "M", "g", "lr"], ["new_p", "new_M"], f"""
        {constants}
        {as_scalar("rate", "lr", ranks[3])}
        {reshaped("given", "g", "P")}
        {reshaped("moment", "M", "P")}
        old = {"Mul(decay, moment)" if "decay" in used else "Identity(moment)"}
        {_step(node, "P", "old", "given")}
        {reshaped("new_M", "new_h", "M")}
    """, attributes=used, variant=["rank", ranks[3], *used[1:]])


def _sparse_adagrad_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """P [N, ...], M of the same shape, of which Caffe2 compares the size alone, I [K], g [K, ...], lr."""
    node.require(node.args["decay"] == 1, f"expected decay 1, found {node.args['decay']}")
    expect_dtype(node, inputs, FLOAT, at=[0, 1, 3, 4])
    _expect_rows(node, inputs, 2, 3)
    expect_shape(node, inputs, 1, inputs[0].shape)
    expect_size(node, inputs, 4, 1)
    return [inputs[0], inputs[1]]


def _rowwise_adagrad_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """P [N, ...], R [N], of which Caffe2 compares the size alone, I [K], g [K, ...], lr. Caffe2's counter input is not
    supported."""
    expect_dtype(node, inputs, FLOAT, at=[0, 1, 3, 4])
    _expect_rows(node, inputs, 2, 3)
    expect_shape(node, inputs, 1, inputs[0].shape[:1])
    expect_size(node, inputs, 4, 1)
    return [inputs[0], inputs[1]]


def _sparse_adagrad(rowwise: bool):
    def aten(node: Node, parameter, moment, indices, gradient, lr):
        """Adagrad on the listed rows: h += g^2, or its mean over the row; P += lr g / (sqrt(h) + epsilon)."""
        expect_indices(node, 2, indices, len(parameter))
        indices = indices.long()  # what index_copy_ takes
        if not gradient.numel():
            return parameter, moment
        p, g = (x.view(len(x), -1) for x in (parameter, gradient.contiguous()))
        h, decay = moment.view(len(p), -1), node.args["weight_decay"]
        for positions in _occurrences(indices):
            rows, g_KE = indices[positions], g[positions]
            p_KE = p.index_select(0, rows)
            if decay:
                g_KE = g_KE + decay * p_KE
            squares = g_KE * g_KE
            h_K = h.index_select(0, rows) + (squares.mean(1, keepdim=True) if rowwise else squares)
            h.index_copy_(0, rows, h_K)
            p.index_copy_(0, rows, p_KE + lr.reshape(()) * g_KE / (h_K.sqrt() + node.args["epsilon"]))
        return parameter, moment
    return aten


def _sparse_adagrad_onnx(node: Node, ranks: Sequence[int]) -> str:
    """The rows that are listed are taken out, updated, and put back."""
    row = range(1, ranks[0]) if node.type.startswith("RowWise") else ()
    used, constants = _constants(node)
    distinct, rows_alone = node.args["distinct_rows"], len(node.outputs) == 3
    scattered = "" if rows_alone else _scattered("new_P", "P", "values") + _scattered("new_M", "M", "moments")
    return function(node, ["P", "M", "I", "g", "lr"],
                    ["rows", "values", "moments"] if rows_alone else ["new_P", "new_M"], f"""
        {CONSTANTS}
        {constants}
        {as_scalar("rate", "lr", ranks[4])}
        {_adagrad_once(node, row) if distinct else _adagrad_often(node, row)}
        {scattered}
    """, attributes=used, variant=["rank", ranks[0], ranks[4], *used[1:], *_variant(distinct, rows_alone)])


def _adagrad_once(node: Node, row: Sequence[int]) -> str:
    return f"""
        rows = Cast<to = 7>(I)
        old_p = Gather(P, rows)
        old_h = Gather(M, rows)
        {_step(node, "old_p", "old_h", "g", row, ("values", "moments"))}
    """


def _adagrad_often(node: Node, row: Sequence[int]) -> str:
    """In as many turns as the most repeated row is listed."""
    return f"""
        {KEYS.format(indices="I")}
        {SORTED_RUNS}
        rows = Identity(distinct)
        old_p_U = Gather(P, rows)
        old_h_U = Gather(M, rows)
        all_sizes = Concat<axis = 0>(axis0, sizes)
        turns = ReduceMax<keepdims = 0>(all_sizes)
        any = Greater(turns, zero)
        values, moments = Loop<body = turn (int64 number, bool going, p_in, h_in) => (bool go_on, p_out, h_out) {{
            go_on = Identity(going)
            has_more = Greater(sizes, number)
            active_1A = NonZero(has_more)
            active = Squeeze(active_1A, axis0)
            active_A1 = Unsqueeze(active, axis1)
            start = Gather(starts, active)
            place = Add(start, number)
            source = Gather(order, place)
            g_A = Gather(g, source)
            p_A = Gather(p_in, active)
            h_A = Gather(h_in, active)
            {_step(node, "p_A", "h_A", "g_A", row)}
            p_out = ScatterND(p_in, active_A1, new_p)
            h_out = ScatterND(h_in, active_A1, new_h)
        }}>(turns, any, old_p_U, old_h_U)
    """


def _iter_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Stricter than Caffe2, which silently overwrites a counter of another dtype."""
    expect_dtype(node, inputs, INT64)
    expect_size(node, inputs, 0, 1)
    return [inputs[0]]


def _iter_aten(node: Node, counter):
    return counter.add_(1)


def _rate_infer(node: Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    node.require(node.args["policy"] == "fixed", f"expected policy 'fixed', found '{node.args['policy']}'")
    expect_dtype(node, inputs, INT64)
    expect_size(node, inputs, 0, 1)
    return [TensorType(FLOAT, ())]


def _rate_aten(node: Node, counter):
    import torch

    return torch.full((), node.args["base_lr"], dtype=torch.float32, device=counter.device)


_ITER = """
    one = Constant<value_int = 1>()
    Y = Add(N, one)
"""

_DISTINCT = {"distinct_rows": Arg("i", 0)}
_ADAGRAD = {"epsilon": Arg("f", 1e-5), "weight_decay": Arg("f", 0.0)}
_DECAY = {"decay": Arg("f", 1.0)}
_BOTH = {0: 0, 1: 1}
_MISSPELT = ("decay_", "weight_decay_")
"""So facebookresearch/dlrm writes the arguments, and Caffe2 reads its defaults."""

OPERATORS = [
    Operator("WeightedSum", (2, ANY_NUMBER), (1, 1), _weighted_sum_infer, _weighted_sum_aten,
             onnx=_weighted_sum_onnx),
    Operator("ScatterWeightedSum", (5, 5), (1, 1), _scatter_infer, _scatter_aten, _DISTINCT,
             onnx=_scatter_onnx, in_place={0: 0}),
    Operator("Unique", (1, 1), (1, 2), _unique_infer, _unique_aten, onnx=_unique_onnx),
    Operator("UnsortedSegmentSum", (2, 2), (1, 1), _segment_infer, _segment_aten, {"num_segments": Arg("i", -1)},
             onnx=_segment_onnx),
    Operator("Adagrad", (4, 4), (2, 2), _adagrad_infer, _adagrad_aten, _ADAGRAD | _DECAY,
             onnx=_adagrad_onnx, ignored=_MISSPELT),
    Operator("SparseAdagrad", (5, 5), (2, 2), _sparse_adagrad_infer, _sparse_adagrad(rowwise=False),
             _ADAGRAD | _DECAY | _DISTINCT, onnx=_sparse_adagrad_onnx, in_place=_BOTH, ignored=_MISSPELT),
    Operator("RowWiseSparseAdagrad", (5, 5), (2, 2), _rowwise_adagrad_infer, _sparse_adagrad(rowwise=True),
             _ADAGRAD | _DISTINCT, onnx=_sparse_adagrad_onnx, in_place=_BOTH, ignored=_MISSPELT),
    Operator("Iter", (1, 1), (1, 1), _iter_infer, _iter_aten, gradient=no_gradient,
             onnx=simple("N", _ITER), in_place={0: 0}),
    Operator("LearningRate", (1, 1), (1, 1), _rate_infer, _rate_aten,
             {"base_lr": Arg("f", required=True), "policy": Arg("s", required=True)}, no_gradient,
             simple("N", "Y = Constant<value_float: float = @base_lr>()", "base_lr")),
]
