"""Types and shapes of the values of a net whose inputs have sizes that differ from run to run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dlrm_caffe2.check import operator_name
from dlrm_caffe2.operators import Node, OperatorError, record
from dlrm_caffe2.operators.join import piece_lengths
from dlrm_caffe2.operators.record import TensorType
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError


class Axes(NamedTuple):
    """A type whose sizes may differ from run to run: those have a name, or "" where nothing is known."""

    dtype: np.dtype
    shape: tuple[int | str, ...]


def value_types(net: NetDef, nodes: Sequence[Node], blobs: Mapping[str, np.ndarray], inputs: Mapping[str, Axes],
                 sizes: Mapping[str, int] | None) -> dict[str, Axes]:
    """Of every blob. The records' rules want numbers, so the types are inferred for two sets of sizes: what is
    equal in both is fixed, and what is a named size in both has its name. From one set, `sizes`, nothing follows."""
    names = list(dict.fromkeys(size for axes in inputs.values() for size in axes.shape if isinstance(size, str)))
    if sizes is None:
        probes = [{name: first + number for number, name in enumerate(names)} for first in (10**6, 2 * 10**6)]
    else:
        probes = [dict(sizes)]
    inferred = [_infer(net, nodes, {
        **{name: TensorType(array.dtype, array.shape) for name, array in blobs.items()},
        **{name: TensorType(axes.dtype, tuple(probe.get(size, size) for size in axes.shape))
           for name, axes in inputs.items()}}) for probe in probes]
    symbols = {tuple(probe[name] for probe in probes): name for name in names}

    def merged(found: tuple[int, ...]) -> int | str:
        if sizes is not None or -1 in found:
            return ""
        return found[0] if len(set(found)) == 1 else symbols.get(found, "")

    return {name: Axes(type.dtype, tuple(map(merged, zip(*(types[name].shape for types in inferred), strict=True))))
            for name, type in inferred[0].items()} | dict(inputs)


def _infer(net: NetDef, nodes: Sequence[Node], types: dict[str, TensorType]) -> dict[str, TensorType]:
    lengths: dict[str, tuple[int, ...]] = {}
    for number, node in enumerate(nodes):
        try:
            types.update(zip(node.outputs, infer_outputs(node, types, lengths), strict=True))
        except OperatorError as error:
            raise EngineError(f"{operator_name(net.name, number, node.type)}: {error}") from error
    return types


def infer_outputs(node: Node, types: Mapping[str, TensorType], lengths: dict[str, tuple[int, ...]]) -> list[TensorType]:
    """By the record's rule, and one thing that this cannot know: a Split by lengths that come from a Concat. Those
    are kept in `lengths` from node to node. Raises OperatorError."""
    rule = node
    if node.type == "Split" and node.inputs[-1] in lengths:
        rule = replace(node, inputs=node.inputs[:1], args={**node.args, "split": lengths[node.inputs[-1]]})
    made = record(node.type).infer(rule, [types[name] for name in rule.inputs])
    if node.type == "Concat":
        lengths[node.outputs[1]] = piece_lengths(node, [types[name].shape for name in node.inputs])
    return made
