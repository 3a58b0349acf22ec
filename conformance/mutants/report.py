"""The mutation score as plain data and as a page of Markdown."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conformance.mutants.score import Outcome, Score
from spec.files import write_text

FORMAT = 1
"""Version of the JSON report."""

PHASES = ("forward", "backward", "update", "data", "precision")


def as_dict(outcomes: Sequence[Outcome], alarms: Sequence[dict[str, Any]], engines: dict[str, str],
            command: str) -> dict[str, Any]:
    """`outcomes` of mutants and of controls; `alarms`: what `tools.mutants` ran in processes of their own, each with
    spec, backend, control and conforms; `command` is what made it."""
    mutants = [outcome for outcome in outcomes if outcome.mutant.phase != "correct"]
    controls = [{"spec": o.spec, "backend": o.backend, "control": f"{o.mutant.name}: {o.mutant.what}",
                 "conforms": o.status != "killed", "summary": o.summary}
                for o in outcomes if o.mutant.phase == "correct" and o.status != "absent"]
    controls += alarms
    score = Score.of(mutants)
    return {
        "format": FORMAT, "product": f"dlrm-parity {version('dlrm-parity')}", "command": command, "engines": engines,
        "score": _score(mutants), "false_alarms": sum(not control["conforms"] for control in controls),
        "passes": score.survived == 0 and all(control["conforms"] for control in controls),
        "phases": {phase: {backend: _score(o for o in mutants if (o.mutant.phase, o.backend) == (phase, backend))
                           for backend in engines} for phase in PHASES},
        "specs": list(dict.fromkeys(o.spec for o in outcomes)),
        "mutants": [_outcome(outcome) for outcome in mutants], "controls": controls}


def write_json(report: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def _score(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    score = Score.of(outcomes)
    return asdict(score) | {"share": score.share}


def _outcome(outcome: Outcome) -> dict[str, Any]:
    mutant = outcome.mutant
    return {"spec": outcome.spec, "backend": outcome.backend, "mutant": mutant.name, "phase": mutant.phase,
            "what": mutant.what, "tensor": mutant.tensor or ", ".join(mutant.named), "optimizer": mutant.optimizer,
            "corner": mutant.corner is not None, "inside": outcome.inside, "status": outcome.status,
            "reason": outcome.reason, "fault": outcome.fault, "localised": outcome.localised,
            "summary": outcome.summary}


def page(report: dict[str, Any]) -> str:
    """MUTANTS.md: the score, the table of all mutants, and what needs a word."""
    score = report["score"]
    lines = [
        "# Seeded faults, and what the suite makes of them", "",
        f"Made by `{report['command']}` ({report['product']}); made again, it changes where the suite does.", "",
        f"**{score['killed']:,} of {score['killed'] + score['survived']:,} faults that make a difference are caught "
        f"({score['share']:.1%}); {score['survived']} survive, {score['equivalent']} make no difference.** "
        f"Of {score['localisable']:,} caught faults whose operator is known, {score['localised']:,} "
        f"({score['localised'] / max(score['localisable'], 1):.1%}) are called by its name. "
        f"**{report['false_alarms']} false alarms in {len(report['controls']):,} runs of correct variants.**", "",
        "A fault counts once for each backend and spec. It is put inside the PyTorch modules (in place of a tensor, or",
        "of its gradient) or the net (in place of what one operator makes, on every engine alike), so that all that is",
        "behind it follows from it; of any other backend it changes what goes in and what comes out.",
        "Each run compares one trace, and two steps where the fault is the optimizer's, and ends at the first failure.",
        "Faults that need an operator which the spec has not (a clip, a ragged mean) are tried on the spec with it.",
        "", *(f"- `{name}`: {engine}" for name, engine in report["engines"].items()), "",
        "## By phase", "", "caught / make a difference (called by the right name / of known operator)", "",
        _row(["phase", *report["engines"]]), _row(["---"] * (1 + len(report["engines"])))]
    for phase, by_backend in report["phases"].items():
        cells = (f"{s['killed']} / {s['killed'] + s['survived']} ({s['localised']} / {s['localisable']})"
                 if s["killed"] + s["survived"] else "·" for s in by_backend.values())
        lines.append(_row([phase, *cells]))
    lines += ["", "## Every fault", "",
              "✓ caught, and called by its name where that is known; (✓) caught, and another operator named first;",
              "✗ survives; = makes no difference; · the backend does nothing of the kind. ° on parameters made for it,",
              "where random ones would reach the place by chance alone.", "",
              f"One mark for each spec: {', '.join(report['specs'])}.", "",
              _row(["fault", "what", "operator that makes", *report["engines"]]),
              _row(["---"] * (3 + len(report["engines"])))]
    for name in dict.fromkeys(entry["mutant"] for entry in report["mutants"]):
        entries = [entry for entry in report["mutants"] if entry["mutant"] == name]
        first = entries[0]
        marks = (" ".join(_mark(entry) for entry in entries if entry["backend"] == backend)
                 for backend in report["engines"])
        lines.append(_row([f"`{name}`{'°' * first['corner']}", first["what"], _code(first["tensor"]), *marks]))
    entries = report["mutants"]
    lines += _remarks("Survivors", [e for e in entries if e["status"] == "survived"], "what")
    lines += _remarks("Faults that make no difference", [e for e in entries if e["status"] == "equivalent"], "reason")
    lines += _remarks("Caught, and another operator named first", [e for e in entries if e["localised"] is False],
                      "fault")
    lines += ["", "## Correct variants", "",
              "What must pass: other orders of summation, other threads and vector instructions, other orders of "
              "samples, results of more digits.", "", _row(["variant", "backends", "specs", "false alarms"]),
              _row(["---"] * 4)]
    for control in dict.fromkeys(c["control"] for c in report["controls"]):
        runs = [c for c in report["controls"] if c["control"] == control]
        lines.append(_row([control, ", ".join(dict.fromkeys(c["backend"] for c in runs)),
                           ", ".join(dict.fromkeys(c["spec"] for c in runs)), sum(not c["conforms"] for c in runs)]))
    return "\n".join(lines) + "\n"


def _mark(entry: dict[str, Any]) -> str:
    if entry["status"] == "killed":
        return "(✓)" if entry["localised"] is False else "✓"
    return {"survived": "✗", "equivalent": "=", "absent": "·"}[entry["status"]]


def _remarks(title: str, entries: Sequence[dict[str, Any]], key: str) -> list[str]:
    """One line for each fault and what its `key` says, with the backends of which it is said."""
    said: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        said.setdefault((entry["mutant"], entry[key]), []).append(f"{entry['backend']} on {entry['spec']}")
    lines = [f"- `{name}` ({'; '.join(where)}): {text}" for (name, text), where in said.items()]
    return ["", f"## {title}", "", *lines] if lines else []


def _code(text: str) -> str:
    return f"`{text}`" if text else "none in particular"


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
