"""Whether a NetDef can run at all: names and definitions, not types. No engine and no framework is needed."""

from collections.abc import Collection
from pathlib import Path

from dlrm_caffe2.net import read_net
from dlrm_caffe2.operators import Node, OperatorError, read
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.errors import EngineError


def check_net(net: NetDef, blobs: Collection[str]) -> list[Node]:
    """The operators of a net, read through their records, once everything they name is there.

    Args:
        blobs: names that exist before the net runs; for a net in a file, its `external_input`.

    Raises EngineError naming the net and the operator's number and type, for: a net without a name; an operator
    that is unknown, or whose definition its record refuses; an input that neither a blob nor an earlier operator
    provides, or that comes from outside and is missing from a non-empty `external_input`; an output in
    `external_output` that nothing provides.
    """
    if not net.name:
        raise EngineError("net: expected a name, found none; set NetDef.name")
    nodes: list[Node] = []
    produced: set[str] = set()
    for number, definition in enumerate(net.op):
        where = operator_name(net.name, number, definition.type)
        try:
            node = read(definition)
        except OperatorError as error:
            raise EngineError(f"{where}: {error}") from error
        for name in node.inputs:
            if name in produced:
                continue
            if name not in blobs:
                raise EngineError(f"{where}: input '{name}' is neither a blob nor made by an earlier operator")
            if net.external_input and name not in net.external_input:
                raise EngineError(f"{where}: input '{name}' comes from outside the net, and external_input "
                                  "does not list it")
        produced.update(node.outputs)
        nodes.append(node)
    for name in net.external_output:
        if name not in produced and name not in net.external_input:
            raise EngineError(f"net '{net.name}': external output '{name}' is not made by any operator")
    return nodes


def check_file(path: Path) -> str:
    """One line on the net in a .pb file that could run: its name and sizes.

    Raises InputError for a file that holds no net, EngineError as `check_net` does.
    """
    net = read_net(path)
    nodes = check_net(net, net.external_input)
    types = len({node.type for node in nodes})
    return (f"net '{net.name}', {len(nodes)} operators of {types} types, {len(net.external_input)} external inputs, "
            f"{len(net.external_output)} external outputs")


def operator_name(net: str, number: int, type: str) -> str:
    """How errors name an operator of a net."""
    return f"net '{net}', operator {number} ({type})"
