"""Specs and batches drawn from everything that SPEC.md allows, at a bounded cost.

An Example is a few numbers and choices; its arrays are made from them. So a large one is as cheap to draw, to send to
another process and to make smaller as a small one. A campaign draws with Python's own generator, so that its examples
depend on the seed alone; tests draw with Hypothesis.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from conformance.case import OPTIMIZERS, Case
from spec.batch import Batch
from spec.model import MLP, Interaction, Loss, ModelSpec, Optimizer, Table
from spec.parameters import initial_parameters

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MOST_TABLES, MOST_WIDTH, MOST_ROWS, MOST_LOOKUPS, MOST_SAMPLES = 40, 256, 10_000, 100, 4096
_MLP_NUMBERS, _TABLE_NUMBERS, _WORK = 500_000, 1_000_000, 50_000_000
"""Of an example: weights of all layers, numbers in all tables, and multiplications in one forward pass. Each size
reaches its own limit, but not all of them together."""

POOLINGS = ("sum", "mean", "weighted_fixed", "weighted_learned")
ACTIVATIONS = ("relu", "sigmoid")
BAGS = ("drawn", "some empty", "all empty", "one long")
INDICES = ("uniform", "skewed", "one row")
DENSE = ("unit", "signed", "large", "tiny", "zeros", "some zeros")
LABELS = ("drawn", "all 0", "all 1", "between")
STEPS = 2
"""On the same batch: the second meets optimizer state that is not zero."""


@dataclass(frozen=True)
class Data:
    """What a batch is like; the first of each is the plainest. `bags` is about ragged tables alone, and "between" gives
    soft labels where the loss takes them."""

    bags: str = BAGS[0]
    indices: str = INDICES[0]
    dense: str = DENSE[0]
    labels: str = LABELS[0]


@dataclass(frozen=True)
class Example:
    """A model, what its batch is like, and the seed of the batch and of the parameters. The spec's own batch_size,
    optimizer and name are those of the example."""

    spec: ModelSpec
    data: Data
    seed: int

    def batch(self) -> Batch:
        """Of the spec's batch_size; the same bits each time."""
        generator, spec, size = np.random.default_rng(self.seed), self.spec, self.spec.batch_size
        dense = _dense(self.data.dense, generator, (size, spec.dense_features))
        label = _labels(self.data.labels, spec.loss.kind, generator, size)
        lengths = [_lengths(self.data.bags, table, generator, size) for table in spec.tables]
        indices = [_indices(self.data.indices, table.rows, generator, int(bags.sum()))
                   for table, bags in zip(spec.tables, lengths, strict=True)]
        batch = Batch(dense, tuple(indices), tuple(lengths), label)
        batch.validate(spec)
        return batch

    def case(self, source: str = "generated") -> Case:
        """STEPS training steps under the spec's own optimizer."""
        return Case(self.spec, initial_parameters(self.spec, self.seed), [self.batch()] * STEPS,
                    (self.spec.optimizer.kind,), source, self.seed)


