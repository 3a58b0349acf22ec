"""What each Caffe2 operator computes, in float64 NumPy, written from its definition and not from our kernels.

A formula takes a Node and its inputs (float32 ones already in float64) and returns, for each output, the value and
the greatest error, in units of u = 2^-24, that float32 arithmetic in any order may make: the number of
roundings times the same expression on absolute values. 0 means exact: what only moves data, or whole numbers.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dlrm_caffe2.net import DTYPES
from dlrm_caffe2.operators import Node

Output = tuple[np.ndarray, np.ndarray | float]

TRANSCENDENTAL = 4
"""Budget of exp, log and log1p in units of u: 2 ULP, as the vector libraries of both engines promise."""


def _flat(x: np.ndarray, axis: int) -> np.ndarray:
    return x.reshape(int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis:])))


def _fc(node: Node, x, w, b) -> list[Output]:
    axis = node.args["axis"]
    x_MK, shape = _flat(x, axis), (*x.shape[:axis], len(b))
    gauge = abs(x_MK) @ abs(w).T + abs(b)
    return [((x_MK @ w.T + b).reshape(shape), ((w.shape[1] + 1) * gauge).reshape(shape))]


def _fc_gradient(node: Node, x, w, dy) -> list[Output]:
    x_MK = _flat(x, node.args["axis"])
    m, n = len(x_MK), len(w)
    dy_MN = dy.reshape(m, n)
    results = [(dy_MN.T @ x_MK, m * (abs(dy_MN).T @ abs(x_MK))),
               (dy_MN.sum(0), max(m - 1, 0) * abs(dy_MN).sum(0)),
               ((dy_MN @ w).reshape(x.shape), n * (abs(dy_MN) @ abs(w)).reshape(x.shape))]
    return results[:len(node.outputs)]


def _batch_matmul(node: Node, a, b) -> list[Output]:
    a = np.swapaxes(a, -1, -2) if node.args["trans_a"] else a
    b = np.swapaxes(b, -1, -2) if node.args["trans_b"] else b
    return [(a @ b, a.shape[-1] * (abs(a) @ abs(b)))]


def _sigmoid64(x) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _sigmoid(node: Node, x) -> list[Output]:
    y = _sigmoid64(x)
    return [(y, (TRANSCENDENTAL + 2) * y)]


def _bags(lengths) -> list[slice]:
    ends = np.cumsum(lengths)
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _column(x, like) -> np.ndarray:
    return x.reshape(-1, *[1] * (like.ndim - 1))


def _pooled(rows, lengths, roundings: int, scale=None) -> list[Output]:
    """Sums of the rows of each bag; `roundings` beyond the n - 1 additions of a bag of n."""
    shape = (len(lengths), *rows.shape[1:])
    value, gauge = np.zeros(shape), np.zeros(shape)
    for bag, part in enumerate(_bags(lengths)):
        factor = 1 if scale is None else scale[bag]
        value[bag] = rows[part].sum(0) * factor
        gauge[bag] = max(lengths[bag] - 1 + roundings, 0) * abs(rows[part]).sum(0) * factor
    return [(value, gauge)]


def _sum_lookup(node: Node, table, indices, lengths) -> list[Output]:
    return _pooled(table[indices], lengths, 0)


def _mean_lookup(node: Node, table, indices, lengths) -> list[Output]:
    return _pooled(table[indices], lengths, 2, 1 / np.maximum(lengths, 1))


def _weighted_lookup(node: Node, table, weights, indices, lengths) -> list[Output]:
    rows = table[indices]
    return _pooled(rows * _column(weights, rows), lengths, 1)


def _sum_back(node: Node, dy, lengths, indices) -> list[Output]:
    return [(np.repeat(dy, lengths, 0), 0)]


def _mean_back(node: Node, dy, lengths, indices) -> list[Output]:
    rows = np.repeat(dy * _column(1 / np.maximum(lengths, 1), dy), lengths, 0)
    return [(rows, 2 * abs(rows))]


def _weighted_back(node: Node, weights, dy, lengths, indices) -> list[Output]:
    rows = np.repeat(dy, lengths, 0)
    rows = rows * _column(weights, rows)
    return [(rows, abs(rows))]


def _main_input_back(node: Node, weights, dy, lengths, table, indices) -> list[Output]:
    products = np.repeat(dy, lengths, 0) * table[indices]
    axes = tuple(range(1, products.ndim))
    elements = int(np.prod(products.shape[1:]))
    return [*_weighted_back(node, weights, dy, lengths, indices),
            (products.sum(axes), elements * abs(products).sum(axes))]


def _batch_gather_back(node: Node, data, indices, dy) -> list[Output]:
    dx, gauge, times = (np.zeros_like(data) for _ in range(3))
    flat = dy.reshape(len(data), indices.size, *data.shape[2:])
    for place, column in enumerate(indices.reshape(-1)):
        dx[:, column] += flat[:, place]
        gauge[:, column] += abs(flat[:, place])
        times[:, column] += 1
    return [(dx, np.maximum(times - 1, 0) * gauge)]


def _concat(node: Node, *pieces) -> list[Output]:
    axis = node.args["axis"]
    if node.args["add_axis"]:
        return [(np.stack(pieces, axis), 0), (np.ones(len(pieces)), 0)]
    return [(np.concatenate(pieces, axis), 0), (np.array([piece.shape[axis] for piece in pieces]), 0)]


def _split(node: Node, x, lengths=None) -> list[Output]:
    axis, count = node.args["axis"], len(node.outputs)
    if lengths is None:
        lengths = node.args["split"] or [x.shape[axis] // count] * count
    pieces = np.split(x, np.cumsum(lengths)[:-1], axis)
    return [(piece.squeeze(axis) if node.args["add_axis"] else piece, 0) for piece in pieces]


def _sum(node: Node, *terms) -> list[Output]:
    value = np.sum(terms, 0)
    exact = value.dtype.kind != "f"
    return [(value, 0 if exact else (len(terms) - 1) * np.sum(np.abs(terms), 0))]


def _label(node: Node, x, label) -> list[Output]:
    p = _flat(x, 1)[np.arange(len(x)), label.reshape(-1)]
    loss = -np.log(np.maximum(p, np.float32(1e-20)))
    return [(loss, TRANSCENDENTAL * abs(loss))]


def _label_back(node: Node, x, label, dy) -> list[Output]:
    dx, places = np.zeros_like(_flat(x, 1)), (np.arange(len(x)), label.reshape(-1))
    dx[places] = -dy / np.maximum(_flat(x, 1)[places], np.float32(1e-20))
    return [(dx.reshape(x.shape), abs(dx).reshape(x.shape))]


def _logits(node: Node, x, t) -> list[Output]:
    """Roundings: t - 1[x >= 0] and its product with x; exp, 1 + exp and log, whose argument lies in [1, 2], so that
    their error is absolute; the difference of both terms; n - 1 additions and the division of the mean."""
    loss = np.logaddexp(0, x) - x * t
    gauge = abs(x * ((x >= 0) - t)) + 1
    return [(loss.mean(-1), (x.shape[-1] + 3 + TRANSCENDENTAL) * gauge.mean(-1))]


def _logits_back(node: Node, dy, x, t) -> list[Output]:
    scale = np.expand_dims(dy.reshape(x.shape[:-1]), -1) / x.shape[-1]
    gauge = abs(scale) * (_sigmoid64(x) + abs(t))
    return [(scale * (_sigmoid64(x) - t), (TRANSCENDENTAL + 2 + 3) * gauge)]


def _distance(node: Node, x, y) -> list[Output]:
    squares = _flat((x - y) ** 2, 1)
    return [(squares.sum(1) / 2, (squares.shape[1] + 2) * squares.sum(1) / 2)]


def _expanded_distance(node: Node, x, y) -> list[Output]:
    """As Caffe2 computes it (measured): x^2 - 2 x y + y^2, which loses the digits that x and y share."""
    gauge = _flat((abs(x) + abs(y)) ** 2, 1)
    return [(_flat((x - y) ** 2, 1).sum(1) / 2, (gauge.shape[1] + 3) * gauge.sum(1) / 2)]


def _distance_back(node: Node, x, y, dz) -> list[Output]:
    dx = _column(dz, x) * (x - y)
    return [(dx, 2 * abs(dx)), (-dx, 2 * abs(dx))]


def _clip(node: Node, x) -> list[Output]:
    return [(np.minimum(np.maximum(x, node.args["min"]), node.args["max"]), 0)]


def _clip_back(node: Node, y, dy) -> list[Output]:
    return [(np.where((y > node.args["min"]) & (y < node.args["max"]), dy, 0), 0)]


def _mul(node: Node, a, b) -> list[Output]:
    return [(a * b, abs(a * b) if a.dtype.kind == "f" else 0)]


def _sum_to(x, shape: Sequence[int]) -> np.ndarray:
    """Undo a broadcast: sum over the dimensions along which `shape` was repeated."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(axis for axis, length in enumerate(shape) if length == 1), keepdims=True)


