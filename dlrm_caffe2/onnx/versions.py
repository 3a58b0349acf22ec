"""Nets write blobs several times; in ONNX every value is written once."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from dlrm_caffe2.operators import Node


def single_assignment(nodes: Sequence[Node], read: Collection[str]) -> tuple[list[Node], dict[str, str]]:
    """The same operators with a name for every version of a blob, and the name of each written blob's last one.

    The last keeps the blob's name, or is named X.new where X is in `read`, from outside; those in between are X.1,
    X.2, ...
    """
    taken = {name for node in nodes for name in (*node.inputs, *node.outputs)}
    writes = Counter(name for node in nodes for name in node.outputs)
    written: Counter[str] = Counter()
    now: dict[str, str] = {}

    def version(blob: str) -> str:
        written[blob] += 1
        if written[blob] < writes[blob]:
            name = f"{blob}.{written[blob]}"
        elif blob in read:
            name = f"{blob}.new"
        else:
            return blob
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    renamed = []
    for node in nodes:
        inputs = tuple(now.get(name, name) for name in node.inputs)
        now |= {name: version(name) for name in node.outputs}
        renamed.append(replace(node, inputs=inputs, outputs=tuple(now[name] for name in node.outputs)))
    return renamed, now
