"""Nets that facebookresearch/dlrm's Caffe2 script writes, through ONNX: do they compute what genuine Caffe2 computes?

    git clone https://github.com/facebookresearch/dlrm checkout
    python -m tools.facebookresearch_netdef checkout

For each of CASES this lets `dlrm_s_caffe2.py` train under genuine Caffe2 on its own random data and write its training
net (`--save-proto-types-shapes`); its test net, which the script creates and does not write, is taken from the running
script, and so are the values of all blobs (facebookresearch_hook.py; the checkout is not changed). Both nets are then
converted as `dlrm export --netdef FILE --parameters VALUES` does, and run in ONNX Runtime on the very blobs that the
script's second step begins with. (The first is left out: under Adagrad the script feeds moments of integers then,
whose memory Caffe2 reads as it finds it.)

Compared are the prediction, the loss, and every parameter and moment after the step. The float64 reference of the same
model says what they should be, and with the variance of its rounding error how far off any float32 engine may be
(SPEC.md, 10). Each engine must be within this bound of the reference, and rows that are not looked up must stay as they
were, bit for bit; `apart` is the largest distance between the two engines, over the bound.

Exit status: 0 all agree, 1 some do not, 2 the checkout or an engine is bad.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from spec import tensor_file
from spec.batch import Batch
from spec.errors import EngineError, InputError
from spec.model import ModelSpec
from spec.parameters import Arrays, parameter_shapes, state_shapes
from spec.reference import evaluate
from spec.rounding import Tracked
from spec.tensor_file import ArrayType
from spec.tensors import batch_names
from spec.update import update
from tools.facebookresearch import HOOK, MODELS, SCRIPTS, flags, interpreters, spec_arrays, spec_name

STEP = 1
OPTIMIZERS = {"sgd": "sgd", "adagrad": "adagrad", "rowwise_adagrad": "rwsadagrad"}
"""Of the spec, and as the script calls them."""

RATES = {"sgd": 0.1, "adagrad": 1e-3, "rowwise_adagrad": 1e-3}
"""Adagrad's first steps are as long as the rate: with 0.1 predictions saturate, and their gradients are lost."""

CASES = tuple(spec.with_optimizer(kind, rate) for spec in MODELS for kind, rate in RATES.items()
              if kind == "sgd" or spec.name != "weighted")
"""The script updates weights of pooling by SGD whatever the optimizer, which no spec says."""

INPUTS = ("dense_in=float32[B,{dense}]", "*_l=int32[B]", "*_i=int64[?]", "target={label}[B,1]")
"""The batch: the file's own `input_shape_info` has the sizes of an example, and 32 bits for indices of 64."""


@dataclass(frozen=True)
class Comparison:
    """Of one net: how many numbers were compared, and the worst error of each engine over the bound."""

    net: str
    elements: int
    onnx: float
    caffe2: float
    apart: float
    worst: str

    @property
    def agrees(self) -> bool:
        return self.elements > 0 and max(self.onnx, self.caffe2) <= 1


def blob_name(theirs: str) -> str | None:
    """As `spec_name`, for the optimizer's moments and the results too."""
    if match := re.fullmatch(r"momentum_mlp_(bot|top)_(\d+)", theirs):
        layer, part = divmod(int(match[2]) - 1, 2)
        return f"{ {'bot': 'bottom', 'top': 'top'}[match[1]] }.{layer}.{('weight', 'bias')[part]}.moment"
    if match := re.fullmatch(r"momentum_emb_(\d+)", theirs):
        return f"tables.{match[1]}.weight.moment"
    return {"prob_click": "probability", "loss": "loss"}.get(theirs) or spec_name(theirs)


def run_script(python: Path, checkout: Path, spec: ModelSpec, folder: Path) -> Arrays:
    """Train for two steps with their Caffe2 script, which writes its net to `folder`; what the hook recorded."""
    recording = folder / "recording.npz"
    command = [python, "-I", "-B", HOOK, checkout.absolute() / SCRIPTS["Caffe2"], recording, *flags(spec, STEP + 1),
               f"--optimizer={OPTIMIZERS[spec.optimizer.kind]}", "--save-proto-types-shapes"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{checkout / SCRIPTS['Caffe2']} ended with status {done.returncode} under {python}: "
                          f"{(done.stderr.strip() or 'no message').splitlines()[-1]}")
    with np.load(recording) as arrays:
        return dict(arrays)


def convert_and_run(netdef: Path, spec: ModelSpec, blobs: Arrays, outputs: Sequence[str]) -> Arrays:
    """Through `dlrm export`'s own converter. Blobs that are not of the batch are its values."""
    fed = {name: array for name, array in blobs.items() if spec_name(name) in batch_names(spec)}
    values = {name: array for name, array in blobs.items() if name not in fed}
    types = {name: ArrayType(array.dtype, array.shape) for name, array in values.items()}
    tensor_file.write(netdef.with_suffix(".safetensors"), types, values.__getitem__)
    inputs = [text.format(dense=spec.dense_features, label=fed["target"].dtype) for text in INPUTS]
    (entry,) = entry_points(group="dlrm.converters", name="netdef")
    converted = entry.load()(netdef, netdef.parent, None, netdef.with_suffix(".safetensors"), inputs, outputs)
    return {name.removesuffix(".new"): array for name, array in converted.run(fed).items()}


