"""The `dlrm` command. Commands import what they need when they run, so that --help stays instant."""

import os
import shlex
import sys
from pathlib import Path

import click

from tools.bench.command import bench
from tools.common import OPTIMIZERS
from tools.common import example as _example
from tools.common import load as _load


class _Group(click.Group):
    """Turns the errors a user can cause into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> object:
        from spec.errors import EngineError, InputError
        try:
            return super().invoke(ctx)
        except (InputError, EngineError) as error:
            raise click.exceptions.Exit(_fail(str(error))) from None
        except KeyboardInterrupt:
            click.echo("dlrm: interrupted", err=True)
            raise click.exceptions.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None


def _fail(message: str) -> int:
    click.echo("dlrm: " + " ".join(message.split()), err=True)
    return 2


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]},
             epilog=_example("dlrm conform tiny"))
@click.version_option(package_name="dlrm-parity")
def main() -> None:
    """One specification of DLRM, a PyTorch and a Caffe2 implementation of it, and a proof that they agree.

    Exit status: 0 it conforms or is done, 1 it does not conform, 2 the input was bad or an engine failed.
    """


@main.group()
def spec() -> None:
    """Look at model specs: shipped presets, or TOML files."""


@spec.command("list", epilog=_example("dlrm spec list"))
def spec_list() -> None:
    """List the shipped presets."""
    from tools.specs import print_list
    print_list()


@spec.command("show", epilog=_example("dlrm spec show criteo-kaggle --max-rows 1000"))
@click.argument("name")
@click.option("--max-rows", type=click.IntRange(min=1), help="Cap every table at this many rows.")
def spec_show(name: str, max_rows: int | None) -> None:
    """Print a spec as TOML: a preset's NAME or the path of a .toml file."""
    from spec import toml
    click.echo(toml.dumps(_load(name, max_rows)), nl=False)


@spec.command("validate", epilog=_example("dlrm spec validate my-model.toml"))
@click.argument("names", nargs=-1, required=True)
def spec_validate(names: tuple[str, ...]) -> None:
    """Check spec files; the first error ends it."""
    from tools.specs import describe
    for name in names:
        click.echo(f"{name}: valid, {describe(_load(name))}")


@spec.command("schema", epilog=_example("dlrm spec schema > dlrm-spec.schema.json"))
def spec_schema() -> None:
    """Print the JSON Schema of spec files."""
    import json

    from spec import toml
    click.echo(json.dumps(toml.schema(), indent=2))


@main.command(epilog=_example(
    "dlrm conform tiny",
    "dlrm conform criteo-kaggle --max-rows 100000 --data criteo:train.txt --out report",
    "dlrm conform tiny --trajectory 200 --junit conformance.xml",
    "dlrm conform tiny --backend torch --only top.1.weight_grad",
    "dlrm conform tiny --mutants --backend torch",
    "dlrm conform tiny --write-bundle bundle",
    "dlrm conform --bundle bundle",
    "dlrm conform --template my_port.py",
    "dlrm conform --fuzz 200 --seed 1 --out failing"))
@click.argument("specs", nargs=-1)
@click.option("--backend", "backends", multiple=True, metavar="NAME",
              help="A backend to run, by name or as module:attribute; repeat for several.  [default: every registered "
                   "one but torch-compile, which compiles for a minute]")
@click.option("--optimizer", "optimizers", multiple=True, type=click.Choice(OPTIMIZERS),
              help="Train with it; repeat for several.  [default: all three]")
@click.option("--steps", type=click.IntRange(min=0),
              help="Training steps under each optimizer; 0 compares forward and backward alone.  [default: 10; 2 in a "
                   "bundle]")
@click.option("--batch-size", type=click.IntRange(min=1),
              help="Samples a batch.  [default: the spec's own, at most 256; 64 in a bundle]")
@click.option("--max-rows", type=click.IntRange(min=1), help="Cap every table at this many rows.")
@click.option("--data", default="random", show_default=True, metavar="SOURCE",
              help="random, criteo:FILE (a Criteo TSV) or npz:FILE (arrays under the spec's names).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of parameters and random data.")
@click.option("--device", default="cpu", show_default=True, help="Where backends run; never tried on a GPU.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for report.json and report.html; of --fuzz, for "
              "the failing specs and their batches.  [default: of --fuzz, fuzz]")