def _mul_back(node: Node, dc, a, b) -> list[Output]:
    results = []
    for own, other in ((a, b), (b, a)):
        terms = dc.size // max(own.size, 1)
        results.append((_sum_to(dc * other, own.shape), terms * _sum_to(abs(dc * other), own.shape)))
    return results


def _average(node: Node, x) -> list[Output]:
    count = max(x.size, 1)
    return [(x.sum() / count, abs(x).sum())]  # n roundings of the mean of |x|: n - 1 additions, one division


def _average_back(node: Node, x, dy) -> list[Output]:
    dx = np.full(x.shape, dy.reshape(())) / max(x.size, 1)
    return [(dx, abs(dx))]


def _constant(node: Node, like=None) -> list[Output]:
    return [(np.full(node.args["shape"] if like is None else like.shape, node.args["value"] or 0), 0)]


def _given(node: Node) -> list[Output]:
    return [(np.reshape(node.args["values"], node.args["shape"]), 0)]


def _weighted_sum(node: Node, *pairs) -> list[Output]:
    terms = [x * w.reshape(()) for x, w in zip(pairs[::2], pairs[1::2], strict=True)]
    return [(np.sum(terms, 0), len(terms) * np.sum(np.abs(terms), 0))]


def _scatter(node: Node, x, w0, indices, x1, w1) -> list[Output]:
    value, gauge, roundings = x.copy(), abs(x), np.zeros(len(x))
    for row in indices:
        value[row] *= w0[0]
        gauge[row] *= abs(w0[0])
        roundings[row] += w0[0] != 1
    for place, row in enumerate(indices):
        value[row] += w1[0] * x1[place]
        gauge[row] += abs(w1[0] * x1[place])
        roundings[row] += 2
    return [(value, _column(roundings, x) * gauge)]


