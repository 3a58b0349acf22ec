"""Facebookresearch's numbers: do our backends reach the losses that facebookresearch/dlrm's two scripts print?

    git clone https://github.com/facebookresearch/dlrm checkout
    python -m tools.facebookresearch checkout

For each model in MODELS this runs `dlrm_s_pytorch.py` (under this Python) and `dlrm_s_caffe2.py` (under that of genuine
Caffe2; left out, and said so, where it is not installed), with SGD on their own random data. The checkout is not
changed: facebookresearch_hook.py watches the scripts and writes down the weights that they begin with and every batch
that they feed. The two must have trained on the same bits. Then each of our backends that trains here begins with
these weights and takes these batches, never re-synchronised, and its losses are held against those that the scripts
printed, with 6 decimals.

A loss agrees where, printed with as many decimals, it has the same digits or differs by one unit in the last one: a
loss that lies near the middle between two decimals may be printed as either, also by their own two scripts. Both
counts are shown, and the largest distance between our unrounded loss and a printed one: 0.5 units is plain rounding.

Exit status: 0 all agree, 1 some do not, 2 the checkout or an engine is bad.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from spec.backend import backend_names, load_backend
from spec.batch import Batch
from spec.errors import EngineError, InputError
from spec.files import write_text
from spec.model import MLP, Interaction, Loss, ModelSpec, Optimizer, Table
from spec.parameters import Arrays, parameter_shapes
from spec.tensors import batch_names

SCRIPTS = {"PyTorch": "dlrm_s_pytorch.py", "Caffe2": "dlrm_s_caffe2.py"}
HOOK = Path(__file__).with_name("facebookresearch_hook.py")


def _tables(*rows: int, lookups: int, pooling: str = "sum") -> tuple[Table, ...]:
    """1 to `lookups` rows a bag, as the scripts draw them: rows that repeat in a bag are dropped."""
    return tuple(Table(rows=number, lookups=(1, lookups), pooling=pooling) for number in rows)


MODELS = (
    ModelSpec(  # the scripts' default, as in their own test/dlrm_s_test.sh
        name="tiny", dense_features=4, embedding_dim=2, batch_size=2, bottom=MLP(widths=(3, 2)),
        top=MLP(widths=(4, 2, 1)), loss=Loss(kind="mse"), optimizer=Optimizer(kind="sgd", learning_rate=0.1),
        tables=_tables(4, 3, 2, lookups=10)),
    ModelSpec(
        name="bce", dense_features=13, embedding_dim=16, batch_size=128, bottom=MLP(widths=(512, 256, 64, 16)),
        top=MLP(widths=(512, 256, 1)), loss=Loss(kind="bce"), optimizer=Optimizer(kind="sgd", learning_rate=0.1),
        tables=_tables(1000, 20, 5000, 3, 300, 10000, 100, 50, lookups=20)),
    ModelSpec(
        name="cat", dense_features=13, embedding_dim=16, batch_size=128, bottom=MLP(widths=(64, 16)),
        top=MLP(widths=(64, 32, 1)), interaction=Interaction(kind="cat"), loss=Loss(kind="bce"),
        optimizer=Optimizer(kind="sgd", learning_rate=0.1), tables=_tables(1000, 50, 300, 7, lookups=10)),
    ModelSpec(
        name="clip", dense_features=13, embedding_dim=16, batch_size=128, bottom=MLP(widths=(64, 16)),
        top=MLP(widths=(64, 32, 1)), interaction=Interaction(self_interaction=True), loss=Loss(kind="bce", clip=0.4),
        optimizer=Optimizer(kind="sgd", learning_rate=0.1), tables=_tables(1000, 50, 300, 7, lookups=10)),
    ModelSpec(
        name="weighted", dense_features=13, embedding_dim=16, batch_size=128, bottom=MLP(widths=(64, 16)),
        top=MLP(widths=(64, 32, 1)), loss=Loss(kind="mse"), optimizer=Optimizer(kind="sgd", learning_rate=0.1),
        tables=_tables(1000, 50, 300, 7, lookups=10, pooling="weighted_learned")),
)


@dataclass(frozen=True)
class Training:
    """What one of their scripts began with, was fed, and printed, under the spec's names."""

    parameters: Arrays
    batches: tuple[Batch, ...]
    losses: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The losses of one backend of ours beside those of one script. `same` and `near` count steps: the same digits,
    and at most one unit in the last one apart. `farthest` is the largest distance, unrounded, in such units."""

    ours: str
    theirs: str
    steps: int
    same: int
    near: int
    farthest: float

    @property
    def agrees(self) -> bool:
        return self.near == self.steps


def flags(spec: ModelSpec, steps: int) -> list[str]:
    """The options of both scripts that make this model and `steps` random batches for it."""
    table = spec.tables[0]
    values = {
        "arch-sparse-feature-size": spec.embedding_dim,
        "arch-embedding-size": _dashed(table.rows for table in spec.tables),
        "arch-mlp-bot": _dashed((spec.dense_features, *spec.bottom.widths)),
        "arch-mlp-top": _dashed(spec.top.widths),
        "arch-interaction-op": spec.interaction.kind,
        "num-indices-per-lookup": table.lookups[1],
        "loss-function": spec.loss.kind,
        "loss-threshold": spec.loss.clip,
        "learning-rate": spec.optimizer.learning_rate,
        "mini-batch-size": spec.batch_size,
        "data-size": steps * spec.batch_size,
        "print-freq": 1,
    }
    if spec.loss.kind == "bce":
        values["round-targets"] = True
    if table.weighted:
        values["weighted-pooling"] = table.pooling.removeprefix("weighted_")
    switches = ["--arch-interaction-itself"] if spec.interaction.self_interaction else []
    return [*(f"--{name}={value}" for name, value in values.items()), *switches]


def _dashed(numbers: Iterable[int]) -> str:
    return "-".join(map(str, numbers))


def printed_losses(output: str) -> tuple[str, ...]:
    """The loss of each training step, with the digits that a script printed."""
    return tuple(re.findall(r"^Finished training it \d+/\d+ of epoch \d+, .* loss (\d+\.\d+)\b", output, re.MULTILINE))


def spec_name(theirs: str) -> str | None:
    """Our name of a tensor in a script's recording; None for what only their nets need. See facebookresearch_hook.py.

    Their PyTorch MLPs count layers and activations, from 0; their Caffe2 MLPs count layers, from 1.
    """
    mlps = {"bot": "bottom", "top": "top"}
    parts = {"w": "weight", "b": "bias", "v": "pooling", "i": "indices", "l": "lengths", "emb_l": "weight",
             "v_W_l": "pooling"}
    if match := re.fullmatch(r"(bot|top)_l\.(\d+)\.(weight|bias)", theirs):
        return f"{mlps[match[1]]}.{int(match[2]) // 2}.{match[3]}"
    if match := re.fullmatch(r"(bot|top):::fc(\d+)_([wb])", theirs):
        return f"{mlps[match[1]]}.{int(match[2]) - 1}.{parts[match[3]]}"
    if match := re.fullmatch(r"(emb_l|v_W_l|offsets|indices)\.(\d+)(\.weight)?", theirs):
        return f"tables.{match[2]}.{parts.get(match[1], match[1])}"
    if match := re.fullmatch(r"emb:::sls(\d+)_([wvil])", theirs):
        return f"tables.{match[1]}.{parts[match[2]]}"
    return {"dense": "dense", "dense_in": "dense", "target": "label"}.get(theirs)


def spec_arrays(recorded: Mapping[str, np.ndarray], step: int) -> Arrays:
    """Parameters and batch of a step, under the spec's names and in its types: lengths for offsets, int32 [B], and a
    float32 label where Caffe2 takes an integer."""
    prefix = f"{step}:"
    named = {spec_name(key.removeprefix(prefix)): recorded[key] for key in recorded if key.startswith(prefix)}
    named.pop(None, None)
    for name in [name for name in named if name.endswith(".offsets")]:
        table, offsets = name.removesuffix(".offsets"), named.pop(name)
        named[f"{table}.lengths"] = np.diff(offsets, append=len(named[f"{table}.indices"])).astype(np.int32)
    named["label"] = named["label"].astype(np.float32)
    return named


def compare(ours: str, losses: Sequence[float], theirs: str, printed: Sequence[str]) -> Comparison:
    """Hold losses against printed ones, step by step."""
    apart = [units_apart(loss, text) for loss, text in zip(losses, printed, strict=True)]
    exact = [abs(loss - float(text)) * 10 ** _decimals(text) for loss, text in zip(losses, printed, strict=True)]
    return Comparison(ours, theirs, len(apart), sum(units == 0 for units in apart), sum(units <= 1 for units in apart),
                      float(np.max(exact)))


def units_apart(loss: float, printed: str) -> float:
    """How many units of the last printed digit lie between the printed loss and ours, printed alike; inf for a
    loss that is not finite."""
    if not np.isfinite(loss):
        return float("inf")
    decimals = _decimals(printed)
    return float(abs(Decimal(f"{loss:.{decimals}f}") - Decimal(printed)).scaleb(decimals))


def _decimals(printed: str) -> int:
    return len(printed.partition(".")[2])


def run_script(python: Path, checkout: Path, script: str, spec: ModelSpec, steps: int) -> Training:
    """Train with one of their scripts. Raises EngineError where it fails or does something else than expected."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.npz"
        command = [python, "-I", "-B", HOOK, checkout.absolute() / script, recording, *flags(spec, steps)]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise EngineError(f"{checkout / script} ended with status {done.returncode} under {python}: "
                              f"{(done.stderr.strip() or 'no message').splitlines()[-1]}")
        with np.load(recording) as arrays:
            recorded = dict(arrays)
    losses = printed_losses(done.stdout)
    if len(losses) != steps:
        raise EngineError(f"{checkout / script}: expected {steps} lines `Finished training it ... loss X`, found "
                          f"{len(losses)}")
    states = [spec_arrays(recorded, step) for step in range(steps)]
    return Training({name: states[0][name] for name in parameter_shapes(spec)},
                    tuple(Batch.from_arrays(spec, {name: state[name] for name in batch_names(spec)})
                          for state in states), losses)


