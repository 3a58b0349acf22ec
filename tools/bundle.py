"""`dlrm conform --write-bundle` and `--bundle`: cases and results as files."""

from collections.abc import Sequence
from pathlib import Path

import click

from conformance.bundle import RESULTS, open_bundle
from conformance.bundle_writer import bundle_bytes, make_bundle_case, write_bundle
from conformance.foreign import run_bundle
from conformance.xfail import load_expected_failures
from spec.model import ModelSpec
from tools.conform import Outputs, publish

_LARGE = 100e6
"""Bytes from which a bundle's size is announced before it is written."""


def write(spec: ModelSpec, optimizers: Sequence[str], steps: int, batch_size: int | None, source: str, seed: int,
          folder: Path) -> None:
    """Write a bundle and say what is in it. Raises InputError for bad data and a folder that can't be written."""
    case, passed_over = make_bundle_case(spec, source, seed, batch_size, steps, tuple(optimizers))
    if (size := bundle_bytes(case)) > _LARGE:
        click.echo(f"{folder}: about {size / 1e6:,.0f} MB; --max-rows and --batch-size make it smaller", err=True)
    manifest = write_bundle(case, passed_over, folder)
    written = sum(facts["bytes"] for facts in manifest["files"].values())
    samples = f"{manifest['samples']} samples a batch"
    if passed_over:
        samples += f" ({passed_over} passed over, at kinks)"
    click.echo(f"{folder}: {len(manifest['cases'])} cases, {samples}, {len(manifest['files'])} files, "
               f"{written / 1e6:,.1f} MB")
    click.echo(f"Write results to {folder / RESULTS}/NAME as {folder / 'BUNDLE.md'} says, then: "
               f"python {folder / 'judge.py'}, or dlrm conform --bundle {folder}")


def judge(folder: Path, names: Sequence[str], outputs: Outputs, xfail: Path | None) -> bool:
    """Judge results beside a bundle, print and write the reports; True when all of them conform.

    Raises InputError for a bundle that is not whole and for results that are not there.
    """
    expected = load_expected_failures(xfail) if xfail else None
    outputs.check()
    return publish([run_bundle(open_bundle(folder), names, expected)], outputs, expected)
