"""Updates of some rows of a table: ScatterWeightedSum, SparseAdagrad and RowWiseSparseAdagrad.

Updates add `lr * gradient`, so the learning rate is negative. Caffe2's sparse operators check no negative index
(ScatterWeightedSum none at all) and write outside the table; ours refuse one before anything is written.
A row listed several times is updated once for each time, in order, as in Caffe2.

The argument `distinct_rows` is ours: it promises that the rows are all different. Caffe2 ignores it, and ONNX models
need not sort them. A promise that is broken is not noticed there: one of a row's updates is lost.
"""

from collections.abc import Iterator, Sequence

from dlrm_caffe2.operators.distinct import run_starts
from dlrm_caffe2.operators.lowering import as_scalar, function, reshaped
from dlrm_caffe2.operators.optimizer import ADAGRAD, DECAY, MISSPELT, adagrad_constants, adagrad_step
from dlrm_caffe2.operators.record import FLOAT, Arg, Node, Operator, TensorType
from dlrm_caffe2.operators.rules import (
    INDEX,
    are_contiguous,
    are_plain,
    expect_dtype,
    expect_indices,
    expect_rank,
    expect_shape,
    expect_size,
)
from dlrm_caffe2.operators.segments import CONSTANTS, KEYS, SORTED_RUNS, as_matrix, bag_sums


def _occurrences(indices) -> Iterator:
    """Positions of the first occurrence of every index, of the second, ...: within each, all indices differ."""
    import torch

    if (indices[1:] > indices[:-1]).all():  # what Unique gives: one round, with nothing to sort
        yield slice(None)
        return
    ordered, order = indices.sort(stable=True)
    positions = torch.arange(len(indices), device=indices.device)
    rank = positions - (positions * run_starts(ordered)).cummax(0).values
    for number in range(int(rank.max()) + 1):
        yield order[rank == number]


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
    if not x1.numel():
        return x
    if float(w0) == 1 and are_plain(x, x1) and are_contiguous(indices):
        from dlrm_caffe2.operators import kernels

        kernels.add_rows([x], [indices], [x1], float(w1))
        return x
    indices = indices.long()  # what index_copy_ takes; index_add_ is ten times slower with int32
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
    used, constants = adagrad_constants(node)
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
        {adagrad_step(node, "old_p", "old_h", "g", row, ("values", "moments"))}
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
            {adagrad_step(node, "p_A", "h_A", "g_A", row)}
            p_out = ScatterND(p_in, active_A1, new_p)
            h_out = ScatterND(h_in, active_A1, new_h)
        }}>(turns, any, old_p_U, old_h_U)
    """


_DISTINCT = {"distinct_rows": Arg("i", 0)}
_BOTH = {0: 0, 1: 1}

OPERATORS = [
    Operator("ScatterWeightedSum", (5, 5), (1, 1), _scatter_infer, _scatter_aten, _DISTINCT,
             onnx=_scatter_onnx, in_place={0: 0}),
    Operator("SparseAdagrad", (5, 5), (2, 2), _sparse_adagrad_infer, _sparse_adagrad(rowwise=False),
             ADAGRAD | DECAY | _DISTINCT, onnx=_sparse_adagrad_onnx, in_place=_BOTH, ignored=MISSPELT),
    Operator("RowWiseSparseAdagrad", (5, 5), (2, 2), _rowwise_adagrad_infer, _sparse_adagrad(rowwise=True),
             ADAGRAD | _DISTINCT, onnx=_sparse_adagrad_onnx, in_place=_BOTH, ignored=MISSPELT),
]