def first_difference(one: Training, other: Training) -> str:
    """The first parameter or input that is not the same, bit for bit; empty where all are."""
    pairs = [("", one.parameters, other.parameters)]
    pairs += [(f"step {step}: ", mine.arrays(), yours.arrays())
              for step, (mine, yours) in enumerate(zip(one.batches, other.batches, strict=True))]
    for where, mine, yours in pairs:
        for name, array in mine.items():
            if array.shape != yours[name].shape or array.tobytes() != yours[name].tobytes():
                return f"{where}{name}"
    return ""


def interpreters(checkout: Path) -> dict[str, Path]:
    """The Python for each script that can run here. Raises InputError for what is no checkout."""
    for script in SCRIPTS.values():
        if not (checkout / script).is_file():
            raise InputError(str(checkout), f"a checkout of facebookresearch/dlrm, which holds {script}",
                             "no such file in it" if checkout.is_dir() else "no such folder",
                             "git clone https://github.com/facebookresearch/dlrm and name its folder")
    (entry,) = entry_points(group="dlrm.engines", name="caffe2")
    engine = entry.load()
    state = engine.availability()
    if state.ok:
        return {"PyTorch": Path(sys.executable), "Caffe2": engine.interpreter(engine.venv_path())}
    click.echo(f"{SCRIPTS['Caffe2']} and backend caffe2 are left out: {state.reason}; {state.remedy}", err=True)
    return {"PyTorch": Path(sys.executable)}


