"""What the commands share. Imports no spec, so that --help stays instant."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spec.model import ModelSpec

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad")


def example(*lines: str) -> str:
    """The end of a --help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def load(name: str, max_rows: int | None = None) -> "ModelSpec":
    """A preset or a .toml file, capped."""
    from spec import toml
    loaded = toml.load(name)
    return loaded.capped(max_rows) if max_rows else loaded
