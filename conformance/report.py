"""What a conformance run found, as plain data: report.json, from which every other report is made."""

import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conformance.case import Case
from conformance.ledger import ledger
from conformance.machine import describe_machine
from conformance.plain import plain
from conformance.replay import Fault
from conformance.result import BackendResult, CaseResult, Section
from conformance.trajectory import MEMBERS, REACH
from conformance.verdict import RATIO_EDGES, TensorVerdict
from conformance.xfail import ExpectedFailures
from spec.files import write_text
from spec.graph import steps, update_steps
from spec.rounding import C, U

FORMAT = 2
"""Version of report.json. It rises when a reader would have to change."""


def as_dict(results: list[CaseResult], expected: ExpectedFailures | None = None) -> dict[str, Any]:
    """The whole run; numbers that JSON lacks (inf, nan) become strings. `expected`: as it was given to the run."""
    expected = expected or ExpectedFailures()
    return plain({
        "format": FORMAT,
        "product": f"dlrm-parity {version('dlrm-parity')}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "environment": describe_machine() | {"numpy": version("numpy")},
        "conforms": bool(results) and all(result.conforms for result in results) and not expected.broken,
        "bound": {"c": C, "u": U, "rule": "|error| <= c * sqrt(variance)"},
        "histogram_edges": RATIO_EDGES,
        "xfail": {"strict": expected.strict,
                  "entries": [asdict(entry) | {"passes": entry.passes} for entry in expected.entries]},
        "cases": [_case(result) for result in results],
    })


def write_json(report: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def _case(result: CaseResult) -> dict[str, Any]:
    case, spec, free = result.case, result.case.spec, result.free
    return {
        "spec": spec.name,
        "digest": spec.digest,
        "capped": spec.is_capped,
        "tables": len(spec.tables),
        "rows": sum(table.rows for table in spec.tables),
        "published_rows": sum(table.published_rows or table.rows for table in spec.tables),
        "batch_size": case.batches[0].size,
        "published_batch_size": spec.batch_size,
        "data": case.source,
        "seed": case.seed,
        "steps": len(case.batches) if case.optimizers else 0,
        "optimizers": list(case.optimizers),
        "graph": _graph(case),
        "trajectory": free and {"steps": len(free.batches), "batch_size": free.batches[0].size, "members": MEMBERS,
                                "reach": REACH},
        "conforms": result.conforms,
        "backends": [_backend(backend) for backend in result.backends],
        "pairs": [asdict(pair) | {"conforms": pair.conforms} for pair in result.pairs],
    }


def _graph(case: Case) -> dict[str, list[str]]:
    """What each tensor is computed from, in the order of computation; last what the optimizers update, each of which
    also reads itself."""
    graph = {name: list(sources) for name, sources in steps(case.spec).items()}
    for optimizer in case.optimizers:
        for name, sources in update_steps(case.under(optimizer)).items():
            graph[name] = list(dict.fromkeys((*graph.get(name, ()), *sources)))
    return graph


def _backend(result: BackendResult) -> dict[str, Any]:
    worst = result.worst
    return {
        "backend": result.backend, "status": result.status, "engine": result.engine, "trains": result.trains,
        "reason": result.reason, "remedy": result.remedy,
        "tensors": len(result.verdicts), "elements": result.elements,
        "worst": worst and _verdict(worst), "summary": worst.summary() if worst else "",
        "fault": result.fault and _fault(result.fault),
        "ledger": asdict(ledger(result)),
        "repeat": result.repeat and asdict(result.repeat) | {"broken": result.repeat.broken},
        "sections": [_section(section) for section in result.sections],
        "trajectories": [_section(section) for section in result.trajectories],
    }


def _section(section: Section) -> dict[str, Any]:
    return {"optimizer": section.optimizer, "steps": section.steps, "learning_rate": section.learning_rate,
            "kinks": section.kinks, "required": section.required,
            "tensors": [_verdict(verdict) for verdict in section.tensors]}


def _fault(fault: Fault) -> dict[str, Any]:
    return asdict(fault) | {"verdict": _verdict(fault.verdict), "summary": fault.summary()}


def _verdict(verdict: TensorVerdict) -> dict[str, Any]:
    """`summary` says what is wrong; empty where it conforms."""
    return asdict(verdict) | {"conforms": verdict.conforms, "summary": "" if verdict.conforms else verdict.summary()}
