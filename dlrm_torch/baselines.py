"""What the benchmark holds `torch` against: the step that a PyTorch user would write, and FBGEMM's fused tables.

Both are backends in all but `trace` and `profile`: they can be timed, and their predictions checked, but not judged in
full. Batches become tensors when they are first seen, so that no step has any data to handle.

    PLAIN    nn.EmbeddingBag(sparse=True), autograd, torch.optim
    FBGEMM   SplitTableBatchedEmbeddingBags of fbgemm-gpu-cpu (not a dependency of this project) for all tables; the
             rest, and the model around it, as in PLAIN
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlrm_torch.embedding import EmbeddingBag, EmbeddingBags
from spec.backend import Availability
from spec.batch import Batch
from spec.errors import InputError
from spec.model import ModelSpec
from spec.parameters import Arrays, check_parameters


class _Inputs(NamedTuple):
    dense: Tensor
    indices: list[Tensor]
    offsets: list[Tensor]
    label: Tensor
    joined: tuple[Tensor, Tensor]
    """Indices of all tables, and offsets into them with the end as the last."""


class PlainTables(nn.Module):
    def __init__(self, spec: ModelSpec, weights: list[Tensor]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=True)
                                  for weight in weights)

    def forward(self, inputs: _Inputs) -> list[Tensor]:
        return [bag(indices, offsets) for bag, indices, offsets
                in zip(self.bags, inputs.indices, inputs.offsets, strict=True)]


class FbgemmTables(nn.Module):
    """The optimizer is part of the backward pass, and sums the gradients of a repeated row first."""

    def __init__(self, spec: ModelSpec, weights: list[Tensor]) -> None:
        super().__init__()
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        kinds = {"sgd": EmbOptimType.EXACT_SGD, "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
        self.width = spec.embedding_dim
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(len(weight), self.width, EmbeddingLocation.HOST, ComputeDevice.CPU) for weight in weights],
            optimizer=kinds[spec.optimizer.kind], learning_rate=spec.optimizer.learning_rate, eps=spec.optimizer.eps)
        for own, weight in zip(self.tables.split_embedding_weights(), weights, strict=True):
            own.copy_(weight)

    def forward(self, inputs: _Inputs) -> list[Tensor]:
        return list(self.tables(*inputs.joined).split(self.width, 1))


class SeparateBags(EmbeddingBags):
    """The tables of our modules, each looked up by an embedding_bag of its own: what exporter_baseline.py exports."""

    def pool(self, lookups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [self._bag(bag, *its) for bag, its in zip(self, lookups, strict=True)]

    @staticmethod
    def _bag(bag: EmbeddingBag, indices: Tensor, lengths_B: Tensor) -> Tensor:
        weights = bag.pooling.index_select(0, indices) if bag.table.weighted else None
        starts_B, k = None, bag.table.fixed_lookups
        if k is None:
            starts_B = lengths_B.cumsum(0) - lengths_B
        else:
            indices, weights = indices.view(-1, k), weights.view(-1, k) if weights is not None else None
        pooled_BE = F.embedding_bag(indices, bag.weight, starts_B, mode="sum", per_sample_weights=weights)
        if bag.table.pooling == "mean":
            pooled_BE = pooled_BE * lengths_B.clamp(min=1).to(pooled_BE.dtype).reciprocal()[:, None]
        return pooled_BE


class BaselineModel:
    """One model of `spec.backend.Model`, but for `trace`, `profile`, `parameters` and `optimizer_state`."""

    def __init__(self, spec: ModelSpec, parameters: Arrays, tables: type[nn.Module], library: str) -> None:
        check_parameters(spec, parameters)
        self.spec, self.threads = spec, torch.get_num_threads()
        self.engine = f"{library}, PyTorch {torch.__version__} eager, cpu, {self.threads} threads"
        weights = {name: torch.tensor(array) for name, array in parameters.items()}
        self._bottom, self._top = (_mlp(spec, name, weights) for name in ("bottom", "top"))
        self._tables = tables(spec, [weights[f"tables.{number}.weight"] for number in range(len(spec.tables))])
        pairs = torch.tensor(spec.pairs).T
        self._i, self._j = pairs[0], pairs[1]
        dense = [*self._bottom.parameters(), *self._top.parameters()]
        rate, eps = spec.optimizer.learning_rate, spec.optimizer.eps
        trained = [dense, list(self._tables.parameters())] if tables is PlainTables else [dense]
        self._optimizers = [torch.optim.SGD(each, rate) if spec.optimizer.kind == "sgd"
                            else torch.optim.Adagrad(each, rate, eps=eps) for each in trained]
        self._loss = {"mse": F.mse_loss, "bce": F.binary_cross_entropy}[spec.loss.kind]
        self._seen: dict[int, tuple[Batch, _Inputs]] = {}

    def predict(self, batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return self._forward(self._inputs(batch)).numpy()

    def train_step(self, batch: Batch) -> float:
        inputs = self._inputs(batch)
        loss = self._loss(self._forward(inputs), inputs.label)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss.item()

    def close(self) -> None:
        self._seen.clear()

    def _forward(self, inputs: _Inputs) -> Tensor:
        x_BE = self._bottom(inputs.dense)
        stacked_BFE = torch.stack([x_BE, *self._tables(inputs)], 1)
        products_BFF = torch.bmm(stacked_BFE, stacked_BFE.transpose(1, 2))
        return self._top(torch.cat([x_BE, products_BFF[:, self._i, self._j]], 1))

    def _inputs(self, batch: Batch) -> _Inputs:
        if id(batch) not in self._seen:
            lengths = [torch.from_numpy(array).long() for array in batch.lengths]
            indices = [torch.from_numpy(array) for array in batch.indices]
            ends = torch.cat(lengths).cumsum(0)
            joined = torch.cat(indices), torch.cat([ends.new_zeros(1), ends])
            self._seen[id(batch)] = batch, _Inputs(
                torch.from_numpy(batch.dense), indices, [each.cumsum(0) - each for each in lengths],
                torch.from_numpy(batch.label), joined)
        return self._seen[id(batch)][1]


class Baseline:
    """See `spec.backend.Backend`. For models with sum pooling, dot interaction, and mse or bce without a clip."""

    trains = True

    def __init__(self, name: str, tables: type[nn.Module], optimizers: tuple[str, ...], package: str,
                 install: str) -> None:
        self.name, self._tables, self._optimizers = name, tables, optimizers
        self._package, self._install = package, install

    def available(self) -> Availability:
        if find_spec(self._package) is None:
            return Availability(False, f"{self._package} is not installed", f"pip install {self._install}")
        return Availability(True)

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> BaselineModel:
        """Raises InputError for a model that it does not have."""
        simple = (device == "cpu" and spec.interaction.kind == "dot" and spec.loss.kind in ("mse", "bce")
                  and not spec.loss.clip and all(table.pooling == "sum" for table in spec.tables))
        if not simple or spec.optimizer.kind not in self._optimizers:
            raise InputError(f"backend '{self.name}'", "sum pooling, dot interaction, mse or bce without a clip, and "
                             f"{' or '.join(self._optimizers)}", f"spec '{spec.name}'", "time another backend")
        return BaselineModel(spec, parameters, self._tables, self.name)


def _mlp(spec: ModelSpec, name: str, weights: dict[str, Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(spec.layer_sizes[name]):
        linear = nn.Linear(inputs, outputs)
        linear.load_state_dict({part: weights[f"{name}.{number}.{part}"] for part in ("weight", "bias")})
        layers += [linear, nn.ReLU() if getattr(spec, name).activation == "relu" else nn.Sigmoid()]
    if name == "top":
        layers[-1] = nn.Sigmoid()
    return nn.Sequential(*layers)


PLAIN = Baseline("plain eager PyTorch", PlainTables, ("sgd", "adagrad"), "torch", "torch")
FBGEMM = Baseline("fbgemm-gpu-cpu", FbgemmTables, ("sgd", "rowwise_adagrad"), "fbgemm_gpu", "fbgemm-gpu-cpu")
