"""What every tensor is computed from (SPEC.md, 3 to 7): the steps of a model, in the order of computation."""

from spec.model import ModelSpec
from spec.parameters import is_sparse, moment_name, trained_parameters

Sources = dict[str, tuple[str, ...]]


def steps(spec: ModelSpec, gradients: bool = True) -> Sources:
    """For each tensor of a trace the tensors, parameters and inputs that it is computed from.

    A sparse gradient goes by the name of its values.
    """
    made: Sources = {}
    bottom = _mlp(spec, "bottom", "dense", made)
    vectors = [bottom]
    for number in range(len(spec.tables)):
        vectors.append(f"tables.{number}.pooled")
        made[vectors[-1]] = (f"tables.{number}.weight", *_row_weights(spec, number), *_lookups(number))
    if spec.interaction.kind == "dot":
        made["interaction.features"] = tuple(vectors)
        made["interaction.products"] = ("interaction.features",)
        vectors = [bottom, "interaction.products"]
    made["interaction.output"] = tuple(vectors)
    logit = _mlp(spec, "top", "interaction.output", made)
    if gradients:
        made["loss"] = (logit if spec.loss.kind == "bce_logits" else "probability", "label")
        _backward(spec, logit, made)
    return made


def update_steps(spec: ModelSpec) -> Sources:
    """The same for the optimizer's state and the parameters after a step. Their own names, and those of their
    sources, are of the values before it."""
    made: Sources = {}
    for parameter in trained_parameters(spec):
        gradient = f"{parameter}_grad_values" if is_sparse(parameter) else f"{parameter}_grad"
        moment = moment_name(parameter)
        if spec.optimizer.kind == "sgd":
            made[parameter] = (parameter, gradient)
        else:
            made[moment] = (moment, gradient)
            made[parameter] = (parameter, moment, gradient)
    return made


def _lookups(number: int) -> tuple[str, str]:
    return f"tables.{number}.indices", f"tables.{number}.lengths"


def _row_weights(spec: ModelSpec, number: int) -> tuple[str, ...]:
    return (f"tables.{number}.pooling",) if spec.tables[number].weighted else ()


def _mlp(spec: ModelSpec, mlp: str, x: str, made: Sources) -> str:
    """The name of the last tensor: an activation of the bottom, the preactivation of the top's last layer."""
    layers = len(spec.layer_sizes[mlp])
    for layer in range(layers):
        name = f"{mlp}.{layer}"
        z = f"{name}.preactivation"
        made[z] = (x, f"{name}.weight", f"{name}.bias")
        last = mlp == "top" and layer == layers - 1
        x = "probability" if last else f"{name}.activation"
        made[x] = (z,)
    return z if mlp == "top" else x


def _backward(spec: ModelSpec, logit: str, made: Sources) -> None:
    if spec.loss.kind == "bce_logits":
        made[f"{logit}_grad"] = (logit, "label")
    else:
        made["probability_grad"] = ("probability", "label")
        made[f"{logit}_grad"] = ("probability", "probability_grad")
    made["interaction.output_grad"] = _mlp_backward(spec, "top", "interaction.output", made)
    vectors = ("interaction.output_grad",)
    if spec.interaction.kind == "dot":
        made["interaction.products_grad"] = vectors
        made["interaction.features_grad"] = ("interaction.features", "interaction.products_grad")
        vectors = ("interaction.features_grad",)
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        made[f"{name}.pooled_grad"] = vectors
        made[f"{name}.weight_grad_values"] = (f"{name}.pooled_grad", *_row_weights(spec, number), *_lookups(number))
        if table.pooling == "weighted_learned":
            made[f"{name}.pooling_grad_values"] = (f"{name}.pooled_grad", f"{name}.weight", *_lookups(number))
    both = ("interaction.output_grad", *(v for v in vectors if v != "interaction.output_grad"))
    made[f"bottom.{len(spec.bottom.widths) - 1}.activation_grad"] = both
    _mlp_backward(spec, "bottom", "dense", made)


def _mlp_backward(spec: ModelSpec, mlp: str, x: str, made: Sources) -> tuple[str, ...]:
    """The sources of the gradient of the MLP's input."""
    dx: tuple[str, ...] = ()
    for layer in reversed(range(len(spec.layer_sizes[mlp]))):
        name = f"{mlp}.{layer}"
        dz = f"{name}.preactivation_grad"
        if f"{name}.activation" in made:
            if dx:
                made[f"{name}.activation_grad"] = dx
            kept = "preactivation" if getattr(spec, mlp).activation == "relu" else "activation"
            made[dz] = (f"{name}.{kept}", f"{name}.activation_grad")
        made[f"{name}.weight_grad"] = (f"{mlp}.{layer - 1}.activation" if layer else x, dz)
        made[f"{name}.bias_grad"] = (dz,)
        dx = (f"{name}.weight", dz)
    return dx
