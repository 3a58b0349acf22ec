"""Shapes of every tensor that a model computes (SPEC.md, 2): what a backend's trace must look like."""

import numpy as np

from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import is_sparse, parameter_shapes
from spec.tensors import activations, slice_names, trace_names

Shape = tuple[int, ...]


def trace_shapes(spec: ModelSpec, batch: Batch, gradients: bool = True) -> dict[str, Shape]:
    """By the names of `spec.tensors.trace_names`, in their order. A slice has one row for each row that was looked up;
    a backend's own may list a row several times."""
    shapes = activation_shapes(spec, batch.size)
    shapes |= {f"{name}_grad": shape for name, shape in (shapes | parameter_shapes(spec)).items()}
    for name, shape in parameter_shapes(spec).items():
        if is_sparse(name):
            looked_up = len(np.unique(batch.indices[int(name.split(".")[1])]))
            indices, values = slice_names(name)
            shapes |= {indices: (looked_up,), values: (looked_up, *shape[1:])}
    return {name: shapes[name] for name in trace_names(spec, gradients)}


def activation_shapes(spec: ModelSpec, size: int) -> dict[str, Shape]:
    """Of `spec.tensors.activations`, for `size` samples."""
    shapes: dict[str, Shape] = {"probability": (size, 1), "loss": (),
                                "interaction.output": (size, spec.interaction_width)}
    for mlp, layers in spec.layer_sizes.items():
        for layer, (_, outputs) in enumerate(layers):
            shapes |= {f"{mlp}.{layer}.{part}": (size, outputs) for part in ("preactivation", "activation")}
    for number in range(len(spec.tables)):
        shapes[f"tables.{number}.pooled"] = (size, spec.embedding_dim)
    if spec.interaction.kind == "dot":
        vectors = spec.interacting_vectors
        shapes |= {"interaction.features": (size, vectors, spec.embedding_dim),
                   "interaction.products": (size, vectors, vectors)}
    return {name: shapes[name] for name in activations(spec)}
