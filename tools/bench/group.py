"""One group: a process for each backend, all of them loaded with the same parameters, and the rounds.

In a round every backend has one turn, in an order drawn anew. A turn begins with an iteration that is not counted,
since the caches hold what the one before left there. The others are idle meanwhile, and it is measured that they are.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spec.backend import Backend
from spec.errors import EngineError
from spec.model import ModelSpec
from tools.bench.floor import Work
from tools.bench.plan import Effort, Group, Judged, Setting, check_room
from tools.bench.process import WorkerProcess
from tools.bench.quiet import DISTURBED, Meter, wait_until_quiet
from tools.bench.share import Share

Progress = Callable[[str], None]


@dataclass
class Timing:
    """What one backend did in one setting.

    Attributes:
        status: "timed"; or why there is no time: "missing", "does not conform", "fails", "cannot train".
        reason, remedy: in words, where it is not timed.
        rounds: seconds of an iteration, the median of each round.
        iterations: of a turn.
        others: the share of all cores that other programs took, in each round.
        cores: processor time over time, within turns.
        memory: resident bytes of the worker, and of the engine's own processes, at their highest in the rounds.
        operators: seconds by the keys of `Model.profile`.
    """

    backend: str
    status: str = "timed"
    reason: str = ""
    remedy: str = ""
    engine: str = ""
    verdict: dict[str, Any] | None = None
    rounds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    iterations: int = 0
    cores: float = 0.0
    memory: int = 0
    operators: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """One setting. `idle`: processor time that the waiting processes took, over the time of all turns."""

    group: Group
    setting: Setting
    work: Work
    timings: list[Timing]
    idle: float


@dataclass
class Contestant:
    """A process that takes part in the rounds. `used`: processor time of its turns, which took `wall` seconds."""

    process: WorkerProcess
    timing: Timing
    used: float = 0.0
    wall: float = 0.0

    @property
    def running(self) -> bool:
        return self.timing.status == "timed"


def run_group(group: Group, backends: Mapping[str, Backend], effort: Effort, judged: Judged, source: str, seed: int,
              profile: bool, progress: Progress) -> Iterator[Result]:
    """One Result for each setting. `backends` by what `spec.backend.load_backend` takes.

    Raises InputError for bad data, and where there is no room for the parameters.
    """
    here = {name: backend for name, backend in backends.items() if backend.available().ok}
    check_room(group, len(here))
    with TemporaryDirectory(prefix="dlrm-bench-") as folder, ExitStack() as stack:
        progress(f"{group.spec.name}: parameters and batches")
        share = Share(Path(folder), group, source, seed, effort.distinct_batches)
        loaded: dict[str, tuple[WorkerProcess | None, Timing]] = {}
        for name, backend in backends.items():
            process = stack.enter_context(WorkerProcess(backend.name, group.threads)) if name in here else None
            loaded[name] = process, (
                load_worker(group, name, backend, process, share, judged, seed, progress) if process else
                _missing(backend))
        for setting in group.settings:
            where = f"{group.spec.name}, {setting.mode}, batch {setting.batch_size}"
            contestants = []
            for name, backend in backends.items():
                process, state = loaded[name]
                timing = Timing(backend.name, state.status, state.reason, state.remedy, state.engine, state.verdict)
                if timing.status == "timed" and setting.mode == "training" and not backend.trains:
                    timing.status, timing.reason = "cannot train", "this backend predicts only"
                contestants.append(Contestant(process, timing))
            idle = run_rounds(setting.mode, share.batches(setting.batch_size), contestants, effort, seed,
                              lambda what, where=where: progress(f"{where}: {what}"))
            for (name, (process, _)), contestant in zip(list(loaded.items()), contestants, strict=True):
                if contestant.running and profile:
                    _profile(setting, contestant, share, progress)
                if contestant.timing.status == "fails":
                    loaded[name] = process, contestant.timing
            yield Result(group, setting, share.work(setting), [each.timing for each in contestants], idle)


def _missing(backend: Backend) -> Timing:
    state = backend.available()
    return Timing(backend.name, "missing", state.reason, state.remedy)


def load_worker(group: Group, name: str, backend: Backend, process: WorkerProcess, share: Share, judged: Judged | None,
                seed: int, progress: Progress, verified: bool = True) -> Timing:
    """Judge the backend, load the model into its process, and verify a prediction. "timed": it may be.

    Without `judged` the prediction alone is held against the reference; what is not `verified` either predicts nothing.
    """
    timing = Timing(backend.name)
    spec, sizes = group.spec, sorted({setting.batch_size for setting in group.settings})
    training = backend.trains and any(setting.mode == "training" for setting in group.settings)
    with _blamed(timing):
        for size in dict.fromkeys(min(size, judged.samples) for size in sizes) if judged else ():
            progress(f"{spec.name}: judging {backend.name}")
            timing.verdict = process.ask("judge", backend=name, spec=_plain(spec.capped(judged.rows)),
                                         batch_size=size, training=training, seed=seed)
            if not timing.verdict["conforms"]:
                timing.status, timing.reason = "does not conform", timing.verdict["reason"]
                return timing
        progress(f"{spec.name}: loading {backend.name}")
        loaded = process.ask("load", backend=name, spec=_plain(spec), folder=str(share.folder))
        timing.engine = loaded["engine"]
        if loaded["threads"] != group.threads:
            timing.status, timing.remedy = "fails", "ask for no more threads than there are cores"
            timing.reason = f"{group.threads} threads were asked for, and its engine has {loaded['threads']}"
            return timing
        for size in sizes if verified else ():
            wrong = process.ask("verify", batches=share.batches(size)[:1], expected=share.expected(size))["wrong"]
            if wrong:
                timing.status, timing.reason = "does not conform", f"batch of {size}: {wrong}"
                return timing
    return timing


def run_rounds(mode: str, batches: list[str], contestants: Sequence[Contestant], effort: Effort, seed: int,
               progress: Progress) -> float:
    """Time those that run; returned is what the waiting ones took of the processor meanwhile."""
    for contestant in contestants:
        if contestant.running:
            progress(f"warming up {contestant.timing.backend}")
            with _blamed(contestant.timing):
                warm = contestant.process.ask("run", mode=mode, batches=batches, iterations=effort.distinct_batches + 1)
                contestant.timing.iterations = effort.turn(statistics.median(warm["seconds"][1:]))
                contestant.process.forget_peak()
    order, idle = random.Random(seed), 0.0
    for _ in range(effort.rounds):
        turns = [contestant for contestant in contestants if contestant.running]
        for contestant in order.sample(turns, len(turns)):
            progress(contestant.timing.backend)
            with _blamed(contestant.timing):
                idle += _turn(mode, batches, contestant, [other for other in turns if other is not contestant],
                              effort.patience)
    for contestant in contestants:
        if contestant.running:
            contestant.timing.cores = contestant.used / contestant.wall
            contestant.timing.memory = contestant.process.peak_memory()
    wall = sum(contestant.wall for contestant in contestants)
    return idle / wall if wall else 0.0


def _turn(mode: str, batches: list[str], contestant: Contestant, waiting: Sequence[Contestant],
          patience: float) -> float:
    """Adds a round to the contestant's timing; the processor time of those who wait is returned."""
    processes = [each.process for each in (contestant, *waiting)]

    def used() -> list[float]:
        return [process.processor_seconds() for process in processes]

    while True:
        patience = wait_until_quiet(lambda: sum(used()), patience)
        before, start, meter = used(), time.perf_counter(), Meter(lambda: sum(used()))
        seconds = contestant.process.ask("run", mode=mode, batches=batches,
                                         iterations=1 + contestant.timing.iterations)["seconds"]
        wall, others = time.perf_counter() - start, meter.others()
        if others < DISTURBED or patience < wall:
            break
        patience -= wall
    own, *waited = (after - since for after, since in zip(used(), before, strict=True))
    contestant.timing.rounds.append(statistics.median(seconds[1:]))
    contestant.timing.others.append(others)
    contestant.used += own
    contestant.wall += wall
    return sum(waited)


def _profile(setting: Setting, contestant: Contestant, share: Share, progress: Progress) -> None:
    progress(f"profiling {contestant.timing.backend}")
    with _blamed(contestant.timing):
        contestant.timing.operators = contestant.process.ask(
            "profile", mode=setting.mode, batches=share.batches(setting.batch_size))["seconds"]


@contextmanager
def _blamed(timing: Timing) -> Iterator[None]:
    """An engine that fails ends its own timing and no other's."""
    try:
        yield
    except EngineError as error:
        timing.status, timing.reason = "fails", str(error)
        timing.rounds.clear()
        timing.others.clear()


def _plain(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_none=True)
