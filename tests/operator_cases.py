"""One generator of cases for each Caffe2 operator: a definition and the arrays it is run on.

Small shapes on purpose, with empty batches and bags, repeated indices, zeros, and int32 and int64 indices.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from operator_source import Case, Source, make_case

from dlrm_caffe2.net import DATA_TYPES


def _fc_inputs(s: Source) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """X, whose leading dimensions and whose K may be one dimension or two; W; and the axis between them."""
    leading, k, n = s.shape(1, 2), s.choice((2,), (3,), (2, 2)), s.size(1)
    axis = {} if len(leading) == 1 else {"axis": len(leading)}
    return s.floats(*leading, *k), s.floats(n, int(np.prod(k))), axis


def _fc(s: Source) -> Case:
    x, w, axis = _fc_inputs(s)
    return make_case("FC", [x, w, s.floats(len(w))], **axis)


def _fc_gradient(s: Source) -> Case:
    x, w, axis = _fc_inputs(s)
    dy = s.floats(*x.shape[:axis.get("axis", 1)], len(w))
    return make_case("FCGradient", [x, w, dy], s.choice(2, 3), **axis)


def _batch_matmul(s: Source) -> Case:
    batch, m, k, n = s.shape(0, 2), s.size(1), s.size(), s.size(1)
    trans_a, trans_b = s.choice(0, 1), s.choice(0, 1)
    a = s.floats(*batch, *((k, m) if trans_a else (m, k)))
    b = s.floats(*batch, *((n, k) if trans_b else (k, n)))
    return make_case("BatchMatMul", [a, b], trans_a=trans_a, trans_b=trans_b)


def _unary(type: str, low: int = 0, **arguments: Any) -> Callable[[Source], Case]:
    return lambda s: make_case(type, [s.floats(*s.shape(low))], **arguments)


def _sigmoid(s: Source) -> Case:
    return make_case("Sigmoid", [np.asarray(s.rng.uniform(-100, 100, s.shape()), np.float32)])


def _like_output(type: str) -> Callable[[Source], Case]:
    """(Y, dY) with Y in [0, 1], as a sigmoid gives it, its ends included."""
    def build(s: Source) -> Case:
        shape = s.shape()
        return make_case(type, [np.asarray(s.rng.uniform(-0.2, 1.2, shape).clip(0, 1), np.float32), s.floats(*shape)])
    return build


def _lookup(type: str) -> Callable[[Source], Case]:
    def build(s: Source) -> Case:
        rows = s.size()
        indices, lengths, options = s.bags(rows)
        weights = [s.floats(len(indices))] if "Weighted" in type else []
        options |= {"grad_on_weights": s.choice(0, 1)} if weights else {}
        return make_case(type, [s.floats(rows, *s.shape(0, 2, least=1)), *weights, indices, lengths], **options)
    return build


def _lookup_gradient(type: str) -> Callable[[Source], Case]:
    def build(s: Source) -> Case:
        rows, row = s.size(1), s.shape(0, 2)
        indices, lengths, options = s.bags(rows)
        weights = [s.floats(len(indices))] if "Weighted" in type else []
        with_table = "MainInput" in type
        table = [s.floats(rows, *row)] if with_table else []
        options |= {"grad_on_weights": int(with_table)} if weights else {}
        return make_case(type, [*weights, s.floats(len(lengths), *row), lengths, *table, indices], 1 + with_table,
                         **options)
    return build


def _gather(s: Source) -> Case:
    rows, shape = s.size(), s.shape(0, 2)
    data = s.numbers(s.choice(np.float32, np.int64, np.float64), rows, *s.shape(0, 2))
    indices = s.indices(int(np.prod(shape)) if rows else 0, rows)
    indices = indices.reshape(shape if rows else (0,)) - rows * s.choice(0, 1)  # negative ones wrap
    return make_case("Gather", [data, indices])


def _batch_gather(s: Source) -> Case:
    columns, shape = s.size(1), s.shape(1, 2)
    data = s.numbers(s.choice(np.float32, np.int32), s.size(), columns, *s.shape(0, 1))
    return make_case("BatchGather", [data, s.indices(int(np.prod(shape)), columns).reshape(shape)])


def _batch_gather_gradient(s: Source) -> Case:
    batch, columns, rest, shape = s.size(), s.size(1), s.shape(0, 1), s.shape(1, 2)
    indices = s.indices(int(np.prod(shape)), columns).reshape(shape)
    return make_case("BatchGatherGradient", [s.floats(batch, columns, *rest), indices,
                                             s.floats(batch, *shape, *rest)])


def _concat(s: Source) -> Case:
    count, add_axis, dtype = s.size(1, 4), s.choice(0, 1), s.choice(np.float32, np.int32, np.int64)
    shape = list(s.shape(1, 3))
    axis = s.draw(st.integers(-len(shape) - add_axis, len(shape) + add_axis - 1))
    pieces = []
    for _ in range(count):
        if not add_axis:
            shape[axis] = s.size()
        pieces.append(s.numbers(dtype, *shape))
    return make_case("Concat", pieces, 2, axis=axis, add_axis=add_axis)


def _split(s: Source) -> Case:
    count, how, dtype = s.size(1, 4), s.choice("equal", "input", "argument", "stacked"), s.choice(np.float32, np.int64)
    shape = list(s.shape(1, 3))
    axis = s.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = [1] * count if how == "stacked" else [s.size()] * count if how == "equal" else [
        s.size() for _ in range(count)]
    shape[axis] = sum(sizes)
    x = s.numbers(dtype, *shape)
    if how == "stacked":
        lengths = [np.ones(count, np.int32)] if s.choice(True, False) else []
        return make_case("Split", [x, *lengths], count, axis=axis, add_axis=1)
    if how == "argument":
        return make_case("Split", [x], count, axis=axis, split=sizes)
    lengths = [np.array(sizes, np.int32)] if how == "input" else []
    return make_case("Split", [x, *lengths], count, axis=axis)


def _flatten(s: Source) -> Case:
    shape = s.shape(0, 4)
    return make_case("Flatten", [s.floats(*shape)], axis=s.draw(st.integers(0, len(shape))))


def _resize_like(s: Source) -> Case:
    shape = s.shape(0, 3)
    return make_case("ResizeLike", [s.floats(int(np.prod(shape))), s.floats(*shape)], axis=1)


def _cast(s: Source) -> Case:
    source = s.choice(np.float32, np.float64, np.int32, np.int64, np.bool_)
    target = s.choice(np.float32, np.float64, np.int32, np.int64, np.bool_)
    return make_case("Cast", [s.numbers(source, *s.shape())], to=DATA_TYPES[np.dtype(target)])


def _copy(inputs: int, type: str) -> Callable[[Source], Case]:
    return lambda s: make_case(type, [s.numbers(s.choice(np.float32, np.int64), *s.shape())
                                      for _ in range(inputs)])


def _sum(s: Source) -> Case:
    shape, dtype = s.shape(), s.choice(np.float32, np.float64, np.int32, np.int64)
    return make_case("Sum", [s.numbers(dtype, *shape) for _ in range(s.size(1, 4))])


def _scale(s: Source) -> Case:
    return make_case("Scale", [s.numbers(s.choice(np.float32, np.float64), *s.shape())], scale=s.choice(-0.3, 2.0))


def _two_class_gradient(s: Source) -> Case:
    return make_case("MakeTwoClassGradient", [s.floats(*s.shape(0, 2), 2)])


def _label(type: str) -> Callable[[Source], Case]:
    def build(s: Source) -> Case:
        samples, classes = s.size(), s.size(1, 4)
        p = s.rng.random((samples, *s.choice((), (1,)), classes)).astype(np.float32)
        p[s.rng.random(p.shape) < 0.1] = 0  # the floor of the logarithm
        label = s.rng.integers(0, classes, (samples, *s.choice((), (1,)))).astype(np.int32)
        return make_case(type, [p, label, *([s.floats(samples)] if "Gradient" in type else [])])
    return build


def _logits_shape(s: Source) -> tuple[int, ...]:
    return (*s.shape(0, 2), s.size(1))


def _logits(s: Source) -> Case:
    shape = _logits_shape(s)
    return make_case("SigmoidCrossEntropyWithLogits",
                     [s.floats(*shape) * s.choice(1, 20), s.rng.random(shape).astype(np.float32)])


def _logits_gradient(s: Source) -> Case:
    shape = _logits_shape(s)
    return make_case("SigmoidCrossEntropyWithLogitsGradient",
                     [s.floats(*shape[:-1]), s.floats(*shape), s.rng.random(shape).astype(np.float32)])


def _distance(s: Source) -> Case:
    shape = s.shape(1)
    return make_case("SquaredL2Distance", [s.floats(*shape), s.floats(*shape)])


def _distance_gradient(s: Source) -> Case:
    shape = s.shape(1)
    return make_case("SquaredL2DistanceGradient", [s.floats(*shape), s.floats(*shape), s.floats(shape[0])], 2)


def _clip_arguments(s: Source) -> dict[str, float]:
    return s.choice({}, {"min": 0.0}, {"max": 0.5}, {"min": -0.25, "max": 0.5}, {"min": 1.0, "max": 0.0})


def _clip(s: Source) -> Case:
    return make_case("Clip", [s.floats(*s.shape())], **_clip_arguments(s))


def _clip_gradient(s: Source) -> Case:
    shape = s.shape()
    y = s.rng.choice([-0.25, 0, 0.1, 0.5, 1], shape).astype(np.float32)
    return make_case("ClipGradient", [y, s.floats(*shape)], **_clip_arguments(s))


def _broadcast_shapes(s: Source) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    product = s.shape()
    shapes = [tuple(s.choice(1, length) for length in product)[s.draw(st.integers(0, len(product))):]
              for _ in range(2)]
    return (*shapes, np.broadcast_shapes(*shapes))


def _mul(s: Source) -> Case:
    (a, b, _), dtype = _broadcast_shapes(s), s.choice(np.float32, np.float64, np.int64)
    return make_case("Mul", [s.numbers(dtype, *a), s.numbers(dtype, *b)])


def _mul_gradient(s: Source) -> Case:
    a, b, product = _broadcast_shapes(s)
    return make_case("MulGradient", [s.floats(*product), s.floats(*a), s.floats(*b)], 2)


def _average_gradient(s: Source) -> Case:
    return make_case("AveragedLossGradient", [s.floats(*s.shape()), s.floats(*s.choice((), (1,)))])


def _constant(s: Source) -> Case:
    options = s.choice({"value": 0.5}, {"value": 3}, {"value": 3, "dtype": 2}, {"dtype": 10}, {"value": 1, "dtype": 5},
                       {"value": -1.5, "dtype": 13}, {})
    if s.choice(True, False):
        return make_case("ConstantFill", [s.floats(*s.shape())], **options)
    return make_case("ConstantFill", [], shape=list(s.shape()), **options)


def _given(type: str, dtype: Any) -> Callable[[Source], Case]:
    def build(s: Source) -> Case:
        values = s.numbers(dtype, *s.shape(0, 2))
        return make_case(type, [], values=values.reshape(-1), shape=list(values.shape))
    return build


def _weighted_sum(s: Source) -> Case:
    shape = s.shape()
    pairs = [array for _ in range(s.size(1, 3)) for array in (s.floats(*shape), s.floats(*s.choice((), (1,))))]
    return make_case("WeightedSum", pairs)


def _scatter(s: Source) -> Case:
    rows, row = s.size(1), s.shape(0, 2)
    indices, options = s.updated_rows(s.size(), rows)
    return make_case("ScatterWeightedSum", [s.floats(rows, *row), np.array([s.choice(1, 0.7)], np.float32), indices,
                                            s.floats(len(indices), *row), s.floats(1)], **options)


def _unique(s: Source) -> Case:
    return make_case("Unique", [s.indices(s.size(0, 8), 5)], s.choice(1, 2))


def _segment_sum(s: Source) -> Case:
    ids = s.indices(s.size(0, 8), 4).astype(np.int32)
    return make_case("UnsortedSegmentSum", [s.floats(len(ids), *s.shape(0, 2)), ids],
                     **s.choice({}, {"num_segments": -1}, {"num_segments": 4}, {"num_segments": 6}))


def _adagrad_arguments(s: Source) -> dict[str, float]:
    return {"epsilon": s.choice(1e-5, 0.1), **s.choice({}, {"weight_decay": 0.25})}


def _adagrad(s: Source) -> Case:
    shape = s.shape()
    return make_case("Adagrad", [s.floats(*shape), s.positive(*shape), s.floats(*shape), np.float32([-0.1])], 2,
                     **_adagrad_arguments(s), **s.choice({}, {"decay": 0.5}))


def _sparse_adagrad(type: str) -> Callable[[Source], Case]:
    def build(s: Source) -> Case:
        rows, row = s.size(1), s.shape(0, 2, least=1)  # Caffe2 divides by the size of a row
        indices, options = s.updated_rows(s.size(), rows)
        moment = s.positive(rows, *(() if "RowWise" in type else row))
        return make_case(type, [s.floats(rows, *row), moment, indices, s.floats(len(indices), *row),
                                np.float32([-0.1])], 2, **_adagrad_arguments(s), **options)
    return build


def _iter(s: Source) -> Case:
    return make_case("Iter", [np.full(s.choice((), (1,)), s.size(0, 100), np.int64)])


def _learning_rate(s: Source) -> Case:
    return make_case("LearningRate", [np.array([s.size(0, 100)], np.int64)], base_lr=-0.1, policy="fixed")


_BACK = "SparseLengthsIndicesInGradient{}Gradient".format

GENERATORS: dict[str, Callable[[Source], Case]] = {
    "FC": _fc, "FCGradient": _fc_gradient, "BatchMatMul": _batch_matmul,
    "Relu": _unary("Relu"), "ReluGradient": _like_output("ReluGradient"),
    "Sigmoid": _sigmoid, "SigmoidGradient": _like_output("SigmoidGradient"),
    **{type: _lookup(type) for type in ("SparseLengthsSum", "SparseLengthsMean", "SparseLengthsWeightedSum")},
    **{type: _lookup_gradient(type) for type in map(_BACK, ("Sum", "Mean", "WeightedSum",
                                                            "WeightedSumWithMainInput"))},
    "Gather": _gather, "BatchGather": _batch_gather, "BatchGatherGradient": _batch_gather_gradient,
    "Concat": _concat, "Split": _split, "Flatten": _flatten, "FlattenToVec": _unary("FlattenToVec", 1),
    "ResizeLike": _resize_like, "Cast": _cast, "Copy": _copy(1, "Copy"),
    "CopyOnDeviceLike": _copy(2, "CopyOnDeviceLike"), "Sum": _sum, "Scale": _scale,
    "MakeTwoClass": _unary("MakeTwoClass"), "MakeTwoClassGradient": _two_class_gradient,
    **{type: _label(type) for type in ("LabelCrossEntropy", "LabelCrossEntropyGradient")},
    "SigmoidCrossEntropyWithLogits": _logits, "SigmoidCrossEntropyWithLogitsGradient": _logits_gradient,
    "SquaredL2Distance": _distance, "SquaredL2DistanceGradient": _distance_gradient,
    "Clip": _clip, "ClipGradient": _clip_gradient, "Mul": _mul, "MulGradient": _mul_gradient,
    "AveragedLoss": _unary("AveragedLoss"), "AveragedLossGradient": _average_gradient,
    "ConstantFill": _constant, "GivenTensorFill": _given("GivenTensorFill", np.float32),
    "GivenTensorInt64Fill": _given("GivenTensorInt64Fill", np.int64),
    "GivenTensorIntFill": _given("GivenTensorIntFill", np.int32),
    "GivenTensorDoubleFill": _given("GivenTensorDoubleFill", np.float32),
    "GivenTensorBoolFill": _given("GivenTensorBoolFill", np.uint8),
    "WeightedSum": _weighted_sum, "ScatterWeightedSum": _scatter, "Unique": _unique,
    "UnsortedSegmentSum": _segment_sum, "Adagrad": _adagrad,
    **{type: _sparse_adagrad(type) for type in ("SparseAdagrad", "RowWiseSparseAdagrad")},
    "Iter": _iter, "LearningRate": _learning_rate,
}


@st.composite
def cases(draw: Callable, type: str) -> Case:
    return GENERATORS[type](Source(draw))
