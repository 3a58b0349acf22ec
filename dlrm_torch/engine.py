"""What runs the modules: eager PyTorch, one model resident in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dlrm_torch.inputs import Inputs, inputs_from, tensor_from
from dlrm_torch.loss import mean_loss
from dlrm_torch.model import DLRM, Tap, untapped
from dlrm_torch.names import module_names
from dlrm_torch.optimizer import Optimizer
from dlrm_torch.profile import Stopwatch
from dlrm_torch.step import TrainStep
from spec.batch import Batch
from spec.memory import keep_freed_memory
from spec.model import ModelSpec
from spec.parameters import Arrays, check_parameters, is_sparse, trained_parameters
from spec.tensors import activation_gradients, slice_names, trace_names


def outputs(model: DLRM, inputs: Inputs, tap: Tap = untapped) -> tuple[Tensor, Tensor]:
    """As `DLRM.outputs`."""
    return model.outputs(inputs.dense, model.tables.pool(inputs.lookups), tap)


def evaluate(model: DLRM, inputs: Inputs, tap: Tap = untapped) -> Tensor:
    """The loss, shape ()."""
    return tap("loss", mean_loss(model.spec.loss, *outputs(model, inputs, tap), inputs.label))


def trace(model: DLRM, inputs: Inputs) -> dict[str, Tensor]:
    """Every tensor of `spec.tensors.trace_names`, in that order. Leaves nothing behind in the model."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> Tensor:
        seen[name] = x
        return x

    loss = evaluate(model, inputs, keep)
    parameters = dict(model.named_parameters())
    wanted = {name: seen[name.removesuffix("_grad")] for name in activation_gradients(model.spec)}
    wanted |= {f"{name}_grad": parameters[name] for name in trained_parameters(model.spec)}
    for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
        if gradient.is_sparse:
            indices, values = slice_names(name.removesuffix("_grad"))
            seen[indices], seen[values] = gradient._indices()[0], gradient._values()
        else:
            seen[name] = gradient
    return {name: seen[name].detach() for name in trace_names(model.spec)}


class TorchModel:
    """One model of `spec.backend.Model`. Batches are validated before they are used."""

    def __init__(self, spec: ModelSpec, parameters: Arrays, device: str) -> None:
        check_parameters(spec, parameters)
        keep_freed_memory()
        self.spec, self.device = spec, device
        self.module = DLRM(spec)
        self.module.load_state_dict({name: tensor_from(array, "cpu") for name, array in parameters.items()})
        self.module.to(device)
        self._trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._optimizer = Optimizer(self.module)
        self._step = TrainStep(self.module, self._optimizer)
        self.threads = torch.get_num_threads()
        self.engine = f"PyTorch {torch.__version__} eager, {device}, {self.threads} threads"

    def predict(self, batch: Batch) -> np.ndarray:
        with torch.inference_mode():
            return _array(outputs(self.module, self._inputs(batch))[1])

    def trace(self, batch: Batch) -> Arrays:
        return {name: _array(x) for name, x in trace(self.module, self._inputs(batch)).items()}

    def train_step(self, batch: Batch) -> float:
        return self._step(self._inputs(batch))

    def parameters(self) -> Arrays:
        return {name: _array(x) for name, x in self.module.state_dict().items()}

    def optimizer_state(self) -> Arrays:
        return {name: _array(x) for name, x in self._optimizer.state.items()}

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """By "part/ATen operator"; a step is undone afterwards; autograd's own work is in none."""
        stopwatch = Stopwatch(self.device)
        if training:
            with self._undone(batch), stopwatch:
                self._step(self._inputs(batch), stopwatch.mark)
        else:
            with torch.inference_mode(), stopwatch:
                outputs(self.module, self._inputs(batch), stopwatch.tap)
        return dict(stopwatch.seconds)

    def operators(self) -> dict[str, str]:
        """See `spec.backend.NamesOperators`."""
        return module_names(self.spec)

    def close(self) -> None:
        self.module = self._optimizer = self._step = None
        self._trained = {}

    def _inputs(self, batch: Batch) -> Inputs:
        batch.validate(self.spec)
        return inputs_from(batch, self.module.tables, self.device)

    @contextmanager
    def _undone(self, batch: Batch) -> Iterator[None]:
        """Put back on exit all that a step on this batch changes: of a table, the rows that it looks up."""
        batch.validate(self.spec)
        rows = [torch.from_numpy(np.unique(indices)).to(self.device) for indices in batch.indices]
        saved = []
        for name, tensor in (self._trained | self._optimizer.state).items():
            part = rows[int(name.split(".")[1])] if is_sparse(name) else slice(None)
            saved.append((tensor.detach(), part, tensor.detach()[part].clone()))
        try:
            yield
        finally:
            for tensor, part, before in saved:
                tensor[part] = before


def _array(x: Tensor) -> np.ndarray:
    """A copy: traced tensors may share memory with the batch or with each other."""
    return np.array(x.cpu().numpy(), order="C")
