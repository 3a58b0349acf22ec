"""The backend `jax`: DLRM as pure functions of its parameters, differentiated by jax.grad, compiled by XLA."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from spec.backend import Availability
from spec.batch import Batch
from spec.errors import InputError
from spec.loss import FLOOR
from spec.model import Loss, ModelSpec, Optimizer
from spec.parameters import Arrays, check_parameters, initial_state, is_sparse, moment_name, trained_parameters
from spec.tensors import activations, slice_names, trace_names
from spec.threads import core_count

Named = dict[str, Array]
matmul = functools.partial(jnp.matmul, precision="highest")  # float32, where an accelerator would use less


def outputs(spec: ModelSpec, mlps: Named, rows: Named, probes: Named, inputs: Named) -> tuple[Array, Named]:
    """(loss, every activation by name).

    `rows` [K, ...] are those that the batch looks up, so that their gradient is that of a slice. `probes` are zeros,
    added to the activations of their names: the gradient by a probe is that by the activation.
    """
    seen, logit = {}, f"top.{len(spec.top.widths) - 1}.preactivation"

    def tap(name: str, x: Array) -> Array:
        seen[name] = x + probes[name] if name in probes else x
        return seen[name]

    def mlp(part: str, x: Array) -> Array:
        for layer in range(len(spec.layer_sizes[part])):
            name = f"{part}.{layer}"
            z = tap(f"{name}.preactivation", matmul(x, mlps[f"{name}.weight"].T) + mlps[f"{name}.bias"])
            if f"{name}.preactivation" == logit:
                return tap("probability", jax.nn.sigmoid(z))
            x = tap(f"{name}.activation", getattr(jax.nn, getattr(spec, part).activation)(z))
        return x

    vectors = [mlp("bottom", inputs["dense"])]
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        terms = rows[f"{name}.weight"] * (rows[f"{name}.pooling"][:, None] if table.weighted else 1)
        pooled = jax.ops.segment_sum(terms, inputs[f"{name}.bags"], len(inputs["dense"]))
        if table.pooling == "mean":
            pooled = pooled * (1 / jnp.maximum(inputs[f"{name}.lengths"], 1).astype(jnp.float32))[:, None]
        vectors.append(tap(f"{name}.pooled", pooled))
    if spec.interaction.kind == "dot":
        features = tap("interaction.features", jnp.stack(vectors, 1))
        products = tap("interaction.products", matmul(features, features.swapaxes(1, 2)))
        first, second = np.array(spec.pairs, int).reshape(-1, 2).T
        vectors = [vectors[0], products[:, first, second]]
    mlp("top", tap("interaction.output", jnp.concatenate(vectors, 1)))
    seen["loss"] = mean_loss(spec.loss, seen[logit], seen["probability"], inputs["label"])
    return seen["loss"], seen


def mean_loss(loss: Loss, z: Array, p: Array, y: Array) -> Array:
    """The loss, shape (), of logit, probability and label [B, 1]."""
    if loss.kind == "mse":
        return jnp.mean((p - y) ** 2)
    if loss.kind == "bce_logits":
        return jnp.mean(y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z))
    if loss.clip:
        low = np.float32(loss.clip)
        high = 1 - low  # at the bounds the spec wants no gradient, and jnp.clip has one
        p = jnp.where((p > low) & (p < high), p, lax.stop_gradient(jnp.clip(p, low, high)))
    q = jnp.where(y == 1, p, 1 - p)
    q = q + lax.stop_gradient(jnp.maximum(q, FLOOR) - q)  # the floor, with the gradient of what lies above it
    negative, positive = np.float32(loss.weights or (1, 1))
    return jnp.mean(-jnp.where(y == 1, positive, negative) * jnp.log(q))


def updated(optimizer: str, w: Array, h: Array | None, g: Array, rate: Array, eps: Array) -> tuple[Array, Array | None]:
    """(parameter, moment) after one step (SPEC.md, 7); h may have one number for each row of w."""
    if optimizer == "sgd":
        return w - rate * g, None
    rowwise = h.ndim < w.ndim
    h = h + ((g**2).mean(1) if rowwise else g**2)
    root = jnp.sqrt(h) + eps
    return w - rate * g / (root[:, None] if rowwise else root), h


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train(optimizer: str, trained: Named, state: Named, gradients: Named, indices: Named, rate: Array,
          eps: Array) -> tuple[Named, Named]:
    """New parameters and state. Of a table only the rows in `indices` are read and written."""
    for name, w in trained.items():
        h, g, rows = state.get(moment_name(name)), gradients[name], slice(None)
        if name in indices:  # a row that repeats has the sum of its gradients
            rows, place = jnp.unique(indices[name], return_inverse=True, size=len(g), fill_value=len(w))
            g = jax.ops.segment_sum(g, place, len(g))
        new_w, new_h = updated(optimizer, w[rows], None if h is None else h[rows], g, rate, eps)
        trained = trained | {name: w.at[rows].set(new_w, mode="drop")}
        if h is not None:
            state = state | {moment_name(name): h.at[rows].set(new_h, mode="drop")}
    return trained, state


@functools.lru_cache(maxsize=8)
def compiled(spec_json: str) -> tuple:
    """(outputs, gradients by MLPs and rows, gradients by probes too), compiled once for all models of a spec."""
    computed = functools.partial(outputs, ModelSpec.model_validate_json(spec_json))
    return (jax.jit(computed), jax.jit(jax.value_and_grad(computed, (0, 1), has_aux=True)),
            jax.jit(jax.grad(computed, (0, 1, 2), has_aux=True)))


class JaxModel:
    """One model of `spec.backend.Model`."""

    threads = core_count()  # XLA's own rule

    def __init__(self, spec: ModelSpec, parameters: Arrays) -> None:
        check_parameters(spec, parameters)
        self.spec, self.engine = spec, f"JAX {jax.__version__}, {jax.devices()[0].platform}, {self.threads} threads"
        self._held = {name: jnp.array(array) for name, array in parameters.items()}
        self._state = {name: jnp.array(array) for name, array in initial_state(spec).items()}
        untrained = spec.model_copy(update={"optimizer": Optimizer()})  # what is compiled knows of no optimizer
        self._outputs, self._gradients, self._traced = compiled(untrained.model_dump_json())

    def predict(self, batch: Batch) -> np.ndarray:
        return np.array(self._outputs(*self._arguments(batch))[1]["probability"])

    def trace(self, batch: Batch) -> Arrays:
        mlps, rows, _, inputs = self._arguments(batch)
        shapes = jax.eval_shape(self._outputs, mlps, rows, {}, inputs)[1]
        probes = {name: jnp.zeros(shapes[name].shape) for name in activations(self.spec) if name != "loss"}
        (by_mlp, by_row, by_probe), found = self._traced(mlps, rows, probes, inputs)
        found |= {f"{name}_grad": g for name, g in (by_mlp | by_probe).items()}
        for name, values in by_row.items():
            indices = batch.indices[int(name.split(".")[1])]
            found |= dict(zip(slice_names(name), (indices, values[:len(indices)]), strict=True))
        return {name: np.array(found[name]) for name in trace_names(self.spec)}

    def train_step(self, batch: Batch) -> float:
        mlps, rows, probes, inputs = self._arguments(batch)
        (loss, _), (by_mlp, by_row) = self._gradients(mlps, rows, probes, inputs)
        trained = {name: self._held[name] for name in trained_parameters(self.spec)}
        indices = {name: inputs[f"{name.rpartition('.')[0]}.indices"] for name in rows}
        rule = self.spec.optimizer
        trained, self._state = train(rule.kind, trained, self._state, by_mlp | by_row, indices,
                                     np.float32(rule.learning_rate), np.float32(rule.eps))
        self._held |= trained
        return float(loss)

    def parameters(self) -> Arrays:
        return {name: np.array(x) for name, x in self._held.items()}

    def optimizer_state(self) -> Arrays:
        return {name: np.array(x) for name, x in self._state.items()}

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """XLA fuses operators, so one number: forward and backward without the optimizer, or the forward."""
        run, arguments = self._gradients if training else self._outputs, self._arguments(batch)
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
        return {"gradients" if training else "outputs": time.perf_counter() - start}

    def close(self) -> None:
        self._held, self._state = {}, {}

    def _arguments(self, batch: Batch) -> tuple[Named, Named, Named, Named]:
        """(MLPs, rows, no probes, inputs). Lookups are padded to the most that the spec expects, so that one size is
        compiled: with the row behind the last, which reads as 0 and is never written, in a bag behind the last."""
        batch.validate(self.spec)
        inputs, rows = {"dense": batch.dense, "label": batch.label}, {}
        for number, (indices, lengths) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            name, table = f"tables.{number}", self.spec.tables[number]
            unit = batch.size * max(int(np.max(table.lookups)), 1)
            padding = (0, max(-(-len(indices) // unit), 1) * unit - len(indices))
            bags = np.repeat(np.arange(batch.size), lengths)
            inputs |= {f"{name}.indices": np.pad(indices, padding, constant_values=table.rows).astype(np.int32),
                       f"{name}.bags": np.pad(bags, padding, constant_values=batch.size), f"{name}.lengths": lengths}
            for part in ("weight", "pooling") if table.weighted else ("weight",):
                rows[f"{name}.{part}"] = self._held[f"{name}.{part}"].at[inputs[f"{name}.indices"]].get(
                    mode="fill", fill_value=0)
        return {name: x for name, x in self._held.items() if not is_sparse(name)}, rows, {}, inputs


class JaxBackend:
    """See `spec.backend.Backend`."""

    name, trains = "jax", True

    def available(self) -> Availability:
        return Availability(True)  # this distribution requires JAX

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> JaxModel:
        if device != "cpu":
            raise InputError(f"device '{device}'", "cpu", "another device", "use --device cpu")
        return JaxModel(spec, parameters)


BACKEND = JaxBackend()
