"""`dlrm spec`: presets as a table."""

import sys

from rich.console import Console
from rich.table import Table

from spec import toml
from spec.model import ModelSpec
from spec.parameters import parameter_bytes


def describe(spec: ModelSpec) -> str:
    """One line: what the model is made of, and its size as float32."""
    size = parameter_bytes(spec)
    return (f"{len(spec.tables)} tables x {spec.embedding_dim}, {spec.interaction.kind}, {spec.loss.kind}, "
            f"{spec.optimizer.kind}, {size // 4:,} parameters ({size / 2**30:.2f} GiB)")


def print_list() -> None:
    """Every shipped preset."""
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "tables", "dim", "bottom", "top", "interaction", "loss", "batch", "GiB"):
        table.add_column(column, justify="right" if column in ("tables", "dim", "batch", "GiB") else "left")
    for name in toml.preset_names():
        spec = toml.load(name)
        table.add_row(
            name, str(len(spec.tables)), str(spec.embedding_dim),
            "-".join(str(width) for width in (spec.dense_features, *spec.bottom.widths)),
            "-".join(str(width) for width in (f"[{spec.interaction_width}]", *spec.top.widths)),
            spec.interaction.kind, spec.loss.kind, str(spec.batch_size), f"{parameter_bytes(spec) / 2**30:.2f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
