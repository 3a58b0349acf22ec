"""Caffe2's operators, one module per family; `record(type)` finds any of them."""

from functools import cache
from importlib import import_module

from dlrm_caffe2.operators.record import Node, Operator, OperatorError
from dlrm_caffe2.proto.caffe2_pb2 import OperatorDef

_FAMILIES = ("dense", "lookup", "join", "shape", "cross_entropy", "loss", "fill", "distinct", "optimizer",
             "sparse_update")


@cache
def records() -> dict[str, Operator]:
    """Every record by operator type."""
    found = [operator for family in _FAMILIES
             for operator in import_module(f"dlrm_caffe2.operators.{family}").OPERATORS]
    assert len({operator.type for operator in found}) == len(found)
    return {operator.type: operator for operator in found}


def record(type: str) -> Operator:
    """Raises OperatorError for an operator that has no record."""
    if type not in records():
        raise OperatorError(f"operator '{type}': expected one of {', '.join(sorted(records()))}")
    return records()[type]


def read(definition: OperatorDef) -> Node:
    """A definition, checked against its record."""
    return record(definition.type).node(definition)
