"""`dlrm export`: a model in the file formats that the backends register."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from spec.model import ModelSpec
from spec.parameters import initial_parameters

GROUP = "dlrm.exporters"
"""Entry points: format name -> function (spec, parameters, folder) -> paths written."""


def run(spec: ModelSpec, folder: Path, seed: int, formats: Sequence[str]) -> list[Path]:
    """Write every format; the paths. Raises InputError where the folder can't be written to or a file would be
    too large for its format."""
    parameters = initial_parameters(spec, seed)
    exporters = {entry.name: entry for entry in entry_points(group=GROUP)}
    return [path for name in formats for path in exporters[name].load()(spec, parameters, folder)]
