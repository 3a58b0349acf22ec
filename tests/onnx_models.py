"""ONNX models as tests check and run them."""


import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator


def check(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def in_onnxruntime(model: onnx.ModelProto, feeds: dict[str, np.ndarray], threads: int = 1) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def in_reference(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feeds)


def adds_by_scattering(part: onnx.ModelProto | onnx.GraphProto | onnx.FunctionProto) -> bool:
    """Whether a ScatterND or ScatterElements anywhere has a reduction."""
    if isinstance(part, onnx.ModelProto):
        return any(map(adds_by_scattering, (part.graph, *part.functions)))
    attributes = [attribute for node in part.node for attribute in node.attribute]
    return (any(attribute.name == "reduction" for attribute in attributes)
            or any(adds_by_scattering(attribute.g) for attribute in attributes if attribute.HasField("g")))
