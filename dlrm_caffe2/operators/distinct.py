"""Rows made distinct: Unique finds them, UnsortedSegmentSum adds up what belongs to each."""

from collections.abc import Sequence

from dlrm_caffe2.operators.lookup import pool
from dlrm_caffe2.operators.lowering import function
from dlrm_caffe2.operators.record import FLOAT, INT32, Arg, Node, Operator, TensorType
from dlrm_caffe2.operators.rules import (
    INDEX,
    expect_dtype,
    expect_indices,
    expect_rank,
    expect_shape,
)
from dlrm_caffe2.operators.segments import CONSTANTS, KEYS, SORTED_RUNS, as_matrix, bag_sums, scattered


def run_starts(ordered):
    """Where a new value begins in a sorted tensor."""
    import torch

    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


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
    first = run_starts(ordered)
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

OPERATORS = [
    Operator("Unique", (1, 1), (1, 2), _unique_infer, _unique_aten, onnx=_unique_onnx),
    Operator("UnsortedSegmentSum", (2, 2), (1, 1), _segment_infer, _segment_aten, {"num_segments": Arg("i", -1)},
             onnx=_segment_onnx),
]
