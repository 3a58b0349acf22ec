"""The spec's update rules, in place (SPEC.md, 7). torch.optim differs: its Adagrad has no row-wise form."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from spec.model import ModelSpec
from spec.parameters import moment_name, state_shapes


class Optimizer:
    """Updates parameters by name and holds their state.

    Attributes:
        state: tensors of `spec.parameters.state_shapes` by name, zeros at first, in their parameter's dtype.
    """

    def __init__(self, spec: ModelSpec, parameters: Mapping[str, Tensor]) -> None:
        # Detached, since torch.no_grad does not reach the threads in which a sparse add_ may work row by row.
        self.parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        # As every engine holds them; it shows only where the parameters are float64.
        self.rate, self.eps = (float(np.float32(v)) for v in (spec.optimizer.learning_rate, spec.optimizer.eps))
        shapes = state_shapes(spec)
        self.state = {moment_name(name): parameter.new_zeros(shapes[moment_name(name)])
                      for name, parameter in parameters.items() if moment_name(name) in shapes}

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One update of each parameter named in `gradients`; a sparse gradient touches its own rows alone."""
        for name, gradient in gradients.items():
            w = self.parameters[name]
            h = self.state.get(moment_name(name))
            if h is None:
                w.add_(gradient, alpha=-self.rate)
            elif gradient.is_sparse:
                gradient = gradient.coalesce()  # sums the duplicates of a row: Adagrad must see g once
                (rows,), values = gradient.indices(), gradient.values()
                new_h = h[rows] + _square(values, h.dim())
                h[rows] = new_h
                w[rows] -= self._step(values, new_h)
            else:
                h.add_(_square(gradient, h.dim()))
                w.sub_(self._step(gradient, h))

    def _step(self, g: Tensor, h: Tensor) -> Tensor:
        """rate g / (sqrt(h) + eps); h may have one number for each row of g."""
        root = h.sqrt().add_(self.eps)
        return self.rate * g / (root if root.dim() == g.dim() else root[:, None])


def _square(g: Tensor, dims: int) -> Tensor:
    """g^2 (Duchi et al. 2011), or its mean over each row where the moment has one number a row."""
    return g.square() if g.dim() == dims else g.square().mean(1)
