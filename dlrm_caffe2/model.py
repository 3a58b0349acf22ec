"""A ModelSpec as Caffe2 NetDefs. Blobs are named as the spec names its tensors (SPEC.md, 2).

A step's batch is fed. Parameters, optimizer state and constants are blobs that exist before any net but
`init_net` runs, which makes them; they are external inputs of the other nets.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from dlrm_caffe2.gradient import add_gradients
from dlrm_caffe2.net import DATA_TYPES, make_operator, outside_blobs
from dlrm_caffe2.operators.record import INT32, Slice
from dlrm_caffe2.optimizer import optimizer_constants, update_operators
from dlrm_caffe2.presorted import update_by_row
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec.errors import InputError
from spec.model import ModelSpec
from spec.parameters import Arrays, state_shapes, trained_parameters
from spec.tensors import activation_gradients, activations, batch_names, slice_names

PAIRS = "interaction.pairs"
CLASS_WEIGHTS = "loss.class_weights"


def constants(spec: ModelSpec) -> Arrays:
    """Blobs that no step changes: int64 [pairs] places in a flat [F, F], float32 [2] class weights, and the
    optimizer's."""
    blobs = optimizer_constants(spec)
    if spec.pairs:
        blobs[PAIRS] = np.array([i * spec.interacting_vectors + j for i, j in spec.pairs], np.int64)
    if spec.loss.weights is not None:
        blobs[CLASS_WEIGHTS] = np.array(spec.loss.weights, np.float32)
    return blobs


def init_net(spec: ModelSpec, parameters: Arrays) -> NetDef:
    """Makes the parameters, with these values, the constants, and the optimizer's state, zeros.

    Raises InputError for parameters that no protobuf message can hold: 2 GiB, at 5 bytes a number.
    """
    numbers = sum(array.size for array in parameters.values())
    if numbers * 5 >= 2**31:
        raise InputError(f"init_net of '{spec.name}'", f"less than {2**31 // 5:,} parameters, protobuf's limit",
                         f"{numbers:,}", "cap the tables with --max-rows")
    fills = [_fill(name, array) for name, array in (parameters | constants(spec)).items()]
    fills += [make_operator("ConstantFill", [], [name], shape=shape, value=0.0)
              for name, shape in state_shapes(spec).items()]
    return _net(spec, "init", fills, [fill.output[0] for fill in fills])


def predict_net(spec: ModelSpec) -> NetDef:
    """`probability` and all activations before it."""
    return _net(spec, "predict", _forward(spec), ["probability"])


def gradient_net(spec: ModelSpec) -> NetDef:
    """Forward, loss and gradients; changes nothing. `trace_blobs` says where each tensor is found."""
    net, _ = _differentiated(spec)
    made = {name for operator in net.op for name in operator.output}
    outputs = dict.fromkeys(blob for blob in trace_blobs(spec).values() if blob in made)
    return _net(spec, "gradient", net.op, outputs)


def train_net(spec: ModelSpec, presorted: Mapping[int, int] | None = None) -> NetDef:
    """One step: forward, loss, gradients and update.

    Of the tables in `presorted` it reads `presorted.sorted_lookups`, in so many blocks.
    """
    net, gradients = _differentiated(spec)
    operators, others = update_by_row(spec, net.op, gradients, presorted or {})
    operators += update_operators(spec, others)
    return _net(spec, "train", operators, ["loss", *trained_parameters(spec), *state_shapes(spec)])


def trace_blobs(spec: ModelSpec) -> dict[str, str]:
    """For each of `spec.tensors.trace_names`, the blob that holds it after `gradient_net` has run."""
    _, gradients = _differentiated(spec)
    blobs = {name: name for name in (*activations(spec), *activation_gradients(spec))}
    for parameter, gradient in gradients.items():
        if isinstance(gradient, Slice):
            blobs |= zip(slice_names(parameter), gradient, strict=True)
        else:
            blobs[f"{parameter}_grad"] = gradient
    return blobs


def _net(spec: ModelSpec, name: str, operators: Iterable[OperatorDef], outputs: Iterable[str]) -> NetDef:
    """External inputs are the blobs that are read before they are written; the batch's come first.

    Bags of several rows keep an operator busy, and on genuine Caffe2 only one thread of it: a net of type "dag" runs
    the tables side by side. With one row each, waking its threads costs more than they do.
    """
    net = NetDef(name=f"{spec.name}_{name}", op=operators, external_output=outputs)
    if not all(table.one_hot for table in spec.tables):
        net.type = "dag"
    inputs = outside_blobs(net.op)
    batch = [blob for blob in batch_names(spec) if blob in inputs]
    net.external_input.extend(dict.fromkeys([*batch, *inputs]))
    return net


def _fill(name: str, array: np.ndarray) -> OperatorDef:
    type = "GivenTensorInt64Fill" if array.dtype == np.int64 else "GivenTensorFill"
    return make_operator(type, [], [name], shape=array.shape, values=array.ravel())


