"""What runs the modules through torch.compile: bottom MLP, interaction and top MLP, forward and backward.

Tables, loss and optimizer stay eager: TorchInductor has no sparse gradients, and a dense one of a table is as large as
the table.
"""

import torch
import torch._dynamo
from torch import Tensor

from dlrm_torch.engine import TorchModel, _array, evaluate
from dlrm_torch.profile import Clock
from dlrm_torch.step import AutogradStep
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.tensors import activation_gradients, slice_names, trace_names

_MOST_VARIANTS = 256
"""Of one module's code: a model has three, for prediction, training and the trace."""


class CompiledModel(TorchModel):
    """One model of `spec.backend.Model`. What is compiled is compiled once for all sizes of batches."""

    def __init__(self, spec: ModelSpec, parameters: Arrays, device: str) -> None:
        super().__init__(spec, parameters, device)
        # A process that judges many models compiles the same code for each; above the limit PyTorch would go on in
        # eager mode, under the name of torch.compile.
        torch._dynamo.config.recompile_limit = _MOST_VARIANTS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for part in (self.module.bottom, self.module.interaction, self.module.top):
            part.compile(dynamic=True, fullgraph=True)
        self._step = AutogradStep(self.module, self._optimizer)
        self.engine = (f"PyTorch {torch.__version__} torch.compile (tables, loss and optimizer eager), {device}, "
                       f"{self.threads} threads")

    def profile(self, batch: Batch, training: bool = True) -> dict[str, float]:
        """By part, but for compiled graphs: "compiled/forward" and "compiled/backward"."""
        if training:
            with self._undone(batch):
                clock = Clock(self.device)
                self._step(self._inputs(batch), clock.mark)
        else:
            with torch.inference_mode():
                clock = Clock(self.device)
                inputs = self._inputs(batch)
                pooled = self.module.tables.pool(inputs.lookups)
                clock.mark("embedding")
                self.module.outputs(inputs.dense, pooled)
                clock.mark("compiled/forward")
        return dict(clock.seconds)

    def trace(self, batch: Batch) -> Arrays:
        """Through the same modules, compiled with every activation as an output.

        A compiled graph has no gradients of what is inside it. So a zero is added to each activation, and the
        gradient by the zero, an input, is the gradient by the activation.
        """
        inputs = self._inputs(batch)
        zeros: dict[str, Tensor] = {}

        def measure(name: str, x: Tensor) -> Tensor:
            zeros[name] = torch.zeros_like(x, requires_grad=True)
            return x

        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            evaluate(self.module, inputs, measure)
        seen: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> Tensor:
            seen[name] = x + zeros[name]
            return seen[name]

        loss = evaluate(self.module, inputs, keep)
        wanted = {name: zeros[name.removesuffix("_grad")] for name in activation_gradients(self.spec)}
        wanted |= {f"{name}_grad": parameter for name, parameter in self._trained.items()}
        for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True):
            if gradient.is_sparse:
                indices, values = slice_names(name.removesuffix("_grad"))
                seen[indices], seen[values] = gradient._indices()[0], gradient._values()
            else:
                seen[name] = gradient
        return {name: _array(seen[name].detach()) for name in trace_names(self.spec)}