def expected(spec: ModelSpec, blobs: Arrays) -> dict[str, tuple[np.ndarray | None, Tracked]]:
    """What the step makes, by the spec's names: rows (None: all of them), and their values."""
    named = {blob_name(name): array for name, array in blobs.items()}
    arrays = spec_arrays({f"0:{name}": array for name, array in blobs.items()}, 0)
    batch = Batch.from_arrays(spec, {name: arrays[name] for name in batch_names(spec)})
    parameters = {name: arrays[name] for name in parameter_shapes(spec)}
    state = {name: named[name].reshape(shape) for name, shape in state_shapes(spec).items()}
    evaluation = evaluate(spec, parameters, batch)
    forward = {name: (None, evaluation.tensors[name]) for name in ("probability", "loss")}
    updated = update(spec, parameters, state, evaluation)
    return forward | {name: (made.rows, made.new) for name, made in updated.items()}


def compare(net: str, ours: Arrays, theirs: Arrays, before: Arrays, wanted: Mapping) -> Comparison:
    """Both engines against the reference, blob by blob."""
    elements, worst, ratios = 0, "", np.zeros(3)
    for name in ours.keys() & theirs.keys():
        if blob_name(name) not in wanted:
            if (ours[name] != theirs[name]).any():
                return Comparison(net, elements, np.inf, 0, np.inf, name)
            continue
        rows, tracked = wanted[blob_name(name)]
        rest = np.delete(before[name], rows, 0) if rows is not None else None
        found = []
        for made in (ours[name], theirs[name]):
            if rest is not None and np.delete(made, rows, 0).tobytes() != rest.tobytes():
                return Comparison(net, elements, np.inf, np.inf, np.inf, f"{name}: another row has changed")
            found.append(np.asarray(made if rows is None else made[rows], np.float64).reshape(tracked.value.shape))
        reach = np.maximum(tracked.reach, np.finfo(np.float32).tiny)
        apart = [float(np.nan_to_num(abs(one - other) / reach, nan=np.inf).max(initial=0)) for one, other in (
            (found[0], tracked.value), (found[1], tracked.value), (found[0], found[1]))]
        worst = name if apart[2] > ratios[2] else worst
        elements, ratios = elements + tracked.value.size, np.maximum(ratios, apart)
    return Comparison(net, elements, *map(float, ratios), worst)


def run_case(spec: ModelSpec, checkout: Path, python: Path) -> list[Comparison]:
    """The training net that the script wrote, and the test net that it made."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recorded = run_script(python, checkout, spec, folder)
        blobs, theirs = (_of_step(recorded, mark) for mark in ":>")
        wanted = expected(spec, blobs)
        nets = {"training": folder / "dlrm_s_caffe2.proto", "test": folder / "test_net.pb"}
        (test,) = [array for key, array in recorded.items() if key.startswith("net>") and key != "net>DLRM"]
        nets["test"].write_bytes(test.tobytes())
        return [compare(net, convert_and_run(path, spec, blobs, ["prob_click", "loss"]), theirs, blobs, wanted)
                for net, path in nets.items()]


def _of_step(recorded: Arrays, mark: str) -> Arrays:
    prefix = f"{STEP}{mark}"
    return {key.removeprefix(prefix): array for key, array in recorded.items() if key.startswith(prefix)}


@click.command(help=__doc__.partition("\n")[0])
@click.argument("checkout", type=click.Path(path_type=Path))
def main(checkout: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    grid = Grid("model", "optimizer", "net", "numbers", "ONNX Runtime", "Caffe2", "apart", "at", "verdict")
    agree = []
    try:
        pythons = interpreters(checkout)
        if "Caffe2" not in pythons:
            raise EngineError("genuine Caffe2 is not installed; dlrm engine install")
        for spec in CASES:
            for result in run_case(spec, checkout, pythons["Caffe2"]):
                agree.append(result.agrees)
                grid.add_row(spec.name, spec.optimizer.kind, result.net, f"{result.elements:,}", f"{result.onnx:.3f}",
                             f"{result.caffe2:.3f}", f"{result.apart:.3f}", result.worst,
                             "agrees" if result.agrees else "DIFFERS")
    except (InputError, EngineError) as error:
        click.echo(f"facebookresearch_netdef: {' '.join(str(error).split())}", err=True)
        raise click.exceptions.Exit(2) from None
    console.print(grid)
    console.print(f"{'all agree' if all(agree) else 'NOT all agree'}: {len(agree)} nets")
    raise click.exceptions.Exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
