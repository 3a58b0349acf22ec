"""What a file of a model says about itself, in whatever format: the same in every exporter's files."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spec import tensor_file, toml
from spec.model import ModelSpec
from spec.parameters import Arrays, parameter_bytes, parameter_shapes, state_shapes
from spec.tensor_file import ArrayType, TensorFile
from spec.tensors import batch_names

STORED = "model.safetensors"
EMBEDDED_BYTES = 2**30
"""Parameters above this are never part of an ONNX file: protobuf ends at 2 GiB."""


@dataclass(frozen=True)
class Source:
    """Where the parameters of an exported model come from.

    Attributes:
        name: "seed 3", or "file trained.safetensors".
        file: a file that holds them, to which the exported ones may refer instead of holding them too.
    """

    name: str = "not recorded"
    file: TensorFile | None = None

    def paths(self, folder: Path) -> list[Path]:
        """The file, where those in `folder` refer to it."""
        return [self.file.path] if self.file and self.references(folder) else []

    def references(self, folder: Path) -> dict[str, tuple[str, int]]:
        """For each parameter, the file's path as files in `folder` refer to it, and the offset of its bytes. Empty
        where the file is not within the folder: ONNX runtimes would not read it."""
        if self.file is None or not self.file.path.resolve().is_relative_to(folder.resolve()):
            return {}
        location = self.file.path.resolve().relative_to(folder.resolve()).as_posix()
        return {name: (location, offset) for name, offset in self.file.offsets.items()}


def store(spec: ModelSpec, folder: Path, name: str, make: Callable[[str], np.ndarray]) -> Source:
    """Write the parameters, as `make` gives them one by one, to a file to which others can refer."""
    types = {parameter: ArrayType(np.dtype(np.float32), shape) for parameter, shape in parameter_shapes(spec).items()}
    return Source(name, tensor_file.write(folder / STORED, types, make, metadata(spec, name)))


def stored_if_large(spec: ModelSpec, parameters: Arrays, folder: Path, source: Source) -> Source:
    """The source, with a file in the folder where the parameters are too many to be part of an ONNX file."""
    if parameter_bytes(spec) <= EMBEDDED_BYTES or source.references(folder):
        return source
    return store(spec, folder, source.name, parameters.__getitem__)


def title(spec: ModelSpec) -> str:
    return f"DLRM '{spec.name}': {spec.description}" if spec.description else f"DLRM '{spec.name}'"


def metadata(spec: ModelSpec, source: str) -> dict[str, str]:
    """The spec (TOML), its digest, where the parameters come from, and what the named axes count (JSON)."""
    return {"spec": toml.dumps(spec), "digest": spec.digest, "parameters": source, "axes": json.dumps(axes(spec))}


def axes(spec: ModelSpec) -> dict[str, str]:
    """What each axis counts whose size may differ from run to run, by its name in the files."""
    named = {"B": "samples of the batch"}
    for number, table in enumerate(spec.tables):
        k = table.fixed_lookups
        if k is None:
            named[f"tables.{number}.lookups"] = f"rows that are looked up in table {number}: the sum of its lengths"
        elif k > 1:
            named[f"{k}*B"] = f"rows that are looked up where each sample has {k}"
    return named


def docs(spec: ModelSpec) -> dict[str, str]:
    """One line on each array of a batch, each parameter, and each of the optimizer's."""
    names = (*batch_names(spec), *parameter_shapes(spec), *state_shapes(spec))
    return {name: _doc(spec, name) for name in names} | {
        "probability": "of a click, for each sample", "loss": "the mean over the batch, before the update"}


def _doc(spec: ModelSpec, name: str) -> str:
    if name.endswith(".moment"):
        return f"optimizer state: Adagrad's sum of squares of the gradients of {name.removesuffix('.moment')}"
    if match := re.fullmatch(r"(bottom|top)\.(\d+)\.(weight|bias)", name):
        shape = ", [out, in]" if match[3] == "weight" else ""
        return f"parameter: {match[3]} of layer {match[2]} of the {match[1]} MLP{shape}"
    if match := re.fullmatch(r"tables\.(\d+)\.(\w+)", name):
        return _table_doc(spec, int(match[1]), match[2])
    return {"dense": "continuous features", "label": _LABELS[spec.loss.kind]}[name]


_LABELS = {"mse": "target", "bce": "target: 1 for a click, 0 for none", "wbce": "target: 1 for a click, 0 for none",
           "bce_logits": "target: from 0 to 1"}


def _table_doc(spec: ModelSpec, number: int, part: str) -> str:
    table = spec.tables[number]
    if part == "indices":
        return f"rows that are looked up, sample by sample, each from 0 to {table.rows - 1}"
    if part == "lengths":
        how_many = "0 is allowed" if table.fixed_lookups is None else f"always {table.fixed_lookups}"
        return f"how many of the indices belong to each sample; {how_many}"
    if part == "pooling":
        return f"parameter: weight of each row of table {number} where rows are pooled"
    return f"parameter: embedding table {number}, one row for each index"
