"""A net in stages, for genuine Caffe2: operators on tables side by side, matrix products one by one.

A product takes all threads of MKL; an operator on a table takes one, and several tables keep them all busy. In one net
of type "dag" the two get in each other's way.
"""

from collections import defaultdict
from collections.abc import Iterable

from dlrm_caffe2.net import outside_blobs
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef

_ON_TABLES = ("Sparse", "Scatter", "RowWiseSparse", "Unique", "UnsortedSegment")
_PRODUCTS = ("FC", "BatchMatMul")


def stages(net: NetDef) -> list[NetDef]:
    """Nets to be run one after the other; the net itself, unless its type is "dag".

    Operators on tables are in the first, third, ... of them, matrix products in the others, and every other operator
    is where what it depends on is.
    """
    if net.type != "dag":
        return [net]
    written: dict[str, int] = defaultdict(int)
    touched: dict[str, int] = defaultdict(int)
    parts: dict[int, list[OperatorDef]] = defaultdict(list)
    for operator in net.op:
        stage = max([*(written[blob] for blob in operator.input), *(touched[blob] for blob in operator.output)])
        if operator.type.startswith(_ON_TABLES if stage % 2 else _PRODUCTS):
            stage += 1
        parts[stage].append(operator)
        for blob in operator.output:
            written[blob] = stage
        for blob in (*operator.input, *operator.output):
            touched[blob] = max(touched[blob], stage)
    return [_stage(net, number, parts[number]) for number in sorted(parts)]


def _stage(net: NetDef, number: int, operators: Iterable[OperatorDef]) -> NetDef:
    stage = NetDef.FromString(net.SerializeToString())
    del stage.op[:], stage.external_input[:], stage.external_output[:]
    stage.name = f"{net.name}/{number}"
    stage.op.extend(operators)
    stage.external_input.extend(outside_blobs(stage.op))
    if number % 2:
        stage.ClearField("type")
    return stage
