"""What the benchmark holds `torch-onnx` against: the same modules with nn.EmbeddingBag as torch.onnx.export has it.

    dlrm bench paper-benchmark --mode inference --backend torch-onnx --backend dlrm_torch.exporter_baseline:BACKEND \\
        --baseline torch-onnx
"""

from typing import TYPE_CHECKING

from dlrm_torch.onnx_backend import TorchOnnxBackend
from spec.model import ModelSpec
from spec.parameters import Arrays

if TYPE_CHECKING:
    from dlrm_torch.onnx_engine import OnnxModel


class ExporterBaseline(TorchOnnxBackend):
    """Exports torch's embedding_bag, of which PyTorch makes a loop over samples."""

    name = "torch-onnx, exporter's bags"

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> "OnnxModel":
        """Raises what its parent does."""
        self.check(device)
        from dlrm_torch.baselines import SeparateBags
        from dlrm_torch.onnx_engine import OnnxModel
        return OnnxModel(spec, parameters, bags=SeparateBags)


BACKEND = ExporterBaseline()
