"""The backend `torch`: PyTorch modules and autograd. Imports torch only when a model is made."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from spec.backend import Availability
from spec.errors import EngineError, InputError
from spec.model import ModelSpec
from spec.parameters import Arrays

if TYPE_CHECKING:
    from dlrm_torch.engine import TorchModel


class TorchBackend:
    """See `spec.backend.Backend`. device "cuda" is accepted where PyTorch sees a GPU; it was never run on one."""

    name = "torch"
    trains = True
    repeatable = True  # on the CPU

    def available(self) -> Availability:
        if find_spec("torch") is None:
            return Availability(False, "PyTorch is not installed", "pip install torch")
        return Availability(True)

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> "TorchModel":
        """Raises EngineError without PyTorch, InputError for a device other than cpu or a usable cuda."""
        self.check(device)
        from dlrm_torch.engine import TorchModel
        return TorchModel(spec, parameters, device)

    def check(self, device: str) -> None:
        """Raise what `create` raises."""
        state = self.available()
        if not state.ok:
            raise EngineError(f"backend '{self.name}': {state.reason}; {state.remedy}")
        _check_device(device)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InputError(f"device '{device}'", "cpu or cuda", "another device", "use --device cpu")
    if device == "cuda":
        import torch
        if not torch.cuda.is_available():
            raise InputError("device 'cuda'", "a GPU that PyTorch can use", f"none in PyTorch {torch.__version__}",
                             "use device cpu, or install a CUDA build of PyTorch")


BACKEND = TorchBackend()
