"""The model in a file: an ONNX model of ONNX's own operators, for any batch and any number of lookups.

torch.onnx.export translates the modules, but for the embedding bags, of which it makes a loop over samples. Here a
bag of fixed size is Gather and ReduceSum, and a ragged one is a node of its own (`torch.onnx.ops.symbolic`), whose
body (ragged.py) is inlined afterwards. That takes neither a custom operator nor a translation table.

The graph does not depend on the parameters: it is exported with tables of one row, unoptimised, since PyTorch's
optimiser merges initializers that are equal and folds those that it can, and the parameters are put in afterwards
under their own names. So tables of any size are never copied in memory, and each activation keeps its name.
"""

import gc
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, inliner
from torch import Tensor
from torch.nn import functional as F

from dlrm_torch import ragged
from dlrm_torch.embedding import EmbeddingBag, EmbeddingBags
from dlrm_torch.model import DLRM
from spec.errors import EngineError
from spec.exported import Source, docs, metadata, stored_if_large, title
from spec.files import write_bytes
from spec.model import ModelSpec
from spec.parameters import Arrays, check_parameters, parameter_shapes
from spec.tensors import batch_names, part_of, trace_names

OPSET = 18
IR_VERSION = 8
"""The newest that ONNX Runtime 1.16 reads."""


def export_onnx(spec: ModelSpec, parameters: Arrays, folder: Path, source: Source | None = None) -> list[Path]:
    """Write the model that predicts as model.torch.onnx; the paths of it and of the parameters' own file, if there
    is one.

    It holds the parameters, or refers to the source's file where that is in the folder: it is made where there are
    too many (`spec.exported.EMBEDDED_BYTES`). Raises InputError for parameters that are not the spec's and where the
    folder cannot be written to, EngineError where PyTorch's exporter fails.
    """
    check_parameters(spec, parameters)
    source = stored_if_large(spec, parameters, folder, source or Source())
    model = forward_model(spec, source.name)
    path = folder / "model.torch.onnx"
    write_model(model, parameters, path, ["probability"], source.references(folder))
    return [*source.paths(folder), path]


