"""Updates of tables by rows: sorted once, and returned as rows alone or written over the table itself."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dlrm_caffe2.operators import Node
from dlrm_caffe2.operators.sparse_update import SPARSE_UPDATES

if TYPE_CHECKING:
    import onnx


class Rows(NamedTuple):
    """The names of values: which rows of a blob an update changes, int64 [U], none twice, and what they become."""

    rows: str
    values: str


def sparse_updates(nodes: Sequence[Node]) -> dict[str, Rows]:
    """Blobs of which one operator of a net updates rows, and no other writes them or reads what became of them."""
    writes = Counter(blob for node in nodes for blob in node.outputs)
    found, read = {}, set()
    for node in reversed(nodes):
        if node.type in SPARSE_UPDATES and all(writes[blob] == 1 and blob not in read for blob in node.outputs):
            rows = f"{node.outputs[0]}.new_rows"
            found |= {blob: Rows(rows, f"{blob}.new_values") for blob in node.outputs}
        read.update(node.inputs)
    return found


def share_sorting(nodes: Sequence[Node]) -> tuple[list[Node], list[str]]:
    """A Unique and the UnsortedSegmentSums by its places sort once: the latter get its order and its runs.

    Each value is written once. Also returned: the names of these values, int64 vectors.
    """
    made = {node.outputs[1]: (f"{node.outputs[1]}.order", f"{node.outputs[1]}.sizes")
            for node in nodes if node.type == "Unique" and len(node.outputs) == 2}
    sums = [node for node in nodes if node.type == "UnsortedSegmentSum" and node.inputs[1] in made
            and node.args["num_segments"] < 0]
    shared = {node.inputs[1]: made[node.inputs[1]] for node in sums}
    result = []
    for node in nodes:
        if node in sums:
            node = replace(node, inputs=(*node.inputs, *shared[node.inputs[1]]))
        elif node.type == "Unique" and node.outputs[-1] in shared:
            node = replace(node, outputs=(*node.outputs, *shared[node.outputs[-1]]))
        result.append(node)
    return result, [name for names in shared.values() for name in names]


def promise_distinct(nodes: Sequence[Node]) -> list[Node]:
    """The same operators; of the sparse updates, those of the rows that a Unique found know that these differ."""
    found = {node.outputs[0] for node in nodes if node.type == "Unique"}
    return [replace(node, args={**node.args, "distinct_rows": 1})
            if node.type in SPARSE_UPDATES and node.inputs[2] in found else node for node in nodes]


def return_rows(node: Node, updates: Sequence[Rows]) -> Node:
    """A sparse update that returns rows alone; see operators/sparse_update.py."""
    return replace(node, outputs=(updates[0].rows, *(update.values for update in updates)))


def overwritable(flat: "onnx.ModelProto", updates: Mapping[str, str]) -> set[str]:
    """Of `updates`, from inputs of an inlined model to the outputs that they have become, those inputs that can share
    one memory with their output: a ScatterND of the one makes the other, after everything else that reads the input."""
    nodes = flat.graph.node
    reads = [set(_read(node)) for node in nodes]
    makers = {name: number for number, node in enumerate(nodes) for name in node.output}

    def before(number: int) -> set[int]:
        """The nodes that it needs."""
        found: set[int] = set()
        pending = [number]
        while pending:
            new = {makers[name] for name in reads[pending.pop()] if name in makers} - found
            found |= new
            pending += new
        return found

    result = set()
    for blob, updated in updates.items():
        last = makers[updated]
        if nodes[last].op_type == "ScatterND" and nodes[last].input[0] == blob:
            readers = {number for number, names in enumerate(reads) if blob in names}
            if readers <= before(last) | {last}:
                result.add(blob)
    return result


def _read(node: "onnx.NodeProto") -> Iterator[str]:
    """What a node reads, also within its own graphs."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read(inner)
        yield from (value.name for value in attribute.g.output)
