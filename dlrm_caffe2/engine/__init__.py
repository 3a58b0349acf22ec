"""What runs a NetDef. Every engine keeps a workspace of named blobs and its nets resident."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.model import ModelSpec
from spec.parameters import Arrays


class NetEngine(Protocol):
    """A workspace and what runs nets in it. Errors of a net or an operator are EngineError."""

    description: str
    """What really runs, with versions, device and threads; shown in every report."""

    threads: int

    def feed(self, blobs: Mapping[str, np.ndarray]) -> None:
        """Create or overwrite blobs (copied)."""

    def fetch(self, names: Sequence[str]) -> Arrays:
        """Copies of blobs. Raises EngineError for one that does not exist."""

    def run_once(self, net: NetDef) -> None:
        """Run a net that is not kept: an init_net, or a single operator under test."""

    def create(self, net: NetDef) -> None:
        """Check a net and keep it under its name. Its external inputs must exist as blobs already."""

    def run(self, name: str, feeds: Mapping[str, np.ndarray], fetch: Sequence[str] = ()) -> Arrays:
        """Feed, run a kept net once, and fetch, in one exchange."""

    def profile(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Seconds in operators, by name or else type, in one run of a kept net (which changes what the net changes)."""

    def row_blocks(self, spec: ModelSpec, table: int) -> int:
        """In how many blocks it is best fed with the lookups of a table, sorted by row (`presorted.py`).

        0: as they are, unless the optimizer needs them sorted.
        """

    def faster(self, spec: ModelSpec, net: NetDef) -> NetDef:
        """A net with the same result, or the same net: what this engine predicts or trains with in its place.

        Only its external outputs need hold what they would. Blobs that it reads besides are fed here.
        """

    def close(self) -> None:
        """Free everything. Idempotent."""
