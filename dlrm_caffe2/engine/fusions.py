"""What the embedded engine computes at once (fused.py): layers, their gradients with their updates, lookups of one row
a sample, the dot interaction and its gradient, the cross-entropy, updates of rows."""

import re
from collections.abc import Sequence
from typing import Any

from dlrm_caffe2.engine.fused import Fused, Fusion
from dlrm_caffe2.operators import Node
from dlrm_caffe2.operators.dense import step_of_layer
from dlrm_caffe2.operators.lookup import expect_total
from dlrm_caffe2.operators.rules import are_contiguous, are_plain, bounds, have_plain_rows
from dlrm_caffe2.proto.caffe2_pb2 import TensorProto


def _layer(nodes: Sequence[Node]) -> Fused | None:
    fc, relu = nodes
    if relu.inputs != fc.outputs or not _takes_matrices(fc):
        return None

    def run(x, w, b):
        import torch

        if x.dim() != 2 or w.dim() != 2:
            return None
        return (torch.addmm(b, x, w.t()).relu_(),)

    return Fused("FC", fc.inputs, relu.outputs, run)


def _layer_gradient(nodes: Sequence[Node]) -> Fused | None:
    """That of a layer's input, and the step of its parameters."""
    *relus, gradient, weights, biases = nodes
    x, w, dy = gradient.inputs
    dw, db, *dx = gradient.outputs
    one, rate = weights.inputs[1::2][:2]
    if not (_takes_matrices(gradient) and weights.inputs == (w, one, dw, rate) and weights.outputs == (w,)
            and biases.inputs == (biases.outputs[0], one, db, rate)):
        return None
    reads = [x, w, biases.outputs[0], one, rate, dy]
    over_y = False
    for relu in relus:
        if relu.outputs != (dy,):
            return None
        reads[-1:] = [relu.inputs[1], relu.inputs[0]]
        over_y = relu.overwrites(1)

    def run(x, w, b, one, rate, dy, y=None):
        import torch

        if float(one) != 1 or b.dim() != 1 or not x.dim() == w.dim() == dy.dim() == 2:
            return None
        if y is not None and over_y:
            torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)
        elif y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        made = step_of_layer(x, w, b, dy, float(rate), bool(dx))
        return (w, b) if made is None else (w, b, made)

    return Fused("FCGradient", tuple(reads), (w, biases.outputs[0], *dx), run)


def _side_by_side(nodes: Sequence[Node]) -> Fused | None:
    """One row a sample of each of some tables, and other vectors."""
    *gathers, join = nodes
    rows = {node.outputs[0]: node.inputs for node in gathers}
    if not (join.args["axis"] == join.args["add_axis"] == 1 and "axis" in join.given
            and len(rows) == len(gathers) and rows.keys() <= {*join.inputs}
            and rows.keys().isdisjoint(name for node in gathers for name in node.inputs)):
        return None
    sources = [rows[name][0] if name in rows else name for name in join.inputs]
    indices = [rows[name][1] for name in join.inputs if name in rows]
    at = [place for place, name in enumerate(join.inputs) if name in rows]

    def run(*inputs):
        import torch

        from dlrm_caffe2.operators import kernels

        sources, rows = inputs[:len(join.inputs)], inputs[len(join.inputs):]
        if not (are_plain(*sources) and are_contiguous(*rows) and all(x.dim() == 2 for x in sources)
                and all(its.dim() == 1 for its in rows)):
            return None
        of_source = [None] * len(sources)
        for place, its in zip(at, rows, strict=True):
            of_source[place] = its
        made = kernels.side_by_side(sources, of_source)
        return None if made is None else (made, torch.ones(len(sources), dtype=torch.int32))

    return Fused("Gather", (*sources, *indices), join.outputs, run)


def _interaction(nodes: Sequence[Node]) -> Fused | None:
    """Products of rows of one matrix, of which some are chosen, beside another."""
    product, flat, chosen, join = nodes
    x, other = product.inputs
    if not (x == other and product.args["trans_b"] and not product.args["trans_a"] and flat.args["axis"] == 1
            and flat.inputs[0] == product.outputs[0] and chosen.inputs[0] == flat.outputs[0]
            and join.inputs[1:] == chosen.outputs and _along_columns(join)):
        return None

    def run(first, x, places):
        from dlrm_caffe2.operators import kernels

        if not (are_plain(first, x) and (first.dim(), x.dim(), places.dim()) == (2, 3, 1)
                and _within(places, x.shape[1]**2)):  # _pairs makes them contiguous
            return None
        return (kernels.chosen_products(first, x, _pairs(places, x.shape[1])),)

    return Fused("BatchMatMul", (join.inputs[0], x, chosen.inputs[1]), join.outputs[:1], run)