def _unique(node: Node, indices) -> list[Output]:
    values, places = np.unique(indices, return_inverse=True)
    return [(values, 0), (places, 0)][:len(node.outputs)]


def _segment_sum(node: Node, data, ids) -> list[Output]:
    rows = node.args["num_segments"]
    rows = rows if rows >= 0 else ids.max(initial=-1) + 1
    order = np.argsort(ids, kind="stable")
    return _pooled(data[order], np.bincount(ids, minlength=rows), 0)


def _adagrad_step(p, h, g, lr, args, e_p=0.0, e_h=0.0, rowwise=False):
    """One update and the errors of p and h, first order, in units of u."""
    g, gauge = g + args["weight_decay"] * p, abs(g) + abs(args["weight_decay"] * p)
    e_g = args["weight_decay"] * e_p + 2 * gauge * bool(args["weight_decay"])
    squares, e_squares = g * g, 2 * abs(g) * e_g + g * g
    if rowwise:
        e_squares = e_squares.mean(-1, keepdims=True) + p.shape[-1] * squares.mean(-1, keepdims=True)
        squares = squares.mean(-1, keepdims=True)
    decay = args.get("decay", 1.0)
    e_h = decay * (e_h + h) + e_squares + decay * h + squares
    h = decay * h + squares
    root, scale = np.sqrt(h), np.sqrt(h) + args["epsilon"]
    e_scale = np.divide(e_h, 2 * root, out=np.zeros_like(root), where=root > 0) + root + scale
    step = lr * g / scale
    e_step = abs(lr) * e_g / scale + abs(step) * (e_scale / scale + 2)
    return p + step, h, e_p + e_step + abs(p) + abs(step), e_h


def _adagrad(node: Node, p, h, g, lr) -> list[Output]:
    p, h, e_p, e_h = _adagrad_step(p, h, g, lr[0], node.args)
    return [(p, e_p), (h, e_h)]


def _sparse_adagrad(rowwise: bool) -> Callable[..., list[Output]]:
    def formula(node: Node, p, h, indices, g, lr) -> list[Output]:
        shape, moment_shape = p.shape, h.shape
        p, h, g = (x.reshape(len(x), int(np.prod(x.shape[1:]))).copy() for x in (p, h, g))
        e_p, e_h = np.zeros_like(p), np.zeros_like(h)
        for place, row in enumerate(indices if g.size else ()):
            p[row], h[row], e_p[row], e_h[row] = _adagrad_step(p[row], h[row], g[place], lr[0], node.args, e_p[row],
                                                               e_h[row], rowwise)
        return [(p.reshape(shape), e_p.reshape(shape)), (h.reshape(moment_shape), e_h.reshape(moment_shape))]
    return formula