def train(name: str, spec: ModelSpec, training: Training) -> tuple[list[float], str]:
    """The losses of a backend from the script's weights, over its batches, and the engine that ran."""
    model = load_backend(name).create(spec, training.parameters)
    try:
        return [float(model.train_step(batch)) for batch in training.batches], model.engine
    finally:
        model.close()


def run_model(spec: ModelSpec, steps: int, checkout: Path, pythons: Mapping[str, Path]) -> dict:
    """Everything about one model, as it stands in the JSON file."""
    theirs = {name: run_script(python, checkout, SCRIPTS[name], spec, steps) for name, python in pythons.items()}
    reference = theirs["PyTorch"]
    difference = next(filter(None, (first_difference(reference, other) for other in theirs.values())), "")
    backends = [backend for backend in map(load_backend, backend_names()) if backend.trains and backend.available().ok]
    ours = {backend.name: train(backend.name, spec, reference) for backend in backends}
    comparisons = [compare(name, losses, script, training.losses)
                   for name, (losses, _) in ours.items() for script, training in theirs.items()]
    return {"name": spec.name, "flags": flags(spec, steps), "first_difference": difference,
            "theirs": {name: training.losses for name, training in theirs.items()},
            "ours": {name: losses for name, (losses, _) in ours.items()},
            "engines": {name: engine for name, (_, engine) in ours.items()},
            "comparisons": [asdict(comparison) | {"agrees": comparison.agrees} for comparison in comparisons],
            "agrees": not difference and all(comparison.agrees for comparison in comparisons)}