def _dense(kind: str, generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    dense = generator.random(shape, np.float32)
    if kind in ("signed", "large", "tiny"):
        scale = {"signed": 1, "large": 300, "tiny": 1e-30}[kind]
        dense = (generator.standard_normal(shape) * scale).astype(np.float32)
    if kind == "some zeros":
        dense[generator.random(shape) < 0.5] = 0
        dense[generator.random(len(dense)) < 0.2] = 0
    return np.zeros_like(dense) if kind == "zeros" else dense


def _labels(kind: str, loss: str, generator: np.random.Generator, size: int) -> np.ndarray:
    label = generator.integers(0, 2, (size, 1)).astype(np.float32)
    if kind == "between" and loss in ("mse", "bce_logits"):
        label = generator.random((size, 1), np.float32)
    return np.full_like(label, kind == "all 1") if kind.startswith("all") else label


def _lengths(kind: str, table: Table, generator: np.random.Generator, size: int) -> np.ndarray:
    if table.fixed_lookups is not None:
        return np.full(size, table.fixed_lookups, np.int32)
    low, high = table.lookups
    lengths = generator.integers(low, high + 1, size)
    if kind == "some empty":
        lengths[generator.random(size) < 0.5] = 0
    elif kind != "drawn":
        total = int(lengths.sum())
        lengths[:] = 0
        lengths[generator.integers(size)] = total if kind == "one long" else 0
    return lengths.astype(np.int32)


def _indices(kind: str, rows: int, generator: np.random.Generator, count: int) -> np.ndarray:
    if kind == "one row":
        return np.full(count, generator.integers(rows))
    share = generator.random(count)
    return (rows * (share**8 if kind == "skewed" else share)).astype(np.int64)


Integer = Callable[[int, int], int]
"""Draws from both ends' range, inclusive; the lowest is the plainest."""


def _any(integer: Integer, items: Sequence[Any]) -> Any:
    return items[integer(0, len(items) - 1)]


def _size(integer: Integer, most: int) -> int:
    """1 to `most`: small ones, where every number is special, as often as large ones."""
    most = max(most, 1)
    low, high = _any(integer, ((1, 3), (1, 20), (8, most)))
    return integer(min(low, most), min(high, most))


def _widths(integer: Integer, inputs: int, last: int) -> tuple[int, ...]:
    """Hidden layers and the last one, of _MLP_NUMBERS weights at most, or nearly so."""
    widths: list[int] = []
    for _ in range(integer(0, 3)):
        widths.append(_size(integer, min(2 * MOST_WIDTH, _MLP_NUMBERS // (4 * (inputs + last)))))
        inputs = widths[-1]
    return (*widths, last)


def _tables(integer: Integer, dimension: int) -> tuple[Table, ...]:
    count = _any(integer, (integer(1, 4), _size(integer, MOST_TABLES)))  # mostly few: exporters take long for each one
    tables = []
    for _ in range(count):
        lookups = _size(integer, min(MOST_LOOKUPS, 20 * MOST_LOOKUPS // count))
        lookups = _any(integer, (1, lookups, (integer(0, lookups), lookups)))
        tables.append(Table(rows=_size(integer, min(MOST_ROWS, _TABLE_NUMBERS // (count * dimension))),
                            pooling=_any(integer, POOLINGS), lookups=lookups))
    return tuple(tables)


def _loss(integer: Integer) -> Loss:
    kind = _any(integer, ("mse", "bce", "bce_logits", "wbce"))
    clip = _any(integer, (0.0, 0.0, 1e-6, 0.1, 0.45)) if kind in ("bce", "wbce") else 0.0
    weights = [_any(integer, (1.0, 0.5, 3.0, 1e-3, 1e3)) for _ in range(2)] if kind == "wbce" else None
    return Loss(kind=kind, clip=clip, weights=weights and tuple(weights))


def _optimizer(integer: Integer) -> Optimizer:
    return Optimizer(kind=_any(integer, OPTIMIZERS), learning_rate=_any(integer, (0.1, 1e-6, 1e-3, 1.0)),
                     eps=_any(integer, (1e-10, 1e-5, 0.1)))


def draw_example(integer: Integer, name: str = "generated") -> Example:
    """One example, from `integer` alone."""
    dimension, dense_features = _size(integer, MOST_WIDTH), _size(integer, MOST_WIDTH)
    spec = ModelSpec(
        name=name, dense_features=dense_features, embedding_dim=dimension, tables=_tables(integer, dimension),
        bottom=MLP(widths=_widths(integer, dense_features, dimension), activation=_any(integer, ACTIVATIONS)),
        top=MLP(widths=(1,)), loss=_loss(integer), optimizer=_optimizer(integer),
        interaction=_any(integer, (Interaction(kind="cat"), Interaction(), Interaction(self_interaction=True))))
    top = MLP(widths=_widths(integer, spec.interaction_width, 1), activation=_any(integer, ACTIVATIONS))
    spec = spec.model_copy(update={"top": top})
    size = _size(integer, min(MOST_SAMPLES, _WORK // work(spec)))
    data = Data(*(_any(integer, kinds) for kinds in (BAGS, INDICES, DENSE, LABELS)))
    return Example(spec.model_copy(update={"batch_size": size}), data, integer(0, 2**31 - 1))


def generate(count: int, seed: int) -> list[Example]:
    """`count` examples, numbered by their names; number i of a seed is always the same."""
    examples = []
    for number in range(count):
        name = f"generated-{seed}-{number}"
        examples.append(draw_example(random.Random(name).randint, name))
    return examples


def examples() -> "SearchStrategy[Example]":
    """The same as a Hypothesis strategy, for tests. Needs hypothesis."""
    from hypothesis import strategies as st

    return st.composite(lambda draw: draw_example(lambda low, high: draw(st.integers(low, high))))()


def work(spec: ModelSpec) -> int:
    """About how many multiplications one sample's forward pass takes. A lookup counts ten times: it is slower."""
    layers = sum(inputs * outputs for layers in spec.layer_sizes.values() for inputs, outputs in layers)
    lookups = sum(table.lookups[1] if table.fixed_lookups is None else table.fixed_lookups for table in spec.tables)
    return layers + spec.embedding_dim * (10 * lookups + spec.interacting_vectors**2)
