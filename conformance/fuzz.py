"""A campaign of generated specs: each on every backend, the failing ones made as small as they get."""

import math
import shlex
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np

from conformance.generate import STEPS, Example
from conformance.result import BackendResult
from conformance.run import run_case
from conformance.shrink import shrink
from spec import toml
from spec.backend import Backend, load_backend
from spec.errors import EngineError
from spec.files import replacing
from spec.parameters import initial_state
from spec.reference import evaluate
from spec.tamper import for_many
from spec.update import update

_LARGEST = 2.0**120
"""Values above it may have partial sums above 2^128, which float32 lacks."""


@dataclass(frozen=True)
class Outcome:
    """What one backend made of one example. `problem`: why it does not conform; empty where it does. `beyond`: it does
    not, and neither could any other in float32."""

    backend: str
    tensors: int = 0
    elements: int = 0
    worst: float = 0.0
    problem: str = ""
    beyond: bool = False


@dataclass
class Tally:
    """A backend's outcomes, summed. `smallest` belongs to the first failure, `problem` to `smallest`; `beyond` counts
    the examples that leave float32's range, of which nothing else is counted."""

    examples: int = 0
    tensors: int = 0
    elements: int = 0
    worst: float = 0.0
    beyond: int = 0
    failing: list[str] = field(default_factory=list)
    smallest: Example | None = None
    problem: str = ""


def judge_example(example: Example, names: Sequence[str]) -> list[Outcome]:
    """Of each backend alone: an engine that refuses a spec or breaks is a finding as much as a wrong number."""
    return [_outcome(_kept_backend(name), example) for name in names]


@cache
def _kept_backend(name: str) -> Backend:
    """What takes long to start is started once in each process."""
    return for_many(load_backend(name))


def _outcome(backend: Backend, example: Example) -> Outcome:
    try:
        (result,) = run_case(example.case(), [backend], most_undecided=1).backends
    except Exception as error:
        problem = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        outcome = Outcome(backend.name, worst=math.inf, problem=problem)
    else:
        problem = "" if result.status == "conforms" else result.worst.summary() if result.worst else "no verdict"
        outcome = Outcome(backend.name, len(result.verdicts), result.elements, _worst(result), problem)
    return Outcome(backend.name, beyond=True) if outcome.problem and _beyond_float32(example) else outcome


def _beyond_float32(example: Example) -> bool:
    """Whether some value, as the model trains, is too large for float32: the spec promises nothing then."""
    case = example.case()
    held, state = case.parameters, initial_state(case.spec)
    for batch in [*case.batches, case.batches[0]]:
        evaluation = evaluate(case.spec, held, batch)
        new = update(case.spec, held, state, evaluation)
        values = [*(x.value for x in evaluation.tensors.values()), *(x.new.value for x in new.values())]
        if not all((np.abs(value) < _LARGEST).all() for value in values):
            return True
        for name, updated in new.items():
            array = (held if name in held else state)[name]
            array[slice(None) if updated.rows is None else updated.rows] = updated.new.value
    return False


def _worst(result: BackendResult) -> float:
    return max((math.inf if verdict.problem else verdict.worst for verdict in result.verdicts), default=0.0)


def campaign(examples: Sequence[Example], names: Sequence[str], jobs: int,
             progress: Callable[[str], None] = lambda message: None) -> Iterator[dict[str, Tally]]:
    """The tallies so far, by the names given, after every example: whoever stops listening has what was found.

    The first failure of each backend is made smaller at once, in which `progress` is told of no example.
    """
    tallies = {name: Tally() for name in names}
    for example, outcomes in _judged(examples, names, jobs):
        for name, outcome in zip(names, outcomes, strict=True):
            tally = tallies[name]
            tally.examples, tally.tensors = tally.examples + 1, tally.tensors + outcome.tensors
            tally.elements, tally.worst = tally.elements + outcome.elements, max(tally.worst, outcome.worst)
            tally.beyond += outcome.beyond
            if outcome.problem:
                tally.failing.append(example.spec.name)
                if tally.smallest is None:
                    progress(f"{name}: making {example.spec.name} smaller")
                    tally.smallest, tally.problem = _smallest(example, name)
        yield tallies


def _smallest(example: Example, name: str) -> tuple[Example, str]:
    backend = _kept_backend(name)
    smallest = shrink(example, lambda candidate: bool(_outcome(backend, candidate).problem))
    return smallest, _outcome(backend, smallest).problem


def _judged(examples: Sequence[Example], names: Sequence[str],
            jobs: int) -> Iterator[tuple[Example, list[Outcome]]]:
    """Each example with its outcomes, as they come."""
    judge = partial(judge_example, names=names)
    if jobs == 1:
        yield from ((example, judge(example)) for example in examples)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker) as pool:
        futures = {pool.submit(judge, example): example for example in examples}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise EngineError("a backend ended its process; find out which with --backend and --jobs 1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():  # what they are at may take a minute more, and nobody listens
                worker.terminate()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback


def coverage(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """How many examples have each option: what a campaign has seen."""
    def count(key: Callable[[Example], object]) -> dict[str, int]:
        return dict(sorted(Counter(str(key(example)) for example in examples).items()))

    return {
        "loss": count(lambda e: e.spec.loss.kind), "clip": count(lambda e: e.spec.loss.clip),
        "interaction": count(lambda e: e.spec.interaction.kind + (
            " with itself" if e.spec.interaction.self_interaction else "")),
        "optimizer": count(lambda e: e.spec.optimizer.kind),
        "pooling": dict(sorted(Counter(p for e in examples for p in {t.pooling for t in e.spec.tables}).items())),
        "tables": count(lambda e: _band(len(e.spec.tables))), "dimension": count(lambda e: _band(e.spec.embedding_dim)),
        "batch": count(lambda e: _band(e.spec.batch_size)), "bags": count(lambda e: e.data.bags),
        "indices": count(lambda e: e.data.indices), "dense": count(lambda e: e.data.dense),
        "labels": count(lambda e: e.data.labels)}


def _band(size: int) -> str:
    low = 1 << (size.bit_length() - 1)
    return f"{low:04}-{2 * low - 1:04}" if low > 1 else "0001"


def save(example: Example, folder: Path, name: str) -> tuple[Path, Path]:
    """A spec and its batch as files: (TOML, npz)."""
    spec_path, batch_path = folder / f"{name}.toml", folder / f"{name}.npz"
    toml.save(example.spec, spec_path)
    with replacing(batch_path) as temporary, temporary.open("wb") as file:
        np.savez(file, **example.batch().arrays())
    return spec_path, batch_path


def command(example: Example, spec_path: Path, batch_path: Path, name: str) -> str:
    """What judges a saved example again."""
    return shlex.join(["dlrm", "conform", str(spec_path), "--data", f"npz:{batch_path}", "--seed", str(example.seed),
                       "--optimizer", example.spec.optimizer.kind, "--steps", str(STEPS), "--backend", name])