@click.option("--json", "json_path", type=click.Path(path_type=Path),
              help="Write the report as JSON to this file (its schema: conformance/report.schema.json).")
@click.option("--junit", type=click.Path(path_type=Path), help="Write the report as JUnit XML to this file.")
@click.option("--trajectory", type=click.IntRange(min=1), metavar="STEPS",
              help="Also train each backend for so many steps without re-synchronising it, and judge how far it strays "
                   "against an ensemble moved by one unit in the last place. Batches of 32, or --batch-size.")
@click.option("--xfail", type=click.Path(path_type=Path), metavar="FILE",
              help="TOML of [[xfail]] entries: backend, tensor, reason, and optionally preset, phase, optimizer. What "
                   "they match may fail; see conformance/PORTING.md.")
@click.option("--only", metavar="TENSOR",
              help="Look at the one step of one backend that makes this tensor, a parameter's update included: its "
                   "inputs, and its own error. With --optimizer, that of training step --steps.")
@click.option("--mutants", is_flag=True,
              help="Judge the suite instead: in each backend, seeded faults that it must catch and correct variants "
                   "that it must pass. --out gets MUTANTS.md.")
@click.option("--template", type=click.Path(path_type=Path), metavar="FILE",
              help="Run nothing: write a backend to start a port from; see conformance/PORTING.md.")
