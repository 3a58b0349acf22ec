"""torch.compile: the modules compiled, not merely named so, conform."""

from importlib.util import find_spec

import numpy as np
import pytest

from conformance.case import make_case
from conformance.run import run_case
from spec.backend import backend_names, load_backend
from spec.errors import EngineError
from spec.toml import load

BACKEND = load_backend("torch-compile")


def test_it_runs_only_where_it_is_named():
    assert "torch-compile" not in backend_names() and find_spec("torch")


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    state = BACKEND.available()
    assert not state.ok and "no-such-compiler" in state.reason and "g++" in state.remedy
    with pytest.raises(EngineError, match="needs a C"):
        BACKEND.create(load("tiny"), {})


@pytest.mark.slow
@pytest.mark.skipif(not BACKEND.available().ok, reason=BACKEND.available().reason)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # PyTorch's own, while compiling
def test_it_is_compiled_and_conforms():
    from torch._dynamo.utils import counters
    counters.clear()
    case = make_case(load("tiny"), steps=2, optimizers=["sgd"])
    result = run_case(case, [BACKEND, load_backend("torch")])
    assert result.conforms and "torch.compile" in result.backends[0].engine
    # bottom, interaction, top, each for prediction, training and the trace; a second batch compiles nothing new
    assert counters["stats"]["unique_graphs"] == 9 and not counters["graph_break"]
    model = BACKEND.create(case.spec, case.parameters)
    other = make_case(load("tiny"), steps=1, batch_size=20).batches[0]
    eager = load_backend("torch").create(case.spec, case.parameters)
    assert np.abs(model.predict(other) - eager.predict(other)).max() < 1e-6
    before = model.parameters()
    assert set(model.profile(other, training=False)) == {"embedding", "compiled/forward"}
    assert set(model.profile(other)) == {"embedding", "compiled/forward", "loss", "compiled/backward", "optimizer"}
    assert all(np.array_equal(before[name], array) for name, array in model.parameters().items())
    assert counters["stats"]["unique_graphs"] == 9
