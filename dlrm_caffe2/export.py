"""The model in files: as Caffe2 NetDefs, and as the ONNX models of these nets."""

from pathlib import Path
from typing import TYPE_CHECKING

from dlrm_caffe2.model import constants, init_net, predict_net, train_net
from dlrm_caffe2.net import write_net
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net, inline, little_endian
from dlrm_caffe2.operators.record import FLOAT, INT32, INT64
from spec import toml
from spec.files import replacing, write_bytes
from spec.model import ModelSpec
from spec.parameters import Arrays, parameter_shapes, state_shapes

if TYPE_CHECKING:
    import onnx

EMBEDDED_BYTES = 2**30
"""Initializers above this are written to a file of their own: protobuf ends at 2 GiB."""


def export_netdef(spec: ModelSpec, parameters: Arrays, folder: Path) -> list[Path]:
    """Write init_net.pb, predict_net.pb and train_net.pb, which genuine Caffe2 loads; their paths.

    Raises InputError where the folder cannot be written to, and for more than protobuf's 2 GiB.
    """
    nets = {"init": init_net(spec, parameters), "predict": predict_net(spec), "train": train_net(spec)}
    paths = []
    for name, net in nets.items():
        paths.append(folder / f"{name}_net.pb")
        write_net(net, paths[-1])
    return paths


def export_onnx(spec: ModelSpec, parameters: Arrays, folder: Path) -> list[Path]:
    """Write the predict net as model.onnx and the train net as train.onnx, both of functions, and of either an
    .inlined.onnx; their paths.

    The initial parameters are part of the predict model: above EMBEDDED_BYTES they go to model.data, which both its
    files refer to. Raises InputError where the folder cannot be written to.
    """
    return [*_export_predict(spec, parameters, folder), *_write(train_model(spec), spec, folder, "train")]


def _export_predict(spec: ModelSpec, parameters: Arrays, folder: Path) -> list[Path]:
    net = predict_net(spec)
    blobs = {name: array for name, array in (parameters | constants(spec)).items() if name in net.external_input}
    external = "model.data" if sum(array.nbytes for array in blobs.values()) > EMBEDDED_BYTES else None
    model = export_net(net, blobs, {name: axes for name, axes in input_axes(spec).items()
                                    if name in net.external_input}, external=external)
    paths = []
    if external:
        paths.append(folder / external)
        with replacing(paths[-1]) as temporary, temporary.open("wb") as file:
            for array in blobs.values():
                little_endian(array).tofile(file)
    return [*paths, *_write(model, spec, folder, "model")]


def train_model(spec: ModelSpec) -> "onnx.ModelProto":
    """One training step: from a batch, parameters and optimizer state to the loss and to what has become of
    them, each as "X.new". The learning rate is a constant."""
    axes = input_axes(spec)
    axes |= {name: Axes(FLOAT, shape, "parameter") for name, shape in parameter_shapes(spec).items()}
    axes |= {name: Axes(FLOAT, shape, "optimizer state") for name, shape in state_shapes(spec).items()}
    return export_net(train_net(spec), constants(spec), axes)


def _write(model: "onnx.ModelProto", spec: ModelSpec, folder: Path, name: str) -> list[Path]:
    """With functions, and inlined."""
    model.doc_string = f"DLRM '{spec.name}': {spec.description}" if spec.description else f"DLRM '{spec.name}'"
    for key, value in {"spec": toml.dumps(spec), "digest": spec.digest}.items():
        model.metadata_props.add(key=key, value=value)
    contents = {folder / f"{name}.onnx": model, folder / f"{name}.inlined.onnx": inline(model)}
    for path, content in contents.items():
        write_bytes(path, content.SerializeToString(deterministic=True))
    return list(contents)


def input_axes(spec: ModelSpec) -> dict[str, Axes]:
    """The batch's arrays, by name. "B" is the batch; each table has its own number of lookups."""
    axes = {"dense": Axes(FLOAT, ("B", spec.dense_features), "continuous features")}
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        axes[f"{name}.indices"] = Axes(INT64, (f"{name}.lookups",), f"rows that are looked up, sample by sample, "
                                       f"each from 0 to {table.rows - 1}")
        axes[f"{name}.lengths"] = Axes(INT32, ("B",), "how many of the indices belong to each sample; 0 is allowed")
    return axes | {"label": Axes(FLOAT, ("B", 1), "target")}
