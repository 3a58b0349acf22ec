"""The model in files: as Caffe2 NetDefs, and as the ONNX models of these nets."""

from pathlib import Path
from typing import TYPE_CHECKING

from dlrm_caffe2.model import constants, init_net, predict_net, train_net
from dlrm_caffe2.net import write_net
from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net, inline
from dlrm_caffe2.operators.record import FLOAT, INT32, INT64
from spec.exported import Source, docs, metadata, stored_if_large, title
from spec.files import write_bytes
from spec.model import ModelSpec
from spec.parameters import Arrays, is_sparse, parameter_shapes, state_shapes, trained_parameters

if TYPE_CHECKING:
    import onnx


def export_netdef(spec: ModelSpec, parameters: Arrays, folder: Path, source: Source | None = None) -> list[Path]:
    """Write init_net.pb, predict_net.pb and train_net.pb, which genuine Caffe2 loads; their paths. A NetDef has no
    place for the source.

    Raises InputError where the folder cannot be written to, and for more than protobuf's 2 GiB.
    """
    nets = {"init": init_net(spec, parameters), "predict": predict_net(spec), "train": train_net(spec)}
    paths = []
    for name, net in nets.items():
        paths.append(folder / f"{name}_net.pb")
        write_net(net, paths[-1])
    return paths


def export_onnx(spec: ModelSpec, parameters: Arrays, folder: Path, source: Source | None = None,
                by_rows: bool = False) -> list[Path]:
    """Write the predict net as model.onnx and the train net as train.onnx, both of functions, and of either an
    .inlined.onnx; the paths of these files and of the parameters' own, if there is one.

    The predict model holds the parameters, or refers to the source's file where that is in the folder: it is made
    where there are too many (`spec.exported.EMBEDDED_BYTES`). In the train model they are inputs; `by_rows`: see
    `train_model`. Raises InputError where the folder cannot be written to.
    """
    source = stored_if_large(spec, parameters, folder, source or Source())
    model = predict_model(spec, parameters, source.references(folder))
    return [*source.paths(folder), *_write(model, spec, folder / "model.onnx", source.name),
            *_write(train_model(spec, by_rows), spec, folder / "train.onnx", "inputs of the model")]


def predict_model(spec: ModelSpec, parameters: Arrays, stored: dict[str, tuple[str, int]]) -> "onnx.ModelProto":
    """From a batch to `probability`. `stored`: see `export_net`."""
    net = predict_net(spec)
    blobs = {name: array for name, array in (parameters | constants(spec)).items() if name in net.external_input}
    inputs = {name: axes for name, axes in input_axes(spec).items() if name in net.external_input}
    return export_net(net, blobs, inputs, stored=stored)


def train_model(spec: ModelSpec, by_rows: bool = False) -> "onnx.ModelProto":
    """One training step: from a batch, parameters and optimizer state to the loss and to what has become of
    them, each as "X.new". The learning rate is a constant.

    by_rows: of a table X, and of its optimizer state, the rows that change alone: "X.new_rows" int64 [U], none twice,
    and "X.new_values" [U, ...], with which X[new_rows] = new_values is the new table. No table is copied then.
    """
    shapes = parameter_shapes(spec) | state_shapes(spec)
    axes = input_axes(spec) | {name: Axes(FLOAT, shape) for name, shape in shapes.items()}
    changed = [name for name in (*trained_parameters(spec), *state_shapes(spec)) if by_rows and is_sparse(name)]
    return export_net(train_net(spec), constants(spec), axes, by_rows=changed)


def input_axes(spec: ModelSpec) -> dict[str, Axes]:
    """The batch's arrays, by name. "B" is the batch; a ragged table has a number of lookups of its own."""
    axes = {"dense": Axes(FLOAT, ("B", spec.dense_features))}
    for number, table in enumerate(spec.tables):
        name, k = f"tables.{number}", table.fixed_lookups
        lookups = f"{name}.lookups" if k is None else "B" if k == 1 else f"{k}*B"
        axes |= {f"{name}.indices": Axes(INT64, (lookups,)), f"{name}.lengths": Axes(INT32, ("B",))}
    return axes | {"label": Axes(FLOAT, ("B", 1))}


def _write(model: "onnx.ModelProto", spec: ModelSpec, path: Path, parameters: str) -> list[Path]:
    """With functions, and inlined. `parameters`: what the metadata says about where they come from."""
    model.doc_string = title(spec)
    for key, value in metadata(spec, parameters).items():
        model.metadata_props.add(key=key, value=value)
    texts = docs(spec)
    for value in model.graph.input:
        value.doc_string = texts[value.name]
    for value in model.graph.output:
        value.doc_string = texts.get(value.name) or _doc_of_update(value.name)
    contents = {path: model, path.with_suffix(".inlined.onnx"): inline(model)}
    for path, content in contents.items():
        write_bytes(path, content.SerializeToString(deterministic=True))
    return list(contents)


def _doc_of_update(output: str) -> str:
    name, _, part = output.rpartition(".")
    return {"new": "after the update: {}", "new_rows": "the rows of {} that change, none twice",
            "new_values": "what becomes of the rows of {} that change"}[part].format(name)
