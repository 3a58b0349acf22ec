"""Which module makes each tensor of a model."""

from spec.graph import steps, update_steps
from spec.model import ModelSpec


def module_names(spec: ModelSpec) -> dict[str, str]:
    """"Linear bottom.1", "backward of EmbeddingBag tables.0", for each tensor of the trace, parameter and moment.

    The gradient of X is made by the backward of whatever reads X.
    """
    sources = steps(spec)
    forward = {tensor: _module(spec, tensor) for tensor in sources if "_grad" not in tensor}
    names = dict(forward)
    for gradient in sources.keys() - forward.keys():
        subject = gradient.partition("_grad")[0]
        readers = dict.fromkeys(forward[tensor] for tensor in forward if subject in sources[tensor])
        names[gradient] = "backward of " + " and ".join(readers)
    return names | dict.fromkeys(update_steps(spec), f"Optimizer ({spec.optimizer.kind})")


def _module(spec: ModelSpec, tensor: str) -> str:
    place, _, what = tensor.rpartition(".")
    if what == "preactivation":
        return f"Linear {place}"
    if what == "activation":
        return f"{getattr(spec, place.split('.')[0]).activation} of {place}"
    if what == "pooled":
        return f"EmbeddingBag {place}"
    if place == "interaction":
        return f"{spec.interaction.kind.capitalize()}Interaction"
    return {"probability": f"sigmoid of top.{len(spec.top.widths) - 1}", "loss": f"mean_loss ({spec.loss.kind})"}[what]
