"""The names of every tensor that a model computes (SPEC.md, 2): what a backend's trace must hold."""

from spec.model import ModelSpec
from spec.parameters import is_sparse, trained_parameters


def batch_names(spec: ModelSpec) -> tuple[str, ...]:
    """Inputs: dense, label, and indices and lengths of each table."""
    per_table = (f"tables.{number}.{part}" for number in range(len(spec.tables)) for part in ("indices", "lengths"))
    return ("dense", *per_table, "label")


def _layers(spec: ModelSpec, mlp: str) -> list[str]:
    names = [f"{mlp}.{layer}.{part}" for layer in range(len(spec.layer_sizes[mlp]))
             for part in ("preactivation", "activation")]
    return names[:-1] if mlp == "top" else names  # the top's last activation is `probability`


def activations(spec: ModelSpec) -> tuple[str, ...]:
    """Forward tensors in the order of computation, the loss last."""
    pooled = [f"tables.{number}.pooled" for number in range(len(spec.tables))]
    dot = ["interaction.features", "interaction.products"] if spec.interaction.kind == "dot" else []
    return (*_layers(spec, "bottom"), *pooled, *dot, "interaction.output", *_layers(spec, "top"),
            "probability", "loss")


def part_of(activation: str) -> str:
    """Which of `spec.backend.PARTS` computes an activation."""
    owner, _, last = activation.rpartition(".")
    if last in ("activation", "probability"):
        return "activation"
    return {"bottom": "fc", "top": "fc", "tables": "embedding", "interaction": "interaction"}.get(
        owner.partition(".")[0], "loss")


def activation_gradients(spec: ModelSpec) -> tuple[str, ...]:
    """Gradients of the activations, in the order of the backward pass.

    `loss` has none, and neither has `probability` under `bce_logits`, where the loss is computed from
    the last preactivation.
    """
    skipped = {"loss", "probability"} if spec.loss.kind == "bce_logits" else {"loss"}
    return tuple(f"{name}_grad" for name in reversed(activations(spec)) if name not in skipped)


def slice_names(parameter: str) -> tuple[str, str]:
    """(indices, values) of a sparse parameter's gradient: int64 [U] and float32 [U, ...]."""
    return f"{parameter}_grad_indices", f"{parameter}_grad_values"


def parameter_gradients(spec: ModelSpec) -> tuple[str, ...]:
    names: list[str] = []
    for parameter in trained_parameters(spec):
        names += slice_names(parameter) if is_sparse(parameter) else (f"{parameter}_grad",)
    return tuple(names)


def trace_names(spec: ModelSpec, gradients: bool = True) -> tuple[str, ...]:
    """Everything that `Model.trace` returns; without gradients, what a forward-only backend returns of it."""
    if not gradients:
        return tuple(name for name in activations(spec) if name != "loss")
    return (*activations(spec), *activation_gradients(spec), *parameter_gradients(spec))
