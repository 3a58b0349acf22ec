"""Backends that are wrong on some models only, for tests/test_fuzz.py: `dlrm conform --backend fussy:BAGS`."""

import numpy as np
from rounded import Rounded

from spec.errors import EngineError


class Fussy(Rounded):
    """`spoils` says of which spec and batch one gradient comes out wrong; `refuses`, which spec makes it fail."""

    def __init__(self, name, spoils=lambda spec, batch: False, refuses=lambda spec: False):
        super().__init__(name)
        self.spoils, self.refuses = spoils, refuses

    def create(self, spec, parameters, device="cpu"):
        if self.refuses(spec):
            raise EngineError("no more than 3 tables")
        return super().create(spec, parameters, device)

    def trace(self, batch):
        trace = super().trace(batch)
        if self.spoils(self.spec, batch):
            trace["tables.0.pooled"] = trace["tables.0.pooled"] + np.float32(1)
        return trace


def long_mean_bags(spec, batch):
    return spec.interaction.self_interaction and any(
        table.pooling == "mean" and (lengths > 2).any()
        for table, lengths in zip(spec.tables, batch.lengths, strict=True))


BAGS = Fussy("bags", long_mean_bags)
TABLES = Fussy("tables", refuses=lambda spec: len(spec.tables) > 3)
NEVER, ALWAYS = Fussy("never"), Fussy("always", lambda spec, batch: True)
