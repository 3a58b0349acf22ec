"""The command `dlrm bench`. Imports what it needs when it runs, so that --help stays instant."""

from pathlib import Path

import click

from tools.common import OPTIMIZERS, example, load


@click.command(epilog=example(
    "dlrm bench paper-benchmark criteo-kaggle --json bench.json",
    "dlrm bench rmc1 --max-rows 100000 --mode training --batch-size 128 --batch-size 512 --threads 1 --threads 2",
    "dlrm bench paper-benchmark --max-rows 100000 --sweep batch --html batch.html",
    "dlrm bench --compare before.json after.json --threshold 0.1"))
@click.argument("specs", nargs=-1)
@click.option("--backend", "backends", multiple=True, metavar="NAME",
              help="A backend to time; repeat for several.  [default: every registered one]")
@click.option("--mode", "modes", multiple=True, type=click.Choice(["inference", "training"]),
              help="Repeat for both.  [default: both]")
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(min=1),
              help="Samples a batch; repeat for several.  [default: the spec's own]")
@click.option("--threads", "threads", multiple=True, type=click.IntRange(min=1),
              help="Of each engine; repeat for several.  [default: OMP_NUM_THREADS, or every core]")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Train with it.  [default: the spec's own]")
@click.option("--max-rows", type=click.IntRange(min=1), help="Cap every table at this many rows.")
@click.option("--sweep", type=click.Choice(["batch", "tables", "rows", "lookups", "width"]),
              help="Time a quarter, half, once, twice and four times of it, and fit the growth.")
@click.option("--baseline", metavar="NAME", help="The backend that ratios are to.  [default: torch]")
@click.option("--rounds", type=click.IntRange(min=2), default=15, show_default=True,
              help="In each, every backend has a turn.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=0.5, show_default=True,
              help="That a turn is meant to take.")
@click.option("--iterations", type=click.IntRange(min=1), help="Of a turn.  [default: as many as fit its seconds]")
@click.option("--patience", type=click.FloatRange(min=0), default=0.0, show_default=True, metavar="SECONDS",
              help="That a turn may wait for other programs to be quiet, or be repeated where they were not.")
@click.option("--data", default="random", show_default=True, metavar="SOURCE",
              help="random, criteo:FILE (a Criteo TSV) or npz:FILE (arrays under the spec's names).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of parameters, random data, and the order of turns.")
@click.option("--judge-rows", type=click.IntRange(min=1), default=10_000, show_default=True,
              help="Rows a table, at the most, on which a backend is judged before it is timed.")
@click.option("--judge-samples", type=click.IntRange(min=1), default=128, show_default=True,
              help="Samples a batch, at the most, on which it is judged.")
@click.option("--profile/--no-profile", default=True, show_default=True, help="Break the time down by operator.")
@click.option("--ceilings/--no-ceilings", default=True, show_default=True,
              help="Measure what the machine can do, and the distance from it.")
@click.option("--compare", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json",
              help="Time nothing: say what is slower in B than in A. Exit status 1 where something is.")
@click.option("--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True,
              help="Of --compare: what is slower by less is not told.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write everything to this file.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write one page with plots to this file.")
def bench(specs: tuple[str, ...], backends: tuple[str, ...], modes: tuple[str, ...], batch_sizes: tuple[int, ...],
          threads: tuple[int, ...], optimizer: str | None, max_rows: int | None, sweep: str | None,
          baseline: str | None, rounds: int, seconds: float, iterations: int | None, patience: float, data: str,
          seed: int, judge_rows: int, judge_samples: int, profile: bool, ceilings: bool,
          compare: tuple[Path, Path] | None, threshold: float, json_path: Path | None, html_path: Path | None) -> None:
    """Time backends against each other, one process each, turn by turn.

    SPECS are presets or .toml files. A backend that does not conform with the float64 reference, on this spec and
    with these threads, gets no time. OMP_NUM_THREADS and MKL_NUM_THREADS are --threads; nothing
    else is set. Exit status: 0 all were timed, 1 some do not conform or fail, 2 the input was bad.
    """
    from conformance.case import under
    from spec.errors import InputError
    from spec.threads import thread_count
    from tools.bench.plan import MODES, Effort, Judged, make_groups
    from tools.bench.run import run, run_comparison
    if compare and (specs or json_path or html_path):
        raise click.UsageError("--compare takes two files that were written before, no SPECS, --json or --html")
    if compare:
        raise click.exceptions.Exit(1 if run_comparison(*compare, threshold) else 0)
    if not specs:
        raise InputError("dlrm bench", "a preset or a .toml file", "none", "for example: dlrm bench tiny")
    loaded = [load(name, max_rows) for name in specs]
    if optimizer:
        loaded = [under(spec, optimizer) for spec in loaded]
    groups = make_groups(loaded, modes or MODES, batch_sizes, threads or (thread_count(),), sweep)
    effort = Effort(rounds, seconds, iterations, patience=patience)
    ok = run(groups, backends, effort, Judged(judge_rows, judge_samples), baseline, data, seed, profile, ceilings,
             json_path, html_path)
    raise click.exceptions.Exit(0 if ok else 1)
