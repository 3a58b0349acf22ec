"""The same bits for the same calls: what is promised is checked, what is not is only told."""

import numpy as np
import pytest
from rounded import Rounded

from conformance.case import make_case
from conformance.run import run_case
from spec.backend import backend_names, load_backend
from spec.toml import load

SHIPPED = [pytest.param(name, marks=pytest.mark.engine if name == "caffe2" else ()) for name in backend_names()]


@pytest.fixture(scope="module")
def case():
    return make_case(load("tiny"), steps=3, optimizers=("adagrad",))


class Restless(Rounded):
    """The last bit of one weight depends on how many models there have been."""
    models = 0

    def create(self, *arguments):
        Restless.models += 1
        return super().create(*arguments)

    def train_step(self, batch):
        loss = super().train_step(batch)
        weight = self.held["top.0.weight"]
        weight[0, 0] = np.nextafter(weight[0, 0], np.float32(np.inf if Restless.models % 2 else -np.inf))
        return loss


def run(case, backend):
    (result,) = run_case(case, [backend], repeats=True).backends
    return result


@pytest.mark.parametrize("promised", [True, False])
def test_a_bit_that_differs_is_told_and_breaks_a_promise(case, promised):
    backend = Restless()
    backend.repeatable = promised
    result = run(case, backend)
    assert result.repeat.difference == "top.0.weight of parameters, after 1 training steps"
    assert result.repeat.broken is promised and result.status == ("fails" if promised else "conforms")
    assert all(verdict.conforms for verdict in result.verdicts), "each run is right within its bounds"


def test_one_that_repeats_itself(case):
    repeat = run(case, Rounded()).repeat
    tensors = len(Rounded().create(case.under("adagrad"), case.parameters).parameters())
    assert not repeat.difference and not repeat.promised and not repeat.broken
    assert repeat.calls > 3 * 4 and repeat.tensors > 4 * tensors


def test_a_tensor_that_comes_and_goes(case):
    class Shy(Rounded):
        repeatable, models = True, 0

        def create(self, *arguments):
            Shy.models += 1
            return super().create(*arguments)

        def trace(self, batch):
            trace = super().trace(batch)
            return trace if Shy.models == 1 else {name: x for name, x in trace.items() if name != "loss"}

    assert run(case, Shy()).repeat.difference == "loss of trace"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_backend_keeps_its_promise(case, name):
    repeat = run(case, load_backend(name)).repeat
    assert repeat.promised and not repeat.difference and repeat.tensors > 10
