"""What a benchmark found, as plain data: bench.json, from which tables, page and comparison are made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spec.errors import InputError
from spec.files import write_text
from tools.bench import operators
from tools.bench.group import Result, Timing
from tools.bench.statistics import paired_ratio, spread

FORMAT = 1
"""Version of bench.json. It rises when a reader would have to change."""

Report = dict[str, Any]


def as_dict(results: Sequence[Result], baseline: str, machine: Mapping[str, Any], options: Mapping[str, Any],
            ceilings: Sequence[Mapping[str, Any]]) -> Report:
    """The whole run. `ceilings`: one entry for each (threads, rows, width), see ceilings.py."""
    return {"format": FORMAT, "product": f"dlrm-parity {version('dlrm-parity')}", "machine": dict(machine),
            "options": dict(options), "baseline": baseline, "ceilings": [dict(ceiling) for ceiling in ceilings],
            "results": [_result(result, baseline, ceilings) for result in results]}


def write_json(report: Report, path: Path) -> None:
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Report:
    """Raises InputError for what is no bench.json of this format."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise InputError(str(path), "a file that `dlrm bench --json` wrote", error.strerror, "check the path") from None
    except ValueError as error:
        raise InputError(str(path), "JSON", error, "name a file that `dlrm bench --json` wrote") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or "results" not in report:
        found = report.get("format", "none") if isinstance(report, dict) else "no object"
        raise InputError(str(path), f"a benchmark of format {FORMAT}", found, "measure again with this version")
    return report


def _result(result: Result, baseline: str, ceilings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    spec, setting = result.group.spec, result.setting
    floor = _floor(result, ceilings)
    base = next((timing.rounds for timing in result.timings if timing.backend == baseline), [])
    return {
        "spec": spec.name, "digest": spec.digest, "capped": spec.is_capped, "tables": len(spec.tables),
        "rows": sum(table.rows for table in spec.tables),
        "published_rows": sum(table.published_rows or table.rows for table in spec.tables),
        "optimizer": spec.optimizer.kind, "point": asdict(result.group.point) if result.group.point else None,
        "mode": setting.mode, "batch_size": setting.batch_size, "threads": result.group.threads,
        "flop": result.work.flop, "bytes": result.work.bytes, "floor": floor, "idle": result.idle,
        "backends": [_backend(timing, setting.batch_size, base, floor) for timing in result.timings],
    }


def _floor(result: Result, ceilings: Sequence[Mapping[str, Any]]) -> float | None:
    for ceiling in ceilings:
        if (ceiling["threads"], ceiling["spec"]) == (result.group.threads, result.group.spec.digest):
            return result.work.seconds(ceiling["gemm"], ceiling["gather"])
    return None


def _backend(timing: Timing, batch_size: int, baseline: Sequence[float], floor: float | None) -> dict[str, Any]:
    content = asdict(timing) | {"breakdown": None, "unmapped": [], "median": None, "quartiles": None, "ratio": None,
                                "samples_per_second": None, "over_floor": None,
                                "disturbed": None}
    if timing.status != "timed":
        return content
    median, low, high = spread(timing.rounds)
    content["disturbed"] = spread(timing.others).value
    content |= {"median": median, "quartiles": [low, high], "samples_per_second": batch_size / median}
    if baseline:
        content["ratio"] = list(paired_ratio(timing.rounds, baseline))
    if floor:
        content["over_floor"] = median / floor
    if timing.operators:
        content |= {"breakdown": operators.breakdown(timing.operators),
                    "unmapped": operators.unmapped(timing.operators)}
    return content
