"""`dlrm engine`: what runs here, and how to add what does not."""

import json
import sys
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import click
from rich.console import Console
from rich.table import Table

from spec.backend import ON_REQUEST, backend_names, load_backend
from spec.errors import EngineError
from spec.files import write_text


def _caffe2() -> ModuleType:
    """The module that installs genuine Caffe2 and tells its status, found through its entry point."""
    (entry,) = entry_points(group="dlrm.engines", name="caffe2")
    return entry.load()


def check_file(path: Path) -> str:
    """One line on a NetDef or an .onnx file that could run. Raises InputError or EngineError, naming the path, for any
    other."""
    (entry,) = entry_points(group="dlrm.checkers", name="onnx" if path.suffix == ".onnx" else "netdef")
    try:
        return entry.load()(path)
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from None


def install(interpreter: Path | None, optional: bool) -> None:
    """Make the virtual environment. With `optional`, a machine without a fitting Python is told so and left alone.

    Raises InputError where there is no Python 3.7-3.9, EngineError where the installation fails.
    """
    engine = _caffe2()
    if optional and not engine.status().installed and interpreter is None and engine.find_python() is None:
        state = engine.availability()
        click.echo(f"genuine Caffe2 is left out: {state.reason}, and no Python 3.7, 3.8 or 3.9 for it was found. The "
                   f"embedded engine caffe2-aten runs the same graphs. With such a Python: {state.remedy}")
        return
    engine.install(interpreter)
    click.echo(f"genuine Caffe2 is ready: {engine.status().path}")


def print_status(json_path: Path | None) -> None:
    """Every backend, and the details of genuine Caffe2."""
    status = _caffe2().status()
    table = Table(box=None, pad_edge=False)
    for column in ("backend", "runs here", "trains", "what to do"):
        table.add_column(column)
    backends = {}
    for name in (*backend_names(), *backend_names(ON_REQUEST)):
        backend = load_backend(name)
        available = backend.available()
        backends[name] = asdict(available) | {"trains": backend.trains}
        table.add_row(name, "yes" if available.ok else f"no: {available.reason}",
                      "yes" if backend.trains else "forward only", available.remedy)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("\ngenuine Caffe2", style="bold")
    details = Table(box=None, pad_edge=False, show_header=False)
    for key, value in asdict(status).items():
        if value not in (None, ""):
            details.add_row(key.replace("_", " "), str(value))
    console.print(details)
    if json_path:
        content = {"backends": backends, "caffe2": asdict(status)}
        write_text(json_path, json.dumps(content, indent=1, default=str) + "\n")