def _differentiated(spec: ModelSpec) -> tuple[NetDef, dict[str, str | Slice]]:
    net = NetDef(op=[*_forward(spec), *_loss(spec)])
    return net, add_gradients(net, "loss", trained_parameters(spec))


def _forward(spec: ModelSpec) -> Iterator[OperatorDef]:
    yield from _mlp(spec, "bottom", "dense")
    for number in range(len(spec.tables)):
        yield from _pooling(spec, number)
    yield from _interaction(spec)
    yield from _mlp(spec, "top", "interaction.output")


def _mlp(spec: ModelSpec, mlp: str, x: str) -> Iterator[OperatorDef]:
    layers = len(spec.layer_sizes[mlp])
    function = {"relu": "Relu", "sigmoid": "Sigmoid"}[getattr(spec, mlp).activation]
    for layer in range(layers):
        name = f"{mlp}.{layer}"
        last = mlp == "top" and layer == layers - 1
        y = "probability" if last else f"{name}.activation"
        yield make_operator("FC", [x, f"{name}.weight", f"{name}.bias"], [f"{name}.preactivation"])
        yield make_operator("Sigmoid" if last else function, [f"{name}.preactivation"], [y])
        x = y


def _pooling(spec: ModelSpec, number: int) -> Iterator[OperatorDef]:
    name, table = f"tables.{number}", spec.tables[number]
    lookups, pooling = [f"{name}.indices", f"{name}.lengths"], table.pooling
    fixed = {} if table.fixed_lookups is None else {"fixed_lookups": table.fixed_lookups}
    if pooling in ("sum", "mean"):
        yield make_operator(f"SparseLengths{pooling.capitalize()}", [f"{name}.weight", *lookups], [f"{name}.pooled"],
                            **fixed)
        return
    weights = f"{name}.lookup_weights"
    yield make_operator("Gather", [f"{name}.pooling", f"{name}.indices"], [weights])
    yield make_operator("SparseLengthsWeightedSum", [f"{name}.weight", weights, *lookups], [f"{name}.pooled"],
                        grad_on_weights=int(pooling == "weighted_learned"), **fixed)


def _interaction(spec: ModelSpec) -> Iterator[OperatorDef]:
    bottom = f"bottom.{len(spec.bottom.widths) - 1}.activation"
    vectors = [bottom, *(f"tables.{number}.pooled" for number in range(len(spec.tables)))]
    if spec.interaction.kind == "cat":
        yield _concat(vectors, "interaction.output")
        return
    features, products = "interaction.features", "interaction.products"
    flat, chosen = f"{products}.flat", f"{products}.chosen"
    yield _concat(vectors, features, add_axis=1)
    yield make_operator("BatchMatMul", [features, features], [products], trans_b=1)
    yield make_operator("Flatten", [products], [flat])
    yield make_operator("BatchGather", [flat, PAIRS], [chosen])
    yield _concat([bottom, chosen], "interaction.output")


def _concat(inputs: list[str], output: str, **arguments: int) -> OperatorDef:
    return make_operator("Concat", inputs, [output, f"{output}.lengths"], axis=1, **arguments)


def _loss(spec: ModelSpec) -> Iterator[OperatorDef]:
    yield from {"mse": _squares, "bce": _cross_entropy, "wbce": _cross_entropy, "bce_logits": _logits}[
        spec.loss.kind](spec)
    yield make_operator("AveragedLoss", ["loss.terms"], ["loss"])


def _squares(spec: ModelSpec) -> Iterator[OperatorDef]:
    """SquaredL2Distance is half the square."""
    yield make_operator("SquaredL2Distance", ["probability", "label"], ["loss.half_squares"])
    yield make_operator("Scale", ["loss.half_squares"], ["loss.terms"], scale=2.0)


def _logits(spec: ModelSpec) -> Iterator[OperatorDef]:
    logit = f"top.{len(spec.top.widths) - 1}.preactivation"
    yield make_operator("SigmoidCrossEntropyWithLogits", [logit, "label"], ["loss.terms"])


def _cross_entropy(spec: ModelSpec) -> Iterator[OperatorDef]:
    probability = "probability"
    if spec.loss.clip:
        probability = "probability.clipped"
        yield make_operator("Clip", ["probability"], [probability], min=spec.loss.clip, max=1 - spec.loss.clip)
    yield make_operator("MakeTwoClass", [probability], ["loss.classes"])
    yield make_operator("FlattenToVec", ["label"], ["label.flat"])
    yield make_operator("Cast", ["label.flat"], ["label.class"], to=DATA_TYPES[INT32])
    if spec.loss.weights is None:
        yield make_operator("LabelCrossEntropy", ["loss.classes", "label.class"], ["loss.terms"])
        return
    yield make_operator("LabelCrossEntropy", ["loss.classes", "label.class"], ["loss.unweighted"])
    yield make_operator("Gather", [CLASS_WEIGHTS, "label.class"], ["loss.sample_weights"])
    yield make_operator("Mul", ["loss.unweighted", "loss.sample_weights"], ["loss.terms"])
