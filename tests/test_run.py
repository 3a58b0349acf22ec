"""Runs against backends that are right, wrong, incomplete, missing and broken."""

import numpy as np
import pytest
from rounded import Rounded

from conformance.case import OPTIMIZERS, make_case
from conformance.report import as_dict
from conformance.run import run_case
from spec.backend import load_backend
from spec.errors import EngineError
from spec.reference import evaluate
from spec.toml import load, preset_names


@pytest.fixture(scope="module")
def case():
    return make_case(load("tiny"), steps=3)


def only(result):
    (backend,) = result.backends
    return backend


def test_the_rounded_reference_conforms_nearly_without_error(case):
    result = run_case(case, [Rounded()])
    assert result.conforms and only(result).status == "conforms"
    assert [section.optimizer for section in only(result).sections] == [None, *OPTIMIZERS]
    assert 0 < only(result).worst.worst < 0.2


def test_torch_conforms_and_agrees_with_the_rounded_reference(case):
    result = run_case(case, [load_backend("torch"), Rounded()])
    assert result.conforms
    (pair,) = result.pairs
    assert pair.elements > 1000 and 0 < pair.worst < 1


@pytest.mark.parametrize("name", [
    "bottom.0.weight_grad", "top.1.bias_grad", "interaction.output_grad", "tables.3.weight_grad_values",
    "tables.3.pooling_grad_values", "bottom.1.activation", "loss"])
@pytest.mark.parametrize("change", [np.zeros_like, lambda x: -x, lambda x: x * np.float32(1.001), lambda x: x * np.nan])
def test_one_wrong_tensor_of_a_trace_is_named(case, name, change):
    result = only(run_case(case, [Rounded(faults={name: change})]))
    assert result.status == "fails" and result.worst.tensor == name


def test_one_wrong_element_is_found(case):
    def nudge(x):
        x = x.copy()
        x[3, 2] += 1e-4 * abs(x).max()
        return x

    result = only(run_case(case, [Rounded(faults={"bottom.0.weight_grad": nudge})]))
    assert result.worst.tensor == "bottom.0.weight_grad" and result.worst.place == [3, 2]


def test_a_missing_tensor_fails(case):
    class Forgetful(Rounded):
        def trace(self, batch):
            return {name: value for name, value in super().trace(batch).items() if name != "tables.1.pooled_grad"}

    result = only(run_case(case, [Forgetful()]))
    assert result.status == "fails" and result.worst.tensor == "tables.1.pooled_grad" and result.worst.problem


@pytest.mark.parametrize("name", ["bottom.0.weight", "tables.0.weight", "tables.2.pooling"])
def test_a_parameter_that_drifts_is_found(case, name):
    """A fixed parameter that moves, and trained ones that move beside their update."""
    class Drifting(Rounded):
        def train_step(self, batch):
            loss = super().train_step(batch)
            self.held[name] += np.float32(2e-5)
            return loss

    result = only(run_case(case, [Drifting()]))
    assert result.status == "fails" and name in {v.tensor for v in result.verdicts if not v.conforms}


@pytest.mark.parametrize("change", [lambda x: x[None], lambda x: x.astype(np.float64), lambda x: float(x.sum())])
@pytest.mark.parametrize("name", ["bottom.0.preactivation", "top.1.preactivation_grad", "probability", "loss",
                                  "tables.1.weight_grad_indices", "tables.1.weight_grad_values"])
def test_a_tensor_of_a_wrong_kind_is_a_verdict_and_no_crash(case, name, change):
    class Odd(Rounded):
        def trace(self, batch):
            trace = super().trace(batch)
            return trace | {name: change(trace[name])}

    wrong, right = run_case(case, [Odd("odd"), Rounded()]).backends
    assert wrong.status == "fails" and wrong.worst.problem
    assert wrong.worst.tensor == name.replace("indices", "values")  # indices are judged with their values
    assert right.status == "conforms"


@pytest.mark.parametrize("method, name", [("parameters", "tables.0.weight"), ("optimizer_state", "top.0.bias.moment")])
@pytest.mark.parametrize("change", [None, lambda x: x[None], lambda x: x.astype(np.float64),
                                    lambda x: x + np.float32(0.1)])
@pytest.mark.parametrize("late", [False, True])
def test_training_starts_and_goes_on_from_what_it_should(case, method, name, change, late):
    """A missing parameter or moment, one of another kind, and an accumulator that does not start at 0."""
    class Odd(Rounded):
        steps = 0

        def train_step(self, batch):
            self.steps += 1
            return super().train_step(batch)

    def odd(self):
        arrays = getattr(Rounded, method)(self)
        if name in arrays and self.steps >= late:
            value = arrays.pop(name)
            arrays |= {name: change(value)} if change else {}
        return arrays

    setattr(Odd, method, odd)
    result = only(run_case(case, [Odd()]))
    assert result.status == "fails" and name in {v.tensor for v in result.verdicts if not v.conforms}


def test_training_that_does_nothing_fails(case):
    class Idle(Rounded):
        def train_step(self, batch):
            return float(evaluate(self.spec, self.held, batch).tensors["loss"].value)

    failing = {v.tensor for v in only(run_case(case, [Idle()])).verdicts if not v.conforms}
    assert {"bottom.0.weight", "tables.0.weight", "tables.3.pooling", "bottom.0.weight.moment"} <= failing


def test_missing_and_broken_backends_are_told_apart_from_wrong_ones(case):
    result = run_case(case, [Rounded("away", absent=True), Rounded()])
    assert result.conforms and [b.status for b in result.backends] == ["missing", "conforms"]
    with pytest.raises(EngineError, match="mortal: mortal: the worker died"):
        run_case(case, [Rounded(), Rounded("mortal", dies=True)])
    assert not run_case(case, [Rounded("away", absent=True)]).conforms, "comparing nothing is no pass"


def test_an_all_zero_tensor_would_fail_everywhere_it_is_not_zero_itself(case):
    """Must show 3: every bound is far below the size of the tensor that it guards."""
    verdicts = only(run_case(case, [load_backend("torch")])).verdicts
    assert all(v.null_ratio is None or v.null_ratio > 10 for v in verdicts)
    inexact = [v for v in verdicts if v.tightness > 0]
    assert len(inexact) > 50 and all(v.tightness < 1e-3 for v in inexact)


def test_report_is_plain_json(case):
    import json
    report = as_dict([run_case(case, [Rounded(), Rounded("wrong", faults={"loss": lambda x: x * np.nan})])])
    text = json.dumps(report, allow_nan=False)
    assert not report["conforms"] and '"worst": "inf"' in text


@pytest.mark.slow
@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_conforms_within_bounds_that_mean_something(preset):
    """Must show 3, on small tables and batches; `make run` shows it on larger ones."""
    case = make_case(load(preset).capped(200), batch_size=16, steps=2)
    result = run_case(case, [load_backend("torch"), load_backend("caffe2-aten")])
    assert result.conforms
    for backend in result.backends:
        inexact = [v for v in backend.verdicts if v.tightness > 0]
        assert len(inexact) > 50
        assert all(v.null_ratio is None or v.null_ratio > 1 for v in backend.verdicts)
        vague = [v.tensor for v in inexact if not 1e-3 <= v.worst <= 1 and v.elements > 100]
        assert not vague, "a bound that no rounding comes near"
