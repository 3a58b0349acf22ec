"""Judging results that a foreign program wrote, against a bundle (BUNDLE.md).

    python -m conformance.judge BUNDLE [RESULTS ...]

Every bundle holds a copy of this file, `python BUNDLE/judge.py [RESULTS ...]`, which must run where there is NumPy and
nothing else; hence argparse, and a report of plain lines.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conformance.bundle import RESULTS, Bundle, open_bundle
from conformance.plain import plain
from conformance.verdict import TensorVerdict, judge, judge_fixed, judge_rows, judge_update, missing, unfit
from spec.errors import InputError
from spec.files import write_text

FORMAT = 1
"""Version of the judge's own JSON report."""

_UNREADABLE = (ValueError, TypeError, SyntaxError, EOFError, OSError, MemoryError, OverflowError)


class _Expected(NamedTuple):
    """What a tensor should be, and how far off each element may be: float64. `rows`: which of it, None is all.

    It stands for Tracked, RowGradient and Updated, which the live suite judges by.
    """

    value: np.ndarray
    reach: np.ndarray
    rows: np.ndarray | None

    @property
    def gradient(self) -> "_Expected":
        return self

    @property
    def new(self) -> "_Expected":
        return self


@dataclass
class Judgement:
    """One program's results.

    Attributes:
        sections: verdicts by optimizer, merged over its steps; under None those of forward and backward.
        left_out: the bundle's cases that were not asked for.
    """

    name: str
    sections: dict[str | None, list[TensorVerdict]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> list[TensorVerdict]:
        return [verdict for verdicts in self.sections.values() for verdict in verdicts]

    @property
    def elements(self) -> int:
        return sum(verdict.elements for verdict in self.verdicts)

    @property
    def conforms(self) -> bool:
        """Something was compared, and all of it conforms."""
        return self.elements > 0 and all(verdict.conforms for verdict in self.verdicts)


def judge_results(bundle: Bundle, results: Path, groups: Sequence[str] = ()) -> Judgement:
    """Judge `results`/CASE/TENSOR.npy for all cases of the bundle, or for those of `groups` alone.

    A group is "forward", "backward" or an optimizer. Whatever is wrong with a result is a verdict; raises
    InputError only where there is no folder of results.
    """
    if not results.is_dir():
        raise InputError(str(results), "a folder of results", "none", f"see BUNDLE.md in {bundle.folder}")
    judgement = Judgement(results.resolve().name)
    for case in bundle.manifest["cases"]:
        if groups and case["group"] not in groups:
            judgement.left_out.append(case["name"])
            continue
        merged = {verdict.tensor: verdict for verdict in judgement.sections.get(case["optimizer"], [])}
        for tensor in case["tensors"]:
            verdict = _judge_tensor(bundle, results / case["name"], tensor, case["step"])
            verdict.step = case["step"]
            known = merged.get(verdict.tensor)
            merged[verdict.tensor] = known.merge(verdict) if known else verdict
        judgement.sections[case["optimizer"]] = list(merged.values())
    return judgement


def _judge_tensor(bundle: Bundle, folder: Path, tensor: dict[str, Any], step: int) -> TensorVerdict:
    name, phase = tensor["name"], tensor["phase"]
    if tensor["kind"] == "slice":
        return _judge_slice(bundle, folder, tensor)
    result = read_result(folder / f"{name}.npy")
    if isinstance(result, str):
        return missing(name, phase, result)
    if tensor["kind"] == "whole":
        return judge(name, phase, result, _expected(bundle, tensor))
    before = bundle.read(tensor["before"])
    if tensor["kind"] == "update":
        return judge_update(name, before, result, _expected(bundle, tensor), step)
    return judge_fixed(name, before, result)


def _judge_slice(bundle: Bundle, folder: Path, tensor: dict[str, Any]) -> TensorVerdict:
    """A sparse gradient, as TENSOR_indices and TENSOR_values or as one dense TENSOR."""
    name = tensor["name"]
    dense = folder / f"{name}.npy"
    parts = [folder / f"{name}_{part}.npy" for part in ("indices", "values")]
    if dense.exists() and any(part.exists() for part in parts):
        return missing(name, "backward", "both a dense gradient and a slice: write one of them")
    read = [read_result(path) for path in ([dense] if dense.exists() else parts)]
    for result in read:
        if isinstance(result, str):
            return missing(name, "backward", result)
    if len(read) == 1:
        if problem := unfit(read[0], tuple(tensor["shape"])):
            return missing(name, "backward", problem)
        rows = np.flatnonzero((read[0] != 0).reshape(len(read[0]), -1).any(1))
        read = [rows, read[0][rows]]
    return judge_rows(name, *read, _expected(bundle, tensor))


def _expected(bundle: Bundle, tensor: dict[str, Any]) -> _Expected:
    rows = bundle.read(tensor["rows"]) if tensor["rows"] else None
    return _Expected(bundle.read(tensor["value"]), bundle.read(tensor["bound"]).astype(np.float64), rows)


def read_result(path: Path) -> np.ndarray | str:
    """The array, or why there is none."""
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        return f"no file {path.parent.name}/{path.name}"
    except _UNREADABLE as error:
        return f"{path.parent.name}/{path.name} is no .npy file of numbers ({type(error).__name__})"


def as_dict(bundle: Bundle, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The JSON report."""
    facts = bundle.manifest
    return plain({
        "format": FORMAT,
        "bundle": {key: facts[key] for key in ("format", "version", "product", "spec", "digest", "data", "seed")},
        "conforms": all(judgement.conforms for judgement in judgements),
        "results": [
            {"name": judgement.name, "conforms": judgement.conforms, "elements": judgement.elements,
             "cases_left_out": judgement.left_out,
             "sections": [{"optimizer": optimizer,
                           "tensors": [asdict(verdict) | {"conforms": verdict.conforms} for verdict in verdicts]}
                          for optimizer, verdicts in judgement.sections.items()]}
            for judgement in judgements],
    })


def _lines(judgement: Judgement) -> list[str]:
    failing = [(optimizer, verdict) for optimizer, verdicts in judgement.sections.items() for verdict in verdicts
               if not verdict.conforms]
    left_out = f"; not judged: {', '.join(judgement.left_out)}" if judgement.left_out else ""
    if judgement.conforms:
        worst = max(judgement.verdicts, key=lambda verdict: verdict.worst)
        vague = [verdict.tensor for verdict in judgement.verdicts
                 if verdict.null_ratio is not None and verdict.null_ratio <= 1]
        proves_little = f"; proves nothing for {', '.join(vague)}, where a null result would pass" if vague else ""
        return [f"{judgement.name} conforms: {len(judgement.verdicts)} tensors, {judgement.elements:,} elements; "
                f"worst error / bound {worst.worst:.3g} at {worst.tensor}{left_out}{proves_little}"]
    lines = [f"{judgement.name} does not conform: {len(failing)} of {len(judgement.verdicts)} tensors{left_out}"]
    lines += [f"  {optimizer or verdict.phase}: {verdict.summary()}" for optimizer, verdict in failing[:10]]
    return lines + ([f"  ... and {len(failing) - 10} more"] if len(failing) > 10 else [])


def main(arguments: Sequence[str] | None = None, bundle: Path | None = None) -> int:
    """The command; its exit status: 0 all conforms, 1 something does not, 2 bad input. `bundle`: that of this copy."""
    parser = argparse.ArgumentParser(
        prog="judge.py" if bundle else "python -m conformance.judge",
        description="Judge results against a bundle. Exit status: 0 they conform, 1 they do not, 2 bad input.",
        epilog="The format, and what a program must write, is in BUNDLE.md.")
    if bundle is None:
        parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("results", type=Path, nargs="*", help=f"folders of results (default: all in BUNDLE/{RESULTS})")
    parser.add_argument("--only", action="append", default=[], metavar="GROUP",
                        help="judge these cases alone: forward, backward or an optimizer; may be repeated")
    parser.add_argument("--json", type=Path, help="write the report as JSON to this file")
    options = parser.parse_args(arguments)
    try:
        opened = open_bundle(bundle or options.bundle)
        groups = list(dict.fromkeys(case["group"] for case in opened.manifest["cases"]))
        for group in options.only:
            if group not in groups:
                raise InputError(f"--only {group}", f"one of {', '.join(groups)}", "no such cases", "correct it")
        judgements = [judge_results(opened, folder, options.only)
                      for folder in options.results or opened.result_folders()]
        if options.json:
            write_text(options.json, json.dumps(as_dict(opened, judgements), indent=1, allow_nan=False) + "\n")
    except InputError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for judgement in judgements:
        print("\n".join(_lines(judgement)))
    return 0 if all(judgement.conforms for judgement in judgements) else 1


if __name__ == "__main__":
    sys.exit(main())
