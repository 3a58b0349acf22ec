"""The process of one backend: `python -m tools.bench.worker`. Requests come on stdin, replies go to stdout, each a
line of JSON; process.py is the other end. It does nothing between two requests, and ends with its stdin.

    judge    backend, spec, batch_size, training, seed   the suite's verdict, see checking.py
    load     backend, spec, folder        make the model, with the parameters in folder/NAME.npy
    verify   batches, expected            the prediction for the first batch, held against the reference's
    run      mode, batches, iterations    seconds of each iteration; the batches take turns
    profile  mode, batches                seconds in each operator, the median of PROFILES
    ceiling  name, rows, width            FLOP/s and bytes/s of one of the entry points `dlrm.ceilings`

`batches` are paths of .npz files, which are read once. A failure is answered {"error": text}.
"""

import contextlib
import gc
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from spec.backend import Model, load_backend
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import parameter_shapes
from spec.rounding import Tracked
from tools.bench import checking
from tools.bench.ceilings import measure_ceiling

PROFILES = 3


class Worker:
    """Each method that a request can name takes its fields and returns the reply."""

    def __init__(self) -> None:
        self._spec: ModelSpec | None = None
        self._model: Model | None = None
        self._batches: dict[str, Batch] = {}
        self._next = 0

    def judge(self, backend: str, spec: dict, batch_size: int, training: bool, seed: int) -> dict[str, Any]:
        return checking.judge_backend(load_backend(backend), ModelSpec.model_validate(spec), batch_size, training, seed)

    def load(self, backend: str, spec: dict, folder: str) -> dict[str, Any]:
        self._spec = ModelSpec.model_validate(spec)
        start = time.perf_counter()
        # Copy on write: engines that share what they are given change their own pages alone.
        parameters = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="c")
                      for name in parameter_shapes(self._spec)}
        self._model = load_backend(backend).create(self._spec, parameters)
        del parameters
        gc.collect()
        return {"engine": self._model.engine, "threads": self._model.threads, "seconds": time.perf_counter() - start}

    def verify(self, batches: list[str], expected: str) -> dict[str, Any]:
        with np.load(expected) as arrays:
            tracked = Tracked(arrays["value"], arrays["variance"])
        return {"wrong": checking.judge_prediction(self._model, self._read(batches)[0], tracked)}

    def run(self, mode: str, batches: list[str], iterations: int) -> dict[str, Any]:
        loaded = self._read(batches)
        step = self._model.train_step if mode == "training" else self._model.predict
        seconds, result = [], None
        for _ in range(iterations):
            batch = loaded[self._next % len(loaded)]
            self._next += 1
            start = time.perf_counter()
            result = step(batch)
            seconds.append(time.perf_counter() - start)
        if not np.isfinite(result).all():
            raise FloatingPointError(f"{mode} ended in NaN or infinity; what is timed then is not the model")
        return {"seconds": seconds}

    def profile(self, mode: str, batches: list[str]) -> dict[str, Any]:
        batch = self._read(batches)[0]
        profiles = [self._model.profile(batch, mode == "training") for _ in range(PROFILES)]
        names = dict.fromkeys(name for profile in profiles for name in profile)
        return {"seconds": {name: statistics.median(profile.get(name, 0.0) for profile in profiles) for name in names}}

    def ceiling(self, name: str, rows: int, width: int) -> dict[str, Any]:
        return measure_ceiling(name, rows, width)

    def _read(self, paths: list[str]) -> list[Batch]:
        for path in paths:
            if path not in self._batches:
                with np.load(path) as arrays:
                    self._batches[path] = Batch.from_arrays(self._spec, dict(arrays))
        return [self._batches[path] for path in paths]

    def close(self) -> None:
        if self._model:
            self._model.close()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what engines print is no reply
    worker = Worker()
    with contextlib.closing(worker):
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = getattr(worker, request.pop("do"))(**request)
            except Exception as error:  # whatever an engine raises belongs to its backend alone
                reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]}
            replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
