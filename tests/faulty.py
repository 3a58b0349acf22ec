"""Backends with one real fault each, for tests/test_faults.py: `dlrm conform --backend faulty:SIGN`."""

import numpy as np

from dlrm_torch.backend import BACKEND
from dlrm_torch.step import AutogradStep
from spec.backend import Availability


class Faulty:
    """The torch backend, broken by a function of its model."""

    trains = True

    def __init__(self, name, fault):
        self.name, self.fault = name, fault

    def available(self):
        return Availability(True)

    def create(self, spec, parameters, device="cpu"):
        model = BACKEND.create(spec, parameters, device)
        model._step = AutogradStep(model.module, model._optimizer)  # hooks are autograd's
        self.fault(model)
        return model


def sign(model):
    """One parameter's gradient comes out negated."""
    dict(model.module.named_parameters())["top.0.weight"].register_hook(lambda gradient: -gradient)


def missing_mean(model):
    """One bias gradient is the sum over the batch where the spec wants the mean."""
    dict(model.module.named_parameters())["bottom.0.bias"].register_hook(
        lambda gradient: gradient * model.spec.batch_size)


def pair_order(model):
    """Two pairs of the interaction change places."""
    pairs = model.module.interaction.pairs
    pairs[[0, 1]] = pairs[[1, 0]].clone()


def off_by_one_offset(model):
    """The second bag of a ragged table starts one row late, and the first takes that row."""
    tables = model.module.tables
    lookups = tables.lookups

    def shifted(indices, lengths, join):
        second = lengths[1].copy()
        donor = int(np.flatnonzero(second[1:])[0]) + 1
        second[0] += 1
        second[donor] -= 1
        return lookups(indices, [lengths[0], second, *lengths[2:]], join)

    tables.lookups = shifted


SIGN, MISSING_MEAN, PAIR_ORDER, OFFSET = (
    Faulty(fault.__name__, fault) for fault in (sign, missing_mean, pair_order, off_by_one_offset))