def print_model(result: dict, console: Console) -> None:
    """A row for each step. One unit of the last digit away from any script is marked `~`, more `!`."""
    grid = Grid(title=result["name"], caption=" ".join(result["flags"]), title_justify="left",
                caption_justify="left")
    grid.add_column("step", justify="right")
    for kind in ("theirs", "ours"):
        for name in result[kind]:
            grid.add_column(f"{kind}: {name}", justify="right")
    for step, printed in enumerate(zip(*result["theirs"].values(), strict=True)):
        ours = [losses[step] for losses in result["ours"].values()]
        grid.add_row(str(step), *printed, *(f"{loss:.{_decimals(printed[0])}f}{_mark(loss, printed)}"
                                            for loss in ours))
    console.print(grid)
    if result["first_difference"]:
        console.print(f"the two scripts did not train on the same bits: {result['first_difference']}", style="red")
    for row in result["comparisons"]:
        console.print(f"{'agrees' if row['agrees'] else 'DIFFERS'}: {row['ours']} with their {row['theirs']}: of "
                      f"{row['steps']} losses {row['same']} have the same digits, {row['near']} are within one unit "
                      f"of the last; farthest {row['farthest']:.2f} units", style="" if row["agrees"] else "red")
    console.print()


def _mark(loss: float, printed: Sequence[str]) -> str:
    apart = max(units_apart(loss, text) for text in printed)
    return " " if apart == 0 else "~" if apart <= 1 else "!"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="SGD steps.")
@click.option("--model", "names", multiple=True, type=click.Choice([spec.name for spec in MODELS]),
              help="Repeat for several.  [default: all]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write everything to this file.")
def main(checkout: Path, steps: int, names: tuple[str, ...], json_path: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    results = []
    try:
        pythons = interpreters(checkout)
        for spec in MODELS:
            if not names or spec.name in names:
                results.append(run_model(spec, steps, checkout, pythons))
                print_model(results[-1], console)
        agrees = all(result["agrees"] for result in results)
        if json_path:
            write_text(json_path, json.dumps({"agrees": agrees, "models": results}, indent=1) + "\n")
    except (InputError, EngineError) as error:
        click.echo(f"facebookresearch: {' '.join(str(error).split())}", err=True)
        raise click.exceptions.Exit(2) from None
    console.print(f"{'all agree' if agrees else 'NOT all agree'}: {len(results)} models, "
                  f"{sum(len(result['comparisons']) for result in results)} comparisons of {steps} losses")
    raise click.exceptions.Exit(0 if agrees else 1)


if __name__ == "__main__":
    main()