@click.option("--fuzz", type=click.IntRange(min=1), metavar="N",
              help="Judge N generated specs and batches instead; those that fail are made as small as they get.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="End --fuzz after this time.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes of --fuzz.  [default: one for each core]")
@click.option("--write-bundle", type=click.Path(path_type=Path), metavar="DIR",
              help="Run nothing: write the case of one spec as files, for programs that no Python reaches.")
@click.option("--bundle", type=click.Path(path_type=Path), metavar="DIR",
              help="Run nothing: judge the results in DIR/results; --backend names those to judge.")
def conform(specs: tuple[str, ...], backends: tuple[str, ...], optimizers: tuple[str, ...], steps: int | None,
            batch_size: int | None, max_rows: int | None, data: str, seed: int, device: str, out: Path | None,
            json_path: Path | None, junit: Path | None, trajectory: int | None, xfail: Path | None, only: str | None,
            mutants: bool, template: Path | None, fuzz: int | None, minutes: float | None, jobs: int | None,
            write_bundle: Path | None, bundle: Path | None) -> None:
    """Check that backends compute what the spec says: forward, backward, and every optimizer step.

    SPECS are presets or .toml files. Every tensor of every backend is held against the float64 reference,
    within a bound derived from the arithmetic, and against the other backends.

    A port that Python cannot call is judged by files: --write-bundle, then --bundle.
    """
    if [bool(specs), bool(bundle), bool(template), bool(fuzz)].count(True) != 1:
        raise click.UsageError("name SPECS, or --bundle DIR, or --template FILE, or --fuzz N, and only one of them")
    if (minutes or jobs) and not fuzz:
        raise click.UsageError("--minutes and --jobs go with --fuzz N")
    given_data = (None if data == "random" else data, None if device == "cpu" else device)
    if template:
        _reject("--template", only, mutants or None, backends, optimizers, steps, batch_size, max_rows, out, json_path,
                junit, trajectory, xfail, write_bundle)
        from tools.template import write_template
        click.echo(write_template(template))
        return
    from spec.threads import wait_without_spinning
    wait_without_spinning()
    if fuzz:
        _reject("--fuzz", only, mutants or None, optimizers, steps, batch_size, max_rows, xfail, write_bundle, junit,
                trajectory, *given_data)
        from tools.fuzz import run as run_campaign
        ok = run_campaign(fuzz, seed, backends, minutes, jobs, out or Path("fuzz"), json_path)
        raise click.exceptions.Exit(0 if ok else 1)
    from tools.conform import Outputs, run
    outputs = Outputs(out, json_path, junit)
    if bundle:
        _reject("--bundle", only, mutants or None, optimizers, steps, batch_size, max_rows, write_bundle, trajectory,
                *given_data)
        from tools.bundle import judge
        raise click.exceptions.Exit(0 if judge(bundle, backends, outputs, xfail) else 1)
    loaded = [_load(name, max_rows) for name in specs]
    given, optimizers = optimizers, optimizers or OPTIMIZERS
    if write_bundle:
        _reject("--write-bundle", only, mutants or None, backends, out, json_path, junit, trajectory, xfail, specs[1:])
        from tools.bundle import write
        write(loaded[0], optimizers, 2 if steps is None else steps, batch_size, data, seed, write_bundle)
        return
    if only:
        _reject("--only", mutants or None, out, json_path, junit, trajectory, xfail, specs[1:], backends[1:], given[1:])
        from tools.only import run as look
        ok = look(loaded[0], backends, only, given, steps or 1, batch_size, data, seed, device)
        raise click.exceptions.Exit(0 if ok else 1)
    cap = f" --max-rows {max_rows}" if max_rows else ""
    arguments = [shlex.quote(name) + cap for name in specs]
    if mutants:
        _reject("--mutants", given, steps, xfail, junit, trajectory, *given_data)
        from tools.mutants import run as run_mutants
        ok = run_mutants(loaded, arguments, backends, seed, batch_size, out, json_path)
        raise click.exceptions.Exit(0 if ok else 1)
    ok = run(loaded, backends, optimizers, 10 if steps is None else steps, batch_size, data, seed, device, outputs,
             xfail, trajectory, arguments)
    raise click.exceptions.Exit(0 if ok else 1)


def _reject(option: str, *others: object) -> None:
    takes = {"--template": "no other option",
             "--mutants": "specs, --backend, --batch-size, --max-rows, --seed, --out and --json alone",
             "--only": "one spec, one --backend, one --optimizer at most, and no report",
             "--fuzz": "--seed, --backend, --minutes, --jobs, --out and --json alone",
             "--bundle": "--backend, --xfail, --out, --json and --junit alone",
             "--write-bundle": "one spec, no backend and no report"}
    if any(other not in (None, ()) for other in others):
        raise click.UsageError(f"{option} takes {takes[option]}")


@main.command(epilog=_example(
    "dlrm export criteo-kaggle --max-rows 1000 --out exported",
    "dlrm export paper-benchmark --format onnx --parameters exported/trained.safetensors --out exported",
    "dlrm export criteo-kaggle --max-rows 100000 --format onnx --table-updates rows --out trainable",
    "dlrm export criteo-kaggle --max-rows 100000 --tables int8 --out serving",
    "dlrm export --netdef predict_net.pb --init init_net.pb --input '*_ids=int64' --out exported"))
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")
@click.option("--max-rows", type=click.IntRange(min=1), help="Cap every table at this many rows.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the parameters.  [default: 0]")
@click.option("--parameters", "file", type=click.Path(path_type=Path), metavar="FILE",
              help="A .safetensors of the parameters, under the spec's names, instead of a seed (of blobs, for "
                   "--netdef). Where it lies in the folder to write to, the ONNX files refer to it.")
@click.option("--external-data", is_flag=True,
              help="Write the parameters to model.safetensors, to which the ONNX files refer. They always do above 1 "
                   "GiB.")
@click.option("--format", "formats", multiple=True, type=click.Choice(["netdef", "onnx", "torch-onnx"]),
              help="What to write; repeat for several.  [default: netdef, onnx]")
@click.option("--table-updates", type=click.Choice(["whole", "rows"]),
              help="Of each table, what the training step in ONNX returns: the whole new table, or the rows that "
                   "change, X.new_rows, and what they become, X.new_values: no table is copied then.  [default: whole]")
@click.option("--tables", type=click.Choice(["fp16", "int8", "uint8-rowwise"]),
              help="Write only ONNX models that predict, with tables of fewer bits, and measure what that costs.")
@click.option("--data", metavar="SOURCE",
              help="For --tables, what to measure it on: random, criteo:FILE or npz:FILE.  [default: random]")
@click.option("--samples", type=click.IntRange(min=1), help="For --tables, on how many samples.  [default: 4096]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="For --tables, write the measurements too.")
@click.option("--netdef", type=click.Path(path_type=Path), metavar="FILE",
              help="Instead of a model, any Caffe2 net: its file, serialized or as text.")
@click.option("--init", type=click.Path(path_type=Path), metavar="FILE", help="The net that makes its parameters.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=TYPE[SIZES]",
              help="What an input of the net is, where its operators do not imply it: dense=float32[B,13], "
                   "'*_ids=int64[?]', label=int32. NAME may be a pattern; a size that is a name, or ?, may differ from "
                   "run to run. Repeat for several.")
@click.option("--output", "outputs", multiple=True, metavar="NAME",
              help="A blob to return; repeat for several.  [default: the net's external outputs or, where it has none, "
                   "all that no operator reads]")
def export(name: str | None, out: Path, max_rows: int | None, seed: int | None, file: Path | None, external_data: bool,
           formats: tuple[str, ...], table_updates: str | None, tables: str | None, data: str | None,
           samples: int | None, json_path: Path | None, netdef: Path | None, init: Path | None,
           inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Write a model in other formats.

    NAME, a preset or a .toml file, is written as Caffe2 NetDefs (init, predict, train), as ONNX of these nets (predict
    and train, with functions and inlined), and as ONNX of the PyTorch modules (torch-onnx).

    Any other Caffe2 net (--netdef) is written as ONNX, with functions and inlined. What a training net updates is an
    input of the model, with the value that --init gives it as its default, and NAME.new among the outputs.

    For serving, --tables writes models that predict, of ONNX's own operators, whose tables have fewer bits: fp16; int8
    with a scale for each row; uint8-rowwise with a scale and a bias for each row, as in Caffe2. Rows become float32
    after they were looked up. Each is run beside the model of float32, and the differences are printed.
    """
    from tools.export import convert, run
    of_model = (max_rows, seed is not None, external_data, formats, table_updates, tables)
    of_net = (init, inputs, outputs)
    if (name is None) == (netdef is None):
        raise click.UsageError("name a model, or give a net with --netdef")
    if any(of_net if name else of_model):
        raise click.UsageError("--init, --input and --output are for --netdef; --max-rows, --seed, --external-data, "
                               "--format, --table-updates and --tables for models")
    if seed is not None and file:
        raise click.UsageError("give --seed or --parameters, not both")
    if table_updates and (tables or (formats and "onnx" not in formats)):
        raise click.UsageError("--table-updates is for the training step that --format onnx writes")
    if not tables and (data or samples or json_path):
        raise click.UsageError("--data, --samples and --json are for --tables")
    if tables:
        from tools.low_precision import run as run_low_precision
        lines = run_low_precision(_load(name, max_rows), out, tables, seed or 0, formats or ("onnx",), file,
                                  external_data, data or "random", samples or 4096, json_path)
    elif name:
        lines = run(_load(name, max_rows), out, seed or 0, formats or ("netdef", "onnx"), file, external_data,
                    table_updates == "rows")
    else:
        lines = convert(netdef, out, init, file, inputs, outputs)
    for line in lines:
        click.echo(line)


main.add_command(bench)


@main.group()
def engine() -> None:
    """Install and inspect genuine Caffe2, the engine that runs in a worker of its own."""


@engine.command("install", epilog=_example("dlrm engine install", "dlrm engine install --python /usr/bin/python3.9"))
@click.option("--python", "interpreter", type=click.Path(path_type=Path),
              help="A Python 3.7, 3.8 or 3.9.  [default: searched for]")
@click.option("--optional", is_flag=True, help="Where there is no such Python, say so and succeed.")
def engine_install(interpreter: Path | None, optional: bool) -> None:
    """Make the virtual environment of genuine Caffe2 (PyTorch 1.10.2; about 2 GB)."""
    from tools.engine import install
    install(interpreter, optional)


@engine.command("status", epilog=_example("dlrm engine status"))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the status as JSON to this file.")
def engine_status(json_path: Path | None) -> None:
    """Say which engines run here: builds, operators, BLAS path, threads."""
    from tools.engine import print_status
    print_status(json_path)


@engine.command("check", epilog=_example("dlrm engine check models/predict_net.pb models/model.onnx"))
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
def engine_check(paths: tuple[Path, ...]) -> None:
    """Check net files before they are run.

    NetDefs: that they parse, that every operator is known and well defined, and its inputs exist. Files that end in
    .onnx: that they parse, that their external data is there, that ONNX allows the model, and ONNX Runtime takes it.
    """
    from tools.engine import check_file
    for path in paths:
        click.echo(f"{path}: {check_file(path)}")
