"""`dlrm export`: a model in the file formats that the backends register."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from spec import exported, tensor_file
from spec.errors import InputError
from spec.exported import Source
from spec.model import ModelSpec
from spec.parameters import check_parameters, initial_parameter, initial_parameters, parameter_bytes

GROUP = "dlrm.exporters"
"""Entry points: format name -> function (spec, parameters, folder, source) -> paths of the files."""

NETDEF = "netdef"
"""The format that holds its parameters whatever their size."""


def run(spec: ModelSpec, folder: Path, seed: int, formats: Sequence[str], file: Path | None = None,
        external: bool = False) -> list[Path]:
    """Write every format; the paths.

    Parameters that ONNX files refer to are written first, one by one, and then mapped: they are in memory as a whole
    only for the sake of NetDefs.

    Args:
        file: a safetensors file of parameters, instead of those of the seed.
        external: whether ONNX files refer to the parameters, however few they are.

    Raises InputError where the folder can't be written to, a file would be too large for its format, or the
    parameters in `file` are not the spec's.
    """
    external = external or parameter_bytes(spec) > exported.EMBEDDED_BYTES
    exporters = {entry.name: entry.load() for entry in entry_points(group=GROUP) if entry.name in formats}
    if file:
        source = Source(f"file {file.name}", tensor_file.read(file))
        try:
            check_parameters(spec, source.file.arrays)
        except InputError as error:
            raise error.within(str(file)) from None
        parameters = source.file.arrays
    else:
        source = Source(f"seed {seed}")
        parameters = {} if external and NETDEF not in formats else initial_parameters(spec, seed)
    paths = []
    for name in sorted(formats, key=lambda name: name != NETDEF):  # NetDefs refuse what is too large for them
        if name != NETDEF and external and not source.references(folder):
            make = parameters.__getitem__ if parameters else lambda name: initial_parameter(spec, name, seed)
            source = exported.store(spec, folder, source.name, make)
            parameters = source.file.arrays
        paths += exporters[name](spec, parameters, folder, source)
    return list(dict.fromkeys(paths))


def convert(netdef: Path, folder: Path, init: Path | None, values: Path | None, inputs: Sequence[str],
            outputs: Sequence[str]) -> list[str]:
    """Write any net in a file as ONNX: the paths, and a line on each input and output."""
    (entry,) = entry_points(group="dlrm.converters", name="netdef")
    converted = entry.load()(netdef, folder, init, values, inputs, outputs)
    return [*map(str, converted.paths), *converted.lines]
