"""What the embedded engine computes at once (fused.py): layers, their gradients with their updates, the dot interaction
and its gradient, updates of rows."""

from typing import Any

from dlrm_caffe2.engine.fused import Fused, Fusion
from dlrm_caffe2.operators import Node
from dlrm_caffe2.operators.dense import step_of_layer
from dlrm_caffe2.operators.lookup import expect_total
from dlrm_caffe2.operators.rules import bounds, expect_indices, is_plain


def _layer(fc: Node, relu: Node) -> Fused | None:
    if relu.inputs != fc.outputs or not _takes_matrices(fc):
        return None

    def run(x, w, b):
        import torch

        if x.dim() != 2 or w.dim() != 2:
            return None
        return (torch.addmm(b, x, w.t()).relu_(),)

    return Fused("FC", fc.inputs, relu.outputs, run)


def _layer_gradient(gradient: Node, weights: Node, biases: Node, relu: Node | None = None) -> Fused | None:
    """That of a layer's input, and the step of its parameters."""
    x, w, dy = gradient.inputs
    dw, db, *dx = gradient.outputs
    one, rate = weights.inputs[1::2][:2]
    if not (_takes_matrices(gradient) and weights.inputs == (w, one, dw, rate) and weights.outputs == (w,)
            and biases.inputs == (biases.outputs[0], one, db, rate)):
        return None
    reads = [x, w, biases.outputs[0], one, rate, dy]
    over_y = False
    if relu is not None:
        if relu.outputs != (dy,):
            return None
        reads[-1:] = [relu.inputs[1], relu.inputs[0]]
        over_y = relu.overwrites(1)

    def run(x, w, b, one, rate, dy, y=None):
        import torch

        if float(one) != 1 or not x.dim() == w.dim() == dy.dim() == 2:
            return None
        if y is not None and over_y:
            torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)
        elif y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        made = step_of_layer(x, w, b, dy, float(rate), bool(dx))
        return (w, b) if made is None else (w, b, made)

    return Fused("FCGradient", tuple(reads), (w, biases.outputs[0], *dx), run)


def _hidden_layer_gradient(relu: Node, gradient: Node, weights: Node, biases: Node) -> Fused | None:
    return _layer_gradient(gradient, weights, biases, relu)


def _interaction(product: Node, flat: Node, chosen: Node, join: Node) -> Fused | None:
    """Products of rows of one matrix, of which some are chosen, beside another."""
    x, other = product.inputs
    if not (x == other and product.args["trans_b"] and not product.args["trans_a"] and flat.args["axis"] == 1
            and flat.inputs[0] == product.outputs[0] and chosen.inputs[0] == flat.outputs[0]
            and join.inputs[1:] == chosen.outputs and _along_columns(join)):
        return None

    def run(first, x, places):
        from dlrm_caffe2.operators import kernels

        if not (is_plain(first) and is_plain(x) and (first.dim(), x.dim(), places.dim()) == (2, 3, 1)
                and _within(places, x.shape[1]**2)):
            return None
        return (kernels.chosen_products(first, x, _pairs(places, x.shape[1])),)

    return Fused("BatchMatMul", (join.inputs[0], x, chosen.inputs[1]), join.outputs[:1], run)


def _interaction_gradient(beyond: Node, join: Node, chosen: Node, product: Node) -> Fused | None:
    """The product with matrices of chosen gradients, or of what stands beside them: zeros, or a multiple of them."""
    zeros = beyond.type == "ConstantFill"
    if not (join.inputs[1:] == beyond.outputs and _along_columns(join) and chosen.inputs[0] == join.outputs[0]
            and product.inputs[0] == chosen.outputs[0] and not product.args["trans_a"] + product.args["trans_b"]):
        return None
    if (beyond.args["value"] != 0 or beyond.args["shape"]) if zeros else beyond.inputs[0] != join.inputs[0]:
        return None
    scale = 0.0 if zeros else beyond.args["scale"]

    def run(dy, like, places, x):
        from dlrm_caffe2.operators import kernels

        if not (is_plain(x) and dy.is_cpu and dy.dtype is x.dtype and dy.stride()[-1:] == (1,)
                and (dy.dim(), like.dim(), places.dim(), x.dim()) == (2, 2, 2, 3) and places.dtype.itemsize == 8
                and _within(places, dy.shape[1] + like.shape[1])):
            return None
        return (kernels.chosen_sums(dy, places, scale, x),)

    return Fused("BatchMatMul", (join.inputs[0], beyond.inputs[0], chosen.inputs[1], product.inputs[1]),
                 product.outputs, run)


def _rows(spread: Node, scatter: Node) -> Fused | None:
    """The gradient of a plain sum, given to each lookup of its bag, and added to the rows looked up."""
    if scatter.inputs[3] != spread.outputs[0] or scatter.inputs[2] != spread.inputs[2]:
        return None

    def run(table, old, indices, dy, lengths, rate):
        from dlrm_caffe2.operators import kernels

        if float(old) != 1 or not is_plain(table) or not is_plain(dy) or not indices.numel():
            return None
        expect_total(spread, 1, lengths, len(indices))
        expect_indices(scatter, 2, indices, len(table))
        kernels.add_rows(table, indices, dy, float(rate), lengths)
        return (table,)

    return Fused("ScatterWeightedSum", (*scatter.inputs[:3], *spread.inputs[:2], scatter.inputs[4]), scatter.outputs,
                 run)


_STEPS = (("FCGradient",), ("WeightedSum",), ("WeightedSum",))

FUSIONS = [
    Fusion((("FC",), ("Relu",)), _layer),
    Fusion((("ReluGradient",), *_STEPS), _hidden_layer_gradient),
    Fusion(_STEPS, _layer_gradient),
    Fusion((("BatchMatMul",), ("Flatten",), ("BatchGather",), ("Concat",)), _interaction),
    Fusion((("ConstantFill", "Scale"), ("Concat",), ("BatchGather",), ("BatchMatMul",)), _interaction_gradient),
    Fusion((("SparseLengthsIndicesInGradientSumGradient",), ("ScatterWeightedSum",)), _rows),
]


def _takes_matrices(fc: Node) -> bool:
    return fc.args["axis"] == fc.args["axis_w"] == 1


def _along_columns(join: Node) -> bool:
    return len(join.inputs) == 2 and join.args["axis"] == 1 and not join.args["add_axis"]


def _within(places: Any, count: int) -> bool:
    low, high = bounds(places) if places.numel() else (0, 0)
    return low >= 0 and high < count


def _pairs(places: Any, count: int) -> Any:
    """int64 [P, 2], of rows and columns. Remembered on the tensor until it is written to, which is never."""
    import torch

    known = getattr(places, "_dlrm_pairs", None)
    if known is None or known[:2] != (places._version, count):
        pairs = torch.stack([places // count, places % count], 1).long().contiguous()
        places._dlrm_pairs = known = places._version, count, pairs
    return known[2]
