"""Which operators of its nets make each tensor of a model."""

from collections.abc import Collection

from dlrm_caffe2.model import gradient_net, trace_blobs
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.model import ModelSpec
from spec.parameters import state_shapes, trained_parameters


def operator_names(spec: ModelSpec, train: NetDef) -> dict[str, str]:
    """"FC (operator 3 of tiny_gradient)" for each tensor of the trace, parameter and moment; `train` updates these.

    Where the net goes from one tensor of the spec to the next by way of other blobs, all operators on the way; of a
    gradient those of the backward pass. Indices of slices are fed, so nothing makes them.
    """
    blobs = trace_blobs(spec)
    gradients = gradient_net(spec)
    named = set(blobs.values())
    forward = {blob for operator in gradients.op if not operator.is_gradient_op for blob in operator.output}
    names = {}
    for tensor, blob in blobs.items():
        makers = _makers(gradients, blob, named | forward if "_grad" in tensor else named)
        names |= {tensor: _name(gradients, makers)} if makers else {}
    return names | {tensor: _name(train, _makers(train, tensor, named))
                    for tensor in (*trained_parameters(spec), *state_shapes(spec))}


def _makers(net: NetDef, blob: str, named: Collection[str]) -> list[int]:
    """The operators between `blob` and the named ones before it, in their order."""
    writers = {output: number for number, operator in enumerate(net.op) for output in operator.output}
    found: set[int] = set()

    def visit(blob: str) -> None:
        number = writers.get(blob)
        if number is not None and number not in found:
            found.add(number)
            for source in net.op[number].input:
                if source not in named:
                    visit(source)

    visit(blob)
    return sorted(found)


def _name(net: NetDef, numbers: list[int]) -> str:
    types = ", ".join(dict.fromkeys(net.op[number].type for number in numbers))
    return f"{types} (operator{'s'[:len(numbers) > 1]} {', '.join(map(str, numbers))} of {net.name})"