_BACK = "SparseLengthsIndicesInGradient{}Gradient".format

FORMULAS: dict[str, Callable[..., list[Output]]] = {
    "FC": _fc, "FCGradient": _fc_gradient, "BatchMatMul": _batch_matmul,
    "Relu": lambda node, x: [(np.maximum(x, 0), 0)],
    "ReluGradient": lambda node, y, dy: [(np.where(y > 0, dy, 0), 0)],
    "Sigmoid": _sigmoid,
    "SigmoidGradient": lambda node, y, dy: [(dy * y * (1 - y), 3 * abs(dy * y * (1 - y)))],
    "SparseLengthsSum": _sum_lookup, "SparseLengthsMean": _mean_lookup, "SparseLengthsWeightedSum": _weighted_lookup,
    _BACK("Sum"): _sum_back, _BACK("Mean"): _mean_back, _BACK("WeightedSum"): _weighted_back,
    _BACK("WeightedSumWithMainInput"): _main_input_back,
    "Gather": lambda node, data, indices: [(data[indices], 0)],
    "BatchGather": lambda node, data, indices: [(data[:, indices], 0)],
    "BatchGatherGradient": _batch_gather_back,
    "Concat": _concat, "Split": _split,
    "Flatten": lambda node, x: [(_flat(x, node.args["axis"]), 0)],
    "FlattenToVec": lambda node, x: [(x.reshape(-1), 0)],
    "ResizeLike": lambda node, x, like: [(x.reshape(like.shape), 0)],
    "Cast": lambda node, x: [(x.astype(DTYPES[node.args["to"]]), 0)],
    "Copy": lambda node, x: [(x, 0)],
    "CopyOnDeviceLike": lambda node, x, like: [(x, 0)],
    "Sum": _sum,
    "Scale": lambda node, x: [(x * node.args["scale"], abs(x * node.args["scale"]))],
    "MakeTwoClass": lambda node, x: [(np.stack([1 - x, x], -1), np.stack([abs(1 - x), 0 * x], -1))],
    "MakeTwoClassGradient": lambda node, dy: [(dy[..., 1] - dy[..., 0], abs(dy[..., 1] - dy[..., 0]))],
    "LabelCrossEntropy": _label, "LabelCrossEntropyGradient": _label_back,
    "SigmoidCrossEntropyWithLogits": _logits, "SigmoidCrossEntropyWithLogitsGradient": _logits_back,
    "SquaredL2Distance": _distance, "SquaredL2DistanceGradient": _distance_back,
    "Clip": _clip, "ClipGradient": _clip_back, "Mul": _mul, "MulGradient": _mul_back,
    "AveragedLoss": _average, "AveragedLossGradient": _average_back,
    "ConstantFill": _constant, "GivenTensorFill": _given, "GivenTensorInt64Fill": _given,
    "GivenTensorIntFill": _given, "GivenTensorDoubleFill": _given,
    "GivenTensorBoolFill": lambda node: [(value != 0, error) for value, error in _given(node)],
    "WeightedSum": _weighted_sum, "ScatterWeightedSum": _scatter, "Unique": _unique,
    "UnsortedSegmentSum": _segment_sum, "Adagrad": _adagrad, "SparseAdagrad": _sparse_adagrad(rowwise=False),
    "RowWiseSparseAdagrad": _sparse_adagrad(rowwise=True),
    "Iter": lambda node, counter: [(counter + 1, 0)],
    "LearningRate": lambda node, counter: [(np.float64(node.args["base_lr"]), 0)],
}

FORMULAS_OF_CAFFE2 = FORMULAS | {"SquaredL2Distance": _expanded_distance}
"""Where Caffe2 rounds more than the obvious order does."""


def formula(node: Node, inputs: Sequence[np.ndarray], formulas: Mapping = FORMULAS) -> list[Output]:
    """The outputs of an operator, float32 inputs taken as the float64 numbers that they are."""
    exact = [x.astype(np.float64) if x.dtype == np.float32 else x for x in inputs]
    return formulas[node.type](node, *exact)
