"""`dlrm export`: a model in the file formats that the backends register."""

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
from rich.progress import Progress

from spec import exported, tensor_file
from spec.errors import InputError
from spec.exported import Source
from spec.model import ModelSpec
from spec.parameters import check_parameters, initial_parameter, initial_parameters, parameter_bytes, parameter_shapes
from tools.progress import progress_bar

GROUP = "dlrm.exporters"
"""Entry points: format name -> function (spec, parameters, folder, source) -> paths of the files; that of ONNX also
takes `by_rows`."""

NETDEF, ONNX = "netdef", "onnx"
"""The format that holds its parameters whatever their size, and that of training steps in ONNX."""


def run(spec: ModelSpec, folder: Path, seed: int, formats: Sequence[str], file: Path | None = None,
        external: bool = False, by_rows: bool = False) -> list[Path]:
    """Write every format, with a progress bar where stderr is a terminal; the paths.

    Parameters that ONNX files refer to are written first, one by one, and then mapped: they are in memory as a whole
    only for the sake of NetDefs.

    Args:
        file: a safetensors file of parameters, instead of those of the seed.
        external: whether ONNX files refer to the parameters, however few they are.
        by_rows: whether a training step in ONNX returns the rows of tables that change, instead of whole tables.

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
        source, parameters = Source(f"seed {seed}"), {}
    paths = []
    with progress_bar() as progress:
        task = progress.add_task(f"{spec.name}: parameters", total=len(formats))
        if not parameters and (NETDEF in formats or not external):
            parameters = initial_parameters(spec, seed)
        for name in sorted(formats, key=lambda name: name != NETDEF):  # NetDefs refuse what is too large for them
            progress.update(task, description=f"{spec.name}: {name}")
            if name != NETDEF and external and not source.references(folder):
                make = parameters.__getitem__ if parameters else lambda name: initial_parameter(spec, name, seed)
                with_bar = _with_bar(progress, make, len(parameter_shapes(spec)))
                source = exported.store(spec, folder, source.name, with_bar)
                parameters = source.file.arrays
            options = {"by_rows": True} if by_rows and name == ONNX else {}
            paths += exporters[name](spec, parameters, folder, source, **options)
            progress.advance(task)
    return list(dict.fromkeys(paths))


def _with_bar(progress: Progress, make: Callable[[str], np.ndarray], total: int) -> Callable[[str], np.ndarray]:
    """The same function, called `total` times, with a bar of its own."""
    task = progress.add_task("", total=total)

    def shown(name: str) -> np.ndarray:
        progress.update(task, description=f"{exported.STORED}: {name}")
        array = make(name)
        progress.advance(task)
        return array
    return shown


def convert(netdef: Path, folder: Path, init: Path | None, values: Path | None, inputs: Sequence[str],
            outputs: Sequence[str]) -> list[str]:
    """Write any net in a file as ONNX: the paths, and a line on each input and output."""
    (entry,) = entry_points(group="dlrm.converters", name="netdef")
    with progress_bar() as progress:
        progress.add_task(netdef.name, total=None)
        converted = entry.load()(netdef, folder, init, values, inputs, outputs)
    return [*map(str, converted.paths), *converted.lines]
