"""The floor of tools/bench/floor.py as something that can be timed beside a backend: the matrix products of a step,
each at its own size, its rows gathered, and its distinct rows added to. No activation, interaction or loss, no sorting,
and no result: what is added is 0.

Rows are read as the model reads them, one by one or in bags, and each distinct one is added to once, in its order, by
the loop that the model's steps take. Batches become tensors when they are first seen.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlrm_torch import kernels
from dlrm_torch.embedding import EmbeddingBags
from dlrm_torch.lookups import Lookups
from spec.backend import Availability
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays, check_parameters


class _Layer(NamedTuple):
    """A product [B, in] by [in, out] and those of its gradient; `dx` is None where nobody needs it."""

    w: Tensor
    dw: Tensor
    x: Tensor
    y: Tensor
    dx: Tensor | None


class FloorModel:
    """Can be timed as a `spec.backend.Model`: `predict` and `train_step` return zeros."""

    def __init__(self, spec: ModelSpec, parameters: Arrays) -> None:
        check_parameters(spec, parameters)
        self.spec, self.threads = spec, torch.get_num_threads()
        self.engine = f"products and rows alone, PyTorch {torch.__version__}, cpu, {self.threads} threads"
        self._tables = EmbeddingBags(spec.tables, spec.embedding_dim).requires_grad_(False)
        for number, bag in enumerate(self._tables):
            bag.weight.copy_(torch.from_numpy(parameters[f"tables.{number}.weight"]))
        self._zeros_11E = torch.zeros(1, 1, spec.embedding_dim)
        self._layers: dict[int, list[_Layer]] = {}
        self._seen: dict[int, tuple[Batch, list[Lookups], Tensor]] = {}

    def predict(self, batch: Batch) -> np.ndarray:
        self._forward(batch)
        return np.zeros((batch.size, 1), np.float32)

    def train_step(self, batch: Batch) -> float:
        layers, rows = self._forward(batch)
        with torch.inference_mode():
            for w, dw, x, y, dx in reversed(layers):
                torch.mm(y.T, x, out=dw)
                if dx is not None:
                    torch.mm(y, w, out=dx)
            kernels.add_to_rows(self._tables.shared("weight"), rows, None, None, None,
                                self._zeros_11E.expand(len(rows), -1, -1), 1.0)
        return 0.0

    def close(self) -> None:
        self._seen.clear()

    def _forward(self, batch: Batch) -> tuple[list[_Layer], Tensor]:
        """What the backward pass needs: the layers, and the distinct rows, ascending."""
        if batch.size not in self._layers:
            self._layers[batch.size] = self._make_layers(batch.size)
        if id(batch) not in self._seen:
            lookups = self._tables.lookups(*([torch.from_numpy(array) for array in arrays]
                                             for arrays in (batch.indices, batch.lengths)))
            rows = torch.cat([its.rows.long() for its in lookups]).unique()
            self._seen[id(batch)] = batch, lookups, rows
        _, lookups, rows = self._seen[id(batch)]
        with torch.inference_mode():
            for layer in self._layers[batch.size]:
                torch.mm(layer.x, layer.w.T, out=layer.y)
            for its in lookups:
                its.pooled(self._tables.shared("weight"))
        return self._layers[batch.size], rows

    def _make_layers(self, size: int) -> list[_Layer]:
        """With tensors of its own for each, as a step has them."""
        generator = torch.Generator().manual_seed(0)
        return [_Layer(*(torch.randn(shape, generator=generator) / inputs
                         for shape in ((outputs, inputs), (outputs, inputs), (size, inputs), (size, outputs))),
                       torch.empty(size, inputs) if (name, number) != ("bottom", 0) else None)
                for name, sizes in self.spec.layer_sizes.items() for number, (inputs, outputs) in enumerate(sizes)]


class Floor:
    """Can be timed as a `spec.backend.Backend`, where nobody asks whether it is right."""

    name = "floor"
    trains = True

    def available(self) -> Availability:
        return Availability(True)

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> FloorModel:
        return FloorModel(spec, parameters)


FLOOR = Floor()
