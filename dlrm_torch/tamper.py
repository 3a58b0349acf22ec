"""Seeded faults inside the PyTorch modules (`spec.tamper`): through the tap of every activation, and its gradient."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlrm_torch.engine import TorchModel
from dlrm_torch.step import AutogradStep
from spec.backend import Availability, Backend
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.tamper import Change
from spec.tensors import slice_names


def for_many(backend: Backend) -> Backend:
    """See `spec.tamper.Tamper`."""
    return backend


def tampered(backend: Backend, change: Change) -> "TamperedBackend | None":
    """See `spec.tamper.Tamper`. The loss is no module's."""
    return None if change.tensor == "loss" else TamperedBackend(backend, change)


def write(model: TorchModel, arrays: Arrays) -> None:
    """See `spec.tamper.Tamper`."""
    held = dict(model.module.named_parameters()) | model._optimizer.state
    for name, array in arrays.items():
        held[name].detach().copy_(torch.from_numpy(np.ascontiguousarray(array)))


class TamperedBackend:
    """See `spec.backend.Backend`."""

    def __init__(self, backend: Backend, change: Change) -> None:
        self.backend, self.change, self.name, self.trains = backend, change, backend.name, backend.trains

    def available(self) -> Availability:
        return self.backend.available()

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> TorchModel:
        model = self.backend.create(spec, parameters, device)
        _Fault(model, self.change)
        return model


class _Fault:
    """Puts itself between a model's modules and whatever taps them."""

    def __init__(self, model: TorchModel, change: Change) -> None:
        self.model, self.change = model, change
        self.seen: dict[str, Any] = {}
        self.parameters = dict(model.module.named_parameters())
        self.inputs, self.outputs = model._inputs, model.module.outputs
        model._inputs, model.module.outputs = self.see_batch, self.tapped
        model._step = AutogradStep(model.module, model._optimizer)
        parameter = change.tensor.partition("_grad")[0]
        if parameter in self.parameters:
            self.parameters[parameter].register_hook(self.change_parameter_gradient)

    def see_batch(self, batch: Batch) -> Any:
        self.seen = dict(batch.arrays())
        return self.inputs(batch)

    def tapped(self, *arguments: Any, **named: Any) -> Any:
        call = inspect.signature(self.outputs).bind(*arguments, **named)
        call.apply_defaults()
        tap = call.arguments["tap"]
        call.arguments["tap"] = lambda name, x: _Gradient.apply(tap(name, self.see(name, x)), partial(
            self.see_gradient, f"{name}_grad"))
        return self.outputs(*call.args, **call.kwargs)

    def see(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = x
        if name == self.change.tensor:
            x = self.seen[name] = _Replaced.apply(x, self.made(x))
        return x

    def see_gradient(self, name: str, gradient: Tensor) -> Tensor:
        self.seen[name] = gradient
        if name == self.change.tensor:
            self.seen[name] = self.made(gradient)
        return self.seen[name]

    def change_parameter_gradient(self, gradient: Tensor) -> Tensor:
        if not gradient.is_sparse:
            self.seen[self.change.tensor] = gradient
            return self.made(gradient)
        indices, values = slice_names(self.change.tensor.partition("_grad")[0])
        rows = gradient._indices()
        self.seen |= {indices: rows[0], values: gradient._values()}
        return torch.sparse_coo_tensor(rows, self.made(gradient._values()), gradient.shape,
                                       is_coalesced=gradient.is_coalesced(), check_invariants=False)

    def made(self, like: Tensor) -> Tensor:
        held = {name: self.seen.get(name, self.parameters.get(name)) for name in self.change.reads}
        arrays = {name: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for name, x in held.items()}
        return torch.from_numpy(np.array(self.change.make(arrays), np.float32, order="C")).to(like.device)


class _Replaced(torch.autograd.Function):
    """Another value in place of the first; the gradient is handed on as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gradient(torch.autograd.Function):
    """The value as it is; its gradient, summed over all that uses it, as a function makes it."""

    @staticmethod
    def forward(ctx, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None
