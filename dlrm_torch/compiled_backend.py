"""The backend `torch-compile`: the PyTorch modules through torch.compile. Imports torch only when a model is made."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm_torch.backend import TorchBackend
from spec.backend import Availability
from spec.model import ModelSpec
from spec.parameters import Arrays

if TYPE_CHECKING:
    from dlrm_torch.compiled_engine import CompiledModel


class CompiledBackend(TorchBackend):
    """See `spec.backend.Backend`. It compiles for about a minute before it first runs a model."""

    name = "torch-compile"

    def available(self) -> Availability:
        state = super().available()
        compiler = os.environ.get("CXX", "g++")
        if state.ok and shutil.which(compiler) is None:
            return Availability(False, f"torch.compile needs a C++ compiler, and there is no {compiler}",
                                "apt install g++, or set CXX to a compiler")
        if state.ok and not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return Availability(False, "torch.compile needs Python.h, which is not there", "apt install python3-dev")
        return state

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> "CompiledModel":
        """Raises as `TorchBackend.create`."""
        self.check(device)
        from dlrm_torch.compiled_engine import CompiledModel
        return CompiledModel(spec, parameters, device)


BACKEND = CompiledBackend()
