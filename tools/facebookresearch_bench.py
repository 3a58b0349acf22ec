"""Facebookresearch's speed: our training steps beside those of facebookresearch/dlrm's two scripts, and two baselines.

    git clone https://github.com/facebookresearch/dlrm checkout
    python -m tools.facebookresearch_bench checkout

Each duel is one run: processes that hold the same model, turn by turn as in `dlrm bench` (tools/bench/group.py), on
random data of the same sizes. The scripts are timed by their own --print-time, which leaves out their data; ours by the
whole of `train_step`, which takes a batch as NumPy arrays. dlrm_s_pytorch.py runs under this Python and its PyTorch,
dlrm_s_caffe2.py under that of genuine Caffe2, as it is and with MKL_DEBUG_CPU_TYPE=5, with the net type of their own
bench/dlrm_s_benchmark.sh (async_scheduling) and without. The baselines are those of dlrm_torch/baselines.py, the floor
is that of dlrm_torch/floor.py. Of several opponents that a target names, the fastest counts.

Full-size tables take 2 GB in each process; --max-rows caps them. Exit status: 0 every target is met, 1 some are not, 2
the checkout or an engine is bad.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from conformance.case import under
from conformance.machine import describe_machine, load_average, now
from spec import toml
from spec.backend import load_backend
from spec.errors import EngineError, InputError
from spec.files import check_writable, write_text
from spec.model import ModelSpec
from spec.threads import thread_count
from tools.bench.console import milliseconds
from tools.bench.group import Contestant, Timing, load_worker, run_rounds
from tools.bench.plan import Effort, Group, Judged, Setting, check_room
from tools.bench.process import WorkerProcess, terminable
from tools.bench.run import bar
from tools.bench.share import Share
from tools.bench.statistics import paired_ratio, spread
from tools.facebookresearch import SCRIPTS, flags, interpreters

GATE = Path(__file__).with_name("facebookresearch_gate.py")
MKL = {"MKL_DEBUG_CPU_TYPE": "5"}
ITERATIONS = 1_000_000
"""More than any run takes; the scripts draw each batch when they get there."""

BASELINES = {"plain": "dlrm_torch.baselines:PLAIN", "fbgemm": "dlrm_torch.baselines:FBGEMM",
             "floor": "dlrm_torch.floor:FLOOR"}


@dataclass(frozen=True)
class Script:
    """One of their scripts, with options and variables of its own."""

    script: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


ASYNC = ("--caffe2-net-type=async_scheduling",)
THEIRS = {
    "their PyTorch": Script("PyTorch"),
    "their Caffe2": Script("Caffe2"),
    "their Caffe2, async": Script("Caffe2", ASYNC),
    "their Caffe2, MKL": Script("Caffe2", (), tuple(MKL.items())),
    "their Caffe2, MKL, async": Script("Caffe2", ASYNC, tuple(MKL.items())),
}


@dataclass(frozen=True)
class Target:
    """Our step takes at most `limit` of the fastest opponent's."""

    ours: str
    opponents: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Duel:
    """One interleaved run: everyone that its targets name, and the floor, which says what could be reached at all."""

    preset: str
    batch_size: int
    targets: tuple[Target, ...]
    optimizer: str = "sgd"

    @property
    def names(self) -> list[str]:
        named = (name for target in self.targets for name in (target.ours, *target.opponents))
        return list(dict.fromkeys([*named, "floor"]))


AS_IS, WITH_MKL = ("their Caffe2", "their Caffe2, async"), ("their Caffe2, MKL", "their Caffe2, MKL, async")