def forward_model(spec: ModelSpec, source: str = "not recorded",
                  bags: type[EmbeddingBags] | None = None) -> onnx.ModelProto:
    """The model without its parameters, which are initializers that `write_model` adds.

    Inputs: dense, and indices and lengths of each table, as in `spec.batch`. Outputs: every activation of
    `spec.tensors.trace_names` without gradients. `source` is what the metadata says of the parameters; `bags` what to
    export for the tables, given (indices, lengths) of each; by default a form of them that can do without a loop.
    Raises EngineError where PyTorch's exporter fails.
    """
    small = spec.capped(1)
    module = _Traced(small, bags or _Bags).eval().requires_grad_(False)
    batch = torch.export.Dim("B")
    lookups, axes = [], []
    for number, table in enumerate(small.tables):
        k = table.fixed_lookups
        of_batch = {1: batch, None: torch.export.Dim(f"tables_{number}_lookups")}
        lookups.append((torch.zeros(3 * (k or 2), dtype=torch.int64), torch.full((3,), k or 2, dtype=torch.int32)))
        axes.append(({0: of_batch[k] if k in of_batch else k * batch}, {0: batch}))
    inputs = [name for name in batch_names(spec) if name != "label"]
    with _quiet(), _uncollected(), _translations_kept():
        try:
            program = torch.onnx.export(
                module, (torch.zeros(3, spec.dense_features), lookups), dynamic_shapes=({0: batch}, axes),
                input_names=inputs, output_names=list(trace_names(spec, gradients=False)),
                dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
        except (ImportError, torch.onnx.errors.OnnxExporterError) as error:
            raise EngineError(f"torch.onnx.export of PyTorch {torch.__version__}: "
                              f"{str(error).splitlines()[0]}") from error
        exported = program.model_proto
    return _assemble(spec, exported, source)


def write_model(model: onnx.ModelProto, parameters: Arrays, path: Path, outputs: Collection[str],
                stored: Mapping[str, tuple[str, int]]) -> None:
    """Write a `forward_model` with its parameters and some of its outputs.

    `stored`: of the parameters that a file holds, for the model to refer to, its path and where in it each begins.
    Raises InputError where the folder cannot be written to.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in model.graph.output:
        if value.name not in outputs:
            result.graph.output.remove(value)
            result.graph.value_info.append(value)
    for name, array in parameters.items():
        tensor = result.graph.initializer.add(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
        if name in stored:
            tensor.data_location = TensorProto.EXTERNAL
            location, offset = stored[name]
            for key, value in {"location": location, "offset": offset, "length": array.nbytes}.items():
                tensor.external_data.add(key=key, value=str(value))
        else:
            tensor.raw_data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    write_bytes(path, result.SerializeToString(deterministic=True))


class _Bags(EmbeddingBags):
    """The tables as they are exported, one by one."""

    def pool(self, lookups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [_pooled(bag, *its) for bag, its in zip(self, lookups, strict=True)]


def _pooled(bag: EmbeddingBag, indices: Tensor, lengths_B: Tensor) -> Tensor:
    (batch,), width, k = lengths_B.shape, bag.weight.shape[1], bag.table.fixed_lookups
    weights = bag.pooling.index_select(0, indices) if bag.table.weighted else None
    if k is None:
        operator, inputs = ragged.SUM, (bag.weight, indices, lengths_B)
        if weights is not None:
            operator, inputs = ragged.WEIGHTED_SUM, (bag.weight, weights, indices, lengths_B)
        pooled_BE = torch.onnx.ops.symbolic(operator, inputs, dtype=torch.float32, shape=(batch, width), version=1)
    else:
        pooled_BE = F.embedding(indices, bag.weight)
        if weights is not None:
            pooled_BE = pooled_BE * weights.unsqueeze(1)
        if k > 1:
            pooled_BE = pooled_BE.view(batch, k, width).sum(1)
    if bag.table.pooling == "mean" and k != 1:
        # Not a division: the spec multiplies by the rounded 1/n.
        pooled_BE = pooled_BE * lengths_B.clamp(min=1).to(torch.float32).reciprocal().unsqueeze(1)
    return pooled_BE


class _Traced(DLRM):
    """A DLRM with bags that can be exported, which returns all its activations in the order of their names."""

    def __init__(self, spec: ModelSpec, bags: type[EmbeddingBags]) -> None:
        super().__init__(spec)
        self.tables = bags(spec.tables, spec.embedding_dim)
        for mlp in (self.bottom, self.top):
            mlp.activations = [(name, _sigmoid if function is torch.sigmoid else function)
                               for name, function in mlp.activations]

    def forward(self, dense_BD: Tensor, lookups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> Tensor:
            seen[name] = x
            return x

        self.outputs(dense_BD, self.tables.pool(lookups), keep)
        return [seen[name] for name in trace_names(self.spec, gradients=False)]


def _sigmoid(x: Tensor) -> Tensor:
    """Not ONNX's Sigmoid: ONNX Runtime's is good to 1e-7 in absolute terms only, so small probabilities are wrong
    (conformance/DIVERGENCES.md)."""
    return (1 + torch.exp(-x)).reciprocal()


def _assemble(spec: ModelSpec, exported: onnx.ModelProto, source: str) -> onnx.ModelProto:
    """What was exported, without the stand-ins of the parameters, the functions inlined, and the spec attached."""
    parameters, texts = parameter_shapes(spec), docs(spec)
    for node in exported.graph.node:
        del node.metadata_props[:]  # where in the source each came from: paths of this machine
    graph = helper.make_graph(
        exported.graph.node, spec.name,
        [_value(value, texts[value.name]) for value in exported.graph.input],
        [_value(value, texts.get(value.name, "activation")) for value in exported.graph.output],
        [tensor for tensor in exported.graph.initializer if tensor.name not in parameters])
    model = helper.make_model(graph, ir_version=IR_VERSION, producer_name="dlrm-parity",
                              functions=ragged.functions(OPSET), opset_imports=exported.opset_import)
    _name_nodes(model)
    model = inliner.inline_local_functions(model)
    del model.opset_import[:]
    model.opset_import.add(domain="", version=OPSET)
    model.doc_string = title(spec)
    for key, value in metadata(spec, source).items():
        model.metadata_props.add(key=key, value=value)
    return model


def _name_nodes(model: onnx.ModelProto) -> None:
    """"part/name": profilers show it. Nodes stand in the order of computation, each activation's before it."""
    outputs = {value.name for value in model.graph.output}
    waiting = []
    for node in model.graph.node:
        waiting.append(node)
        for activation in outputs.intersection(node.output):
            for earlier in waiting:
                earlier.name = f"{part_of(activation)}/{earlier.name}"
            waiting.clear()
    for function in model.functions:
        _name_bag_nodes(function.node, function.name)


def _name_bag_nodes(nodes: Iterable[onnx.NodeProto], function: str) -> None:
    for number, node in enumerate(nodes):
        node.name = f"embedding/{function}.{number}"
        for attribute in node.attribute:
            _name_bag_nodes(attribute.g.node, function)


def _value(value: onnx.ValueInfoProto, doc: str) -> onnx.ValueInfoProto:
    """Renames the axes of lookups, whose names had to be Python's."""
    kind = value.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    if len(shape) == 1 and str(shape[0]).endswith("_lookups"):
        shape = [shape[0].replace("_", ".")]
    return helper.make_tensor_value_info(value.name, kind.elem_type, shape, doc)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch says to its own developers: deprecations, and that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Tracing makes millions of objects that live: the garbage collector would take a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _translations_kept() -> Iterator[None]:
    """PyTorch reads the sources of its 500 translations at every export, a third of the time. Where this version of it
    lets us, it does so once in a process."""
    kept = _kept_translations()
    with patch.object(*kept) if kept else nullcontext():
        yield


@cache
def _kept_translations() -> tuple[type, str, staticmethod] | None:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
        return ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib))
    except (ImportError, AttributeError):
        return None