def _interaction_gradient(nodes: Sequence[Node]) -> Fused | None:
    """The product with matrices of chosen gradients, or of what stands beside them: zeros, or a multiple of them. It is
    cut into one vector a sample for each row."""
    beyond, join, chosen, product, split = nodes
    zeros = beyond.type == "ConstantFill"
    if not (join.inputs[1:] == beyond.outputs and _along_columns(join) and chosen.inputs[0] == join.outputs[0]
            and product.inputs[0] == chosen.outputs[0] and not product.args["trans_a"] + product.args["trans_b"]
            and split.inputs[0] == product.outputs[0] and split.args["axis"] == split.args["add_axis"] == 1
            and "axis" in split.given):
        return None
    if (beyond.args["value"] != 0 or beyond.args["shape"]) if zeros else beyond.inputs[0] != join.inputs[0]:
        return None
    scale = 0.0 if zeros else beyond.args["scale"]

    def run(dy, like, places, x):
        from dlrm_caffe2.operators import kernels

        if not (are_plain(x) and have_plain_rows(dy) and are_contiguous(places) and places.dtype.itemsize == 8
                and (dy.dim(), like.dim(), places.dim(), x.dim()) == (2, 2, 2, 3)
                and _within(places, dy.shape[1] + like.shape[1])):
            return None
        return kernels.chosen_sums(dy, places, scale, x).unbind(1)

    return Fused("BatchMatMul", (join.inputs[0], beyond.inputs[0], chosen.inputs[1], product.inputs[1]), split.outputs,
                 run)


def _cross_entropy(nodes: Sequence[Node]) -> Fused | None:
    """From a probability to the loss, and back to the gradient of the logit."""
    classes, flat, cast, terms, mean, start, of_terms, of_classes, of_p, of_z = nodes
    p, label = classes.inputs[0], flat.inputs[0]
    if not (cast.inputs == flat.outputs and cast.args["to"] == TensorProto.INT32
            and terms.inputs == (*classes.outputs, *cast.outputs) and mean.inputs == terms.outputs
            and start.inputs == mean.outputs and start.args["value"] == 1 and not start.args["shape"]
            and of_terms.inputs == (*terms.outputs, *start.outputs)
            and of_classes.inputs == (*terms.inputs, *of_terms.outputs) and of_p.inputs == of_classes.outputs
            and of_z.inputs == (p, *of_p.outputs)):
        return None

    def run(p, label):
        from dlrm_caffe2.operators import kernels

        if not (are_plain(p, label) and p.dim() == 2 and p.shape[1] == 1 and 0 < p.numel() == label.numel()):
            return None
        found = kernels.cross_entropy(p, label)
        return None if found is None else (p.new_tensor(found[0]), found[1])

    return Fused("LabelCrossEntropy", (p, label), (*mean.outputs, *of_z.outputs), run)


def _rows(nodes: Sequence[Node]) -> Fused | None:
    """What is added to rows of tables; the gradient of a plain sum is given to each lookup of its bag."""
    spreads = {node.outputs[0]: node for node in nodes if node.type == _SPREAD}
    scatters = [node for node in nodes if node.type != _SPREAD]
    tables, olds, indices, values, rates = zip(*(node.inputs for node in scatters), strict=True)
    its = [spreads.get(name) for name in values]
    if not (len(olds) == olds.count(olds[0]) and len(rates) == rates.count(rates[0]) and len({*tables}) == len(tables)
            and {*tables}.isdisjoint((*indices, *values)) and sum(node is not None for node in its) == len(spreads)
            and all(node is None or node.inputs[2] == rows for node, rows in zip(its, indices, strict=True))):
        return None
    values = [name if node is None else node.inputs[0] for name, node in zip(values, its, strict=True)]
    lengths = [node.inputs[1] for node in its if node is not None]
    count = len(tables)

    def run(old, rate, *inputs):
        from dlrm_caffe2.operators import kernels

        tables, indices, values = (inputs[at:at + count] for at in (0, count, 2 * count))
        if float(old) != 1 or not (are_plain(*tables) and have_plain_rows(*values)
                                   and are_contiguous(*indices, *inputs[3 * count:])):
            return None
        given = iter(inputs[3 * count:])
        lengths = [None if node is None else next(given) for node in its]
        for node, its_lengths, rows in zip(its, lengths, indices, strict=True):
            if node is not None:
                expect_total(node, 1, its_lengths, len(rows))
        if not kernels.rows_exist(tables, indices):
            return None
        kernels.add_rows(tables, indices, values, float(rate), lengths)
        return tables

    return Fused("ScatterWeightedSum", (olds[0], rates[0], *tables, *indices, *values, *lengths), tables, run)


_SPREAD = "SparseLengthsIndicesInGradientSumGradient"

FUSIONS = [Fusion(re.compile(types), match) for types, match in (
    ("FC Relu ", _layer),
    ("(ReluGradient )?FCGradient WeightedSum WeightedSum ", _layer_gradient),
    ("(Gather )+Concat ", _side_by_side),
    ("BatchMatMul Flatten BatchGather Concat ", _interaction),
    ("(ConstantFill|Scale) Concat BatchGather BatchMatMul Split ", _interaction_gradient),
    ("MakeTwoClass FlattenToVec Cast LabelCrossEntropy AveragedLoss ConstantFill AveragedLossGradient "
     "LabelCrossEntropyGradient MakeTwoClassGradient SigmoidGradient ", _cross_entropy),
    (f"(({_SPREAD} )?ScatterWeightedSum )+", _rows),
)]


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
