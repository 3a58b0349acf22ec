"""Names, shapes and seeded initial values of parameters and of optimizer state (SPEC.md, 2 and 7)."""

import math

import numpy as np

from spec.counter import uniform
from spec.errors import InputError
from spec.memory import check_memory
from spec.model import ModelSpec

Arrays = dict[str, np.ndarray]

_PIECE = 1 << 22


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter, trained or not, in the spec's order: bottom, top, tables."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mlp, layers in spec.layer_sizes.items():
        for layer, (inputs, outputs) in enumerate(layers):
            shapes[f"{mlp}.{layer}.weight"] = (outputs, inputs)
            shapes[f"{mlp}.{layer}.bias"] = (outputs,)
    for number, table in enumerate(spec.tables):
        shapes[f"tables.{number}.weight"] = (table.rows, spec.embedding_dim)
        if table.weighted:
            shapes[f"tables.{number}.pooling"] = (table.rows,)
    return shapes


def fixed_parameters(spec: ModelSpec) -> frozenset[str]:
    """Names of the parameters that no optimizer touches."""
    return frozenset(f"tables.{number}.pooling" for number, table in enumerate(spec.tables)
                     if table.pooling == "weighted_fixed")


def trained_parameters(spec: ModelSpec) -> tuple[str, ...]:
    fixed = fixed_parameters(spec)
    return tuple(name for name in parameter_shapes(spec) if name not in fixed)


def is_sparse(name: str) -> bool:
    """Whether the parameter's gradient is a slice: (indices, values) of the rows that were looked up."""
    return name.startswith("tables.")


def moment_name(parameter: str) -> str:
    """Name of Adagrad's accumulated squares h for a parameter."""
    return f"{parameter}.moment"


def state_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Optimizer state. `sgd` has none; `rowwise_adagrad` keeps one number a row, for tables only."""
    if spec.optimizer.kind == "sgd":
        return {}
    shapes = parameter_shapes(spec)
    rowwise = spec.optimizer.kind == "rowwise_adagrad"
    return {moment_name(name): shapes[name][:1] if rowwise and is_sparse(name) else shapes[name]
            for name in trained_parameters(spec)}


def initial_state(spec: ModelSpec) -> Arrays:
    """Zeros, float32."""
    return {name: np.zeros(shape, np.float32) for name, shape in state_shapes(spec).items()}


def initial_parameter(spec: ModelSpec, name: str, seed: int = 0) -> np.ndarray:
    """Draw one parameter alone; the bits depend on (seed, name, shape) and on nothing else. float32.

    Ranges: weights as wide as a normal of variance 2 / (in + out), biases as one of variance 1 / out,
    table rows in +-sqrt(1 / rows), as in facebookresearch/dlrm; per-row pooling weights in [0.5, 1.5).
    """
    shape = parameter_shapes(spec)[name]
    if name.endswith(".pooling"):
        return uniform(seed, name, shape, 0.5, 1.5)
    if is_sparse(name):
        half_width = math.sqrt(1 / shape[0])
    elif name.endswith(".weight"):
        half_width = math.sqrt(6 / (shape[0] + shape[1]))
    else:
        half_width = math.sqrt(3 / shape[0])
    return uniform(seed, name, shape, -half_width, half_width)


def initial_parameters(spec: ModelSpec, seed: int = 0) -> Arrays:
    """Every parameter, float32, by name. Raises InputError where they do not fit into memory."""
    check_memory(f"spec '{spec.name}'", "parameters", parameter_bytes(spec), "cap the tables with --max-rows")
    return {name: initial_parameter(spec, name, seed) for name in parameter_shapes(spec)}


def parameter_bytes(spec: ModelSpec) -> int:
    """Bytes of all parameters, as float32."""
    return 4 * sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def check_parameters(spec: ModelSpec, parameters: Arrays) -> None:
    """Raise InputError unless these are the spec's parameters: every name, no other, float32, its shape, finite."""
    shapes = parameter_shapes(spec)
    for name in sorted(shapes.keys() ^ parameters.keys()):
        found = "none" if name in shapes else "an array of this name"
        raise InputError(name, "a parameter" if name in shapes else f"only parameters of spec '{spec.name}'", found,
                         "pass exactly the spec's parameters, see SPEC.md, 2")
    for name, shape in shapes.items():
        array = parameters[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise InputError(name, f"float32{list(shape)}", f"{array.dtype}{list(array.shape)}",
                             "convert it, or use the spec that it belongs to")
        if not _finite(array):
            raise InputError(name, "finite numbers", "NaN or infinity", "use parameters that have not diverged")


def _finite(array: np.ndarray) -> bool:
    """Piece by piece: the answers for a whole table would take a quarter of its memory."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start:start + _PIECE]).all() for start in range(0, flat.size, _PIECE))