DUELS = {
    "paper-torch": Duel("paper-benchmark", 2048, (
        Target("torch", ("their PyTorch",), 0.60), Target("torch", ("plain",), 0.92),
        Target("caffe2-aten", ("torch",), 1.15), Target("torch", ("floor",), 1.25))),
    "paper-caffe2": Duel("paper-benchmark", 2048, (
        Target("caffe2", AS_IS, 0.33), Target("caffe2", WITH_MKL, 0.75))),
    "paper-rowwise-torch": Duel("paper-benchmark", 2048, (Target("torch", ("fbgemm",), 0.75),), "rowwise_adagrad"),
    "paper-rowwise-caffe2": Duel("paper-benchmark", 2048, (Target("caffe2", WITH_MKL, 0.55),), "rowwise_adagrad"),
    "kaggle-128": Duel("criteo-kaggle", 128, (
        Target("torch", ("their PyTorch",), 0.45), Target("caffe2", WITH_MKL, 0.85),
        Target("caffe2-aten", ("torch",), 1.15))),
    "kaggle-2048": Duel("criteo-kaggle", 2048, (Target("torch", ("their PyTorch",), 0.70),)),
}


def script_flags(spec: ModelSpec) -> list[str]:
    """As `tools.facebookresearch.flags`, also for bags of one size, endlessly, with times."""
    most = max(table.lookups if table.fixed_lookups else table.lookups[1] for table in spec.tables)
    drawn = spec.model_copy(update={"tables": tuple(table.model_copy(update={"lookups": (1, most)})
                                                    for table in spec.tables)})
    optimizer = {"sgd": "sgd", "adagrad": "adagrad", "rowwise_adagrad": "rwsadagrad"}[spec.optimizer.kind]
    return [*flags(drawn, 1), f"--num-batches={ITERATIONS}", f"--optimizer={optimizer}", "--print-time"]


def run_duel(duel: Duel, max_rows: int | None, threads: int, effort: Effort, checkout: Path,
             pythons: Mapping[str, Path], tell: Any) -> dict[str, Any]:
    """Everything about one duel, as it stands in the JSON file."""
    spec = under(toml.load(duel.preset), duel.optimizer)
    spec = (spec.capped(max_rows) if max_rows else spec).model_copy(update={"batch_size": duel.batch_size})
    group = Group(spec, threads, (Setting("training", duel.batch_size),))
    check_room(group, len(duel.names))
    with TemporaryDirectory(prefix="dlrm-duel-") as folder, ExitStack() as stack:
        tell(f"{spec.name}: parameters and batches")
        share = Share(Path(folder), group, "random", 0, effort.distinct_batches)
        contestants = [_contestant(name, group, share, checkout, pythons, stack, tell) for name in duel.names]
        load = load_average()
        idle = run_rounds("training", share.batches(duel.batch_size), contestants, effort, 0,
                          lambda what: tell(f"{spec.name}, {duel.optimizer}, batch {duel.batch_size}: {what}"))
    timings = {contestant.timing.backend: contestant.timing for contestant in contestants}
    return {"spec": spec.name, "capped": spec.is_capped, "optimizer": duel.optimizer, "batch_size": duel.batch_size,
            "load": load, "idle": idle,
            "timings": {name: {"status": timing.status, "reason": timing.reason, "engine": timing.engine,
                               "rounds": timing.rounds, "others": timing.others, "memory": timing.memory,
                               "cores": timing.cores}
                        for name, timing in timings.items()},
            "targets": [_outcome(target, timings) for target in duel.targets]}


def _contestant(name: str, group: Group, share: Share, checkout: Path, pythons: Mapping[str, Path], stack: ExitStack,
                tell: Any) -> Contestant:
    if name not in THEIRS:
        path = BASELINES.get(name, name)
        process = stack.enter_context(WorkerProcess(name, group.threads))
        judged = None if name in BASELINES else Judged()
        timing = load_worker(group, path, load_backend(path), process, share, judged, 0, tell, name != "floor")
        timing.backend = name
        return Contestant(process, timing)
    theirs = THEIRS[name]
    if theirs.script not in pythons:
        return Contestant(None, Timing(name, "missing", "genuine Caffe2 is not installed", "dlrm engine install"))
    tell(f"{group.spec.name}: starting {name}")
    command = [str(part) for part in (pythons[theirs.script], "-I", "-B", GATE,
                                      checkout.absolute() / SCRIPTS[theirs.script], *script_flags(group.spec),
                                      *theirs.options)]
    process = stack.enter_context(WorkerProcess(name, group.threads, command, dict(theirs.environment)))
    return Contestant(process, Timing(name, engine=" ".join([SCRIPTS[theirs.script], *theirs.options])))


