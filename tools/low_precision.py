"""`dlrm export --tables`: models that predict with tables in fewer bits, and what that costs, measured."""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from spec import loss
from spec.batch import Batch
from spec.data import open_batches
from spec.errors import InputError
from spec.files import check_writable, write_text
from spec.model import ModelSpec
from spec.rounding import Tracked
from tools import export

FILES = {"onnx": ("model.inlined.onnx", "model.{}.onnx"), "torch-onnx": ("model.torch.onnx", "model.torch.{}.onnx")}
"""Of each format that has files in low precision: the file of float32 that they are made from, and theirs."""

_BATCH = 256


def run(spec: ModelSpec, folder: Path, kind: str, seed: int, formats: Sequence[str], file: Path | None, external: bool,
        data: str, samples: int, json_path: Path | None) -> list[Path]:
    """Write a model for each format, its tables stored as `kind`; print what that costs; the paths.

    The model of float32 that it is compared with is written too, to a temporary folder beside it.

    Args:
        data, samples: where batches come from (`spec.data.open_batches`), and how many samples of them to predict.

    Raises InputError where `tools.export.run` does, for bad data, for a table that cannot be stored so, and for a
    format that has no file in low precision.
    """
    for name in formats:
        if name not in FILES:
            raise InputError(f"--tables {kind}", f"--format {' or '.join(FILES)}", name,
                             "leave --format out, or export that one without --tables")
    if json_path:
        check_writable(json_path)
    open_batches(data, spec, _BATCH, seed)  # bad data is refused before anything is written
    (entry,) = entry_points(group="dlrm.low_precision", name="onnx")
    low = entry.load()
    paths, reports = [], []
    check_writable(folder / "model")
    with tempfile.TemporaryDirectory(prefix=".float32-", dir=folder) as temporary:
        export.run(spec, Path(temporary), seed, formats, file, external)
        for name in formats:
            before, after = Path(temporary) / FILES[name][0], folder / FILES[name][1].format(kind)
            written = low.write(before, after, kind, external)
            paths += written
            reports.append({
                "model": spec.name, "digest": spec.digest, "format": name, "tables": kind, "data": data,
                "parameters": f"file {file.name}" if file else f"seed {seed}",
                "file_bytes": sum(path.stat().st_size for path in written), **_tables(low, before, after),
                **_predictions(spec, low.open_model(before), low.open_model(after),
                               open_batches(data, spec, min(_BATCH, samples), seed), samples)})
    for report in reports:
        Console(width=None if sys.stdout.isatty() else 120, markup=False).print(_table(report))
    if json_path:
        write_text(json_path, json.dumps(reports, indent=2) + "\n")
    return paths


def _tables(low: ModuleType, before: Path, after: Path) -> dict[str, Any]:
    """Sizes, and how far what a lookup gives is from float32, over all tables."""
    squares = error_squares = largest = 0.0
    size = low.table_bytes(after)
    for (_, exact), (_, found) in zip(low.tables(before), low.tables(after), strict=True):
        difference = np.abs(found - exact)
        largest = max(largest, float(difference.max(initial=0)))
        squares += float(np.einsum("ij,ij->", exact, exact, dtype=np.float64))
        error_squares += float(np.einsum("ij,ij->", difference, difference, dtype=np.float64))
    return {"table_bytes": {"float32": low.table_bytes(before), "stored": size},
            "table_error": {"max": largest, "relative_rms": math.sqrt(error_squares / squares) if squares else 0.0}}


def _predictions(spec: ModelSpec, before: Callable, after: Callable, batches: Iterator[Batch],
                 samples: int) -> dict[str, Any]:
    """Both files on the same samples."""
    labels, exact, found = [], [], []
    while sum(map(len, labels)) < samples:
        batch = next(batches)
        labels.append(batch.label)
        exact.append(before(batch.arrays()))
        found.append(after(batch.arrays()))
    label, p, q = (np.concatenate(arrays)[:samples].astype(np.float64) for arrays in (labels, exact, found))
    losses, aucs = [_loss(spec, x, label) for x in (p, q)], [_auc(x, label) for x in (p, q)]
    return {"samples": len(label), "probability": _differences(q - p), "logit": _differences(_logit(q) - _logit(p)),
            "loss": dict(zip(("float32", "stored"), losses, strict=True)),
            "auc": dict(zip(("float32", "stored"), aucs, strict=True))}


def _differences(x: np.ndarray) -> dict[str, float]:
    return {"max": float(np.abs(x).max()), "rms": float(np.sqrt(np.mean(x**2)))}


def _logit(probability: np.ndarray) -> np.ndarray:
    """Of float32 probabilities: those of 0 and 1 count as the next ones."""
    inside = np.clip(probability, 2.0**-126, 1 - 2.0**-24)
    return np.log(inside) - np.log1p(-inside)


def _loss(spec: ModelSpec, probability: np.ndarray, label: np.ndarray) -> float:
    result = loss.evaluate(spec.loss, Tracked(_logit(probability), np.zeros_like(label)),
                           Tracked(probability, np.zeros_like(label)), label)
    return float(result.loss.value)


def _auc(probability: np.ndarray, label: np.ndarray) -> float | None:
    """Of a click and a sample without one, how often the click has the higher probability (a tie counts half); None
    where there are not both, or labels are not 0 and 1."""
    clicks, others = probability[label == 1], np.sort(probability[label == 0])
    if not clicks.size or not others.size or clicks.size + others.size < label.size:
        return None
    below = (np.searchsorted(others, clicks, "left") + np.searchsorted(others, clicks, "right")) / 2
    return float(below.mean() / others.size)


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['model']}, {report['format']}, {report['parameters']}; "
                        f"{report['samples']:,} samples, {report['data']}", title_justify="left")
    for column in ("", "float32", report["tables"], "difference"):
        table.add_column(column, justify="right" if column else "left")
    size, error = report["table_bytes"], report["table_error"]
    table.add_row("tables, MB", *(f"{value / 1e6:,.2f}" for value in size.values()),
                  f"{size['stored'] / size['float32'] - 1:+.1%}")
    table.add_row("tables, error", "", "", f"max {error['max']:.2g}, rms {error['relative_rms']:.2g} of theirs")
    for name in ("probability", "logit"):
        table.add_row(name, "", "", "max {max:.2g}, rms {rms:.2g}".format(**report[name]))
    for name in ("loss", "auc"):
        before, after = report[name].values()
        table.add_row(name, *((f"{before:.6f}", f"{after:.6f}", f"{after - before:+.2g}") if before is not None
                              else ("-", "-", "-")))
    return table
