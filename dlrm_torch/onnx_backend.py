"""The backend `torch-onnx`: the PyTorch model as export.py writes it, in ONNX Runtime. Forward only."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from spec.backend import Availability
from spec.errors import EngineError, InputError
from spec.model import ModelSpec
from spec.parameters import Arrays

if TYPE_CHECKING:
    from dlrm_torch.onnx_engine import OnnxModel

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


class TorchOnnxBackend:
    """See `spec.backend.Backend`."""

    name = "torch-onnx"
    trains = False
    repeatable = True

    def available(self) -> Availability:
        missing = [package for package in _PACKAGES if find_spec(package) is None]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return Availability(True)

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> "OnnxModel":
        """Raises EngineError where a package is missing, InputError for a device other than cpu."""
        self.check(device)
        from dlrm_torch.onnx_engine import OnnxModel
        return OnnxModel(spec, parameters)

    def check(self, device: str) -> None:
        """Raises what `create` does, before anything is loaded."""
        state = self.available()
        if not state.ok:
            raise EngineError(f"backend '{self.name}': {state.reason}; {state.remedy}")
        if device != "cpu":
            raise InputError(f"device '{device}'", "cpu", "another device", "use --device cpu")


BACKEND = TorchOnnxBackend()
