"""What the workers of a group share, on disk: parameters, batches, and predictions that are right."""

from itertools import islice
from pathlib import Path

import numpy as np

from spec.data import open_batches
from spec.errors import InputError
from spec.parameters import initial_parameter, parameter_shapes
from tools.bench.checking import expected_probability
from tools.bench.floor import Work, work
from tools.bench.plan import Group, Setting


class Share:
    """Files in `folder`: {parameter}.npy, which workers map into memory and so have once for all of them; for each
    batch size `distinct` batches.

    Raises InputError for bad data, and where the disk is full.
    """

    def __init__(self, folder: Path, group: Group, source: str, seed: int, distinct: int) -> None:
        self.folder = folder
        self._group, self._source, self._seed, self._distinct = group, source, seed, distinct
        self._work: dict[Setting, Work] = {}
        self._expected: dict[int, str] = {}
        try:
            for name in parameter_shapes(group.spec):
                np.save(folder / f"{name}.npy", initial_parameter(group.spec, name, seed))
            for size in dict.fromkeys(setting.batch_size for setting in group.settings):
                self._write_batches(size)
        except OSError as error:
            raise InputError(str(folder), "room for the parameters and batches", error.strerror,
                             "point TMPDIR to a larger disk, or cap the tables with --max-rows") from None

    def batches(self, size: int) -> list[str]:
        return [str(self.folder / f"batch.{size}.{number}.npz") for number in range(self._distinct)]

    def expected(self, size: int) -> str:
        """The reference's prediction for the first samples of the first batch: value and variance."""
        return str(self.folder / f"expected.{size}.npz")

    def work(self, setting: Setting) -> Work:
        return self._work[setting]

    def _write_batches(self, size: int) -> None:
        spec = self._group.spec
        batches = list(islice(open_batches(self._source, spec, size, self._seed), self._distinct))
        for batch, path in zip(batches, self.batches(size), strict=True):
            batch.validate(spec)
            np.savez(path, **batch.arrays())
        for setting in self._group.settings:
            if setting.batch_size == size:
                self._work[setting] = work(spec, batches, setting.mode == "training")
        parameters = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in parameter_shapes(spec)}
        expected = expected_probability(spec, parameters, batches[0])
        np.savez(self.expected(size), value=expected.value, variance=expected.variance)