def _outcome(target: Target, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """The ratio to the fastest opponent, and whether it is within the limit; None where one has no time."""
    rounds = {name: timings[name].rounds for name in (target.ours, *target.opponents) if timings[name].rounds}
    outcome = {"ours": target.ours, "opponents": target.opponents, "limit": target.limit, "against": None,
               "ratio": None, "met": None}
    opponents = [name for name in target.opponents if name in rounds]
    if target.ours not in rounds or not opponents:
        return outcome
    fastest = min(opponents, key=lambda name: spread(rounds[name]).value)
    ratio = paired_ratio(rounds[target.ours], rounds[fastest])
    return outcome | {"against": fastest, "ratio": list(ratio), "met": ratio.value <= target.limit}


def print_duel(duel: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{duel['spec']}{' (capped)' if duel['capped'] else ''}, training with {duel['optimizer']}, "
                        f"batch {duel['batch_size']}; load average {duel['load']:.1f}, idle processes took "
                        f"{duel['idle']:.1%}", title_justify="left")
    for column in ("contestant", "ms", "quartiles", "cores", "others", "MiB"):
        table.add_column(column, justify="left" if column == "contestant" else "right")
    for name, timing in duel["timings"].items():
        if not timing["rounds"]:
            table.add_row(name, timing["status"], timing["reason"])
            continue
        median, low, high = spread(timing["rounds"])
        table.add_row(name, milliseconds(median), f"{milliseconds(low)}-{milliseconds(high)}", f"{timing['cores']:.1f}",
                      f"{spread(timing['others']).value:.0%}", f"{timing['memory'] / 2**20:,.0f}")
    console.print(table)
    for target in duel["targets"]:
        if target["ratio"] is None:
            console.print(f"  {target['ours']} against {' or '.join(target['opponents'])}: no time")
            continue
        ratio, low, high = target["ratio"]
        console.print(f"  {'met' if target['met'] else 'MISSED'}: {target['ours']} / {target['against']} = {ratio:.2f} "
                      f"({low:.2f}-{high:.2f}), at most {target['limit']:.2f}", soft_wrap=True)
    console.print()


@click.command(help=__doc__.partition("\n")[0])
@click.argument("checkout", type=click.Path(path_type=Path))
@click.option("--duel", "names", multiple=True, type=click.Choice(list(DUELS)),
              help="Repeat for several.  [default: all]")
@click.option("--max-rows", type=click.IntRange(min=1), help="Cap every table at this many rows.")
@click.option("--rounds", type=click.IntRange(min=2), default=15, show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="That a turn is meant to take.")
@click.option("--patience", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Seconds that a turn may wait for other programs to be quiet.")
@click.option("--threads", type=click.IntRange(min=1), help="Of everyone.  [default: OMP_NUM_THREADS, or every core]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write everything to this file.")
def main(checkout: Path, names: Sequence[str], max_rows: int | None, rounds: int, seconds: float, patience: float,
         threads: int | None, json_path: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    duels = []
    try:
        if json_path:
            check_writable(json_path)
        pythons = interpreters(checkout)
        with terminable(), bar() as tell:
            for name in names or DUELS:
                effort = Effort(rounds, seconds, patience=patience)
                duels.append(run_duel(DUELS[name], max_rows, threads or thread_count(), effort, checkout, pythons,
                                      tell))
                print_duel(duels[-1], console)
        if json_path:
            content = {"machine": describe_machine(), "date": now(), "duels": duels}
            write_text(json_path, json.dumps(content, indent=1) + "\n")
    except (InputError, EngineError) as error:
        click.echo(f"facebookresearch_bench: {' '.join(str(error).split())}", err=True)
        raise click.exceptions.Exit(2) from None
    met = [target["met"] for duel in duels for target in duel["targets"]]
    console.print(f"{met.count(True)} of {len(met)} targets are met, {met.count(None)} have no time")
    raise click.exceptions.Exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
