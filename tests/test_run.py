"""Runs against backends that are right, wrong, incomplete, missing and broken."""

import numpy as np
import pytest

from conformance.case import OPTIMIZERS, make_case
from conformance.report import as_dict
from conformance.run import run_case
from spec.backend import Availability, load_backend
from spec.errors import EngineError
from spec.parameters import initial_state
from spec.reference import evaluate
from spec.tensors import slice_names
from spec.toml import load
from spec.update import update


class Rounded:
    """The reference itself, rounded to float32: the best that a float32 backend can be."""

    name, trains = "rounded", True

    def available(self):
        return Availability(True)

    def create(self, spec, parameters, device="cpu"):
        return RoundedModel(spec, parameters)


class RoundedModel:
    engine = "NumPy float64, rounded"

    def __init__(self, spec, parameters):
        self.spec, self.values = spec, {name: value.copy() for name, value in parameters.items()}
        self.state = initial_state(spec)

    def predict(self, batch):
        return evaluate(self.spec, self.values, batch).tensors["probability"].value.astype(np.float32)

    def trace(self, batch):
        result = evaluate(self.spec, self.values, batch)
        named = {name: tensor.value.astype(np.float32) for name, tensor in result.tensors.items()}
        for parameter, rows in result.rows.items():
            indices, values = slice_names(parameter)
            named |= {indices: rows.rows, values: rows.gradient.value.astype(np.float32)}
        return named

    def train_step(self, batch):
        result = evaluate(self.spec, self.values, batch)
        for name, new in update(self.spec, self.values, self.state, result).items():
            target = self.values if name in self.values else self.state
            target[name][slice(None) if new.rows is None else new.rows] = new.new.value
        return float(np.float32(result.tensors["loss"].value))

    def parameters(self):
        return {name: value.copy() for name, value in self.values.items()}

    def optimizer_state(self):
        return {name: value.copy() for name, value in self.state.items()}

    def close(self):
        pass


def changed(**methods):
    """A Rounded backend with some of its model's methods wrapped: name -> function of (model, original result)."""
    class Model(RoundedModel):
        pass

    for name, change in methods.items():
        def wrapped(self, *args, _original=getattr(RoundedModel, name), _change=change):
            return _change(self, _original(self, *args))
        setattr(Model, name, wrapped)

    class Changed(Rounded):
        name = "changed"

        def create(self, spec, parameters, device="cpu"):
            return Model(spec, parameters)

    return Changed()


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


def replaced(name, change):
    def tamper(model, trace):
        return trace | {name: change(trace[name])}
    return tamper


@pytest.mark.parametrize("name", [
    "bottom.0.weight_grad", "top.1.bias_grad", "interaction.output_grad", "tables.3.weight_grad_values",
    "tables.3.pooling_grad_values", "bottom.1.activation", "loss"])
@pytest.mark.parametrize("change", [np.zeros_like, lambda x: -x, lambda x: x * np.float32(1.001), lambda x: x * np.nan])
def test_one_wrong_tensor_of_a_trace_is_named(case, name, change):
    result = only(run_case(case, [changed(trace=replaced(name, change))]))
    assert result.status == "fails" and result.worst.tensor == name


def test_one_wrong_element_is_found(case):
    def nudge(x):
        x = x.copy()
        x[3, 2] += 1e-4 * abs(x).max()
        return x

    result = only(run_case(case, [changed(trace=replaced("bottom.0.weight_grad", nudge))]))
    assert result.worst.tensor == "bottom.0.weight_grad" and result.worst.place == [3, 2]


def test_a_missing_tensor_fails(case):
    def drop(model, trace):
        return {name: value for name, value in trace.items() if name != "tables.1.pooled_grad"}

    result = only(run_case(case, [changed(trace=drop)]))
    assert result.status == "fails" and result.worst.tensor == "tables.1.pooled_grad" and result.worst.problem


@pytest.mark.parametrize("name", ["bottom.0.weight", "tables.0.weight", "tables.2.pooling"])
def test_a_parameter_off_by_one_ulp_of_its_scale_is_found(case, name):
    """A fixed parameter that moves, and a trained one that drifts beside its update."""
    def drift(model, parameters):
        parameters[name] = parameters[name] + np.float32(2e-5) * model.__dict__.setdefault("steps", 0)
        model.steps += 1
        return parameters

    result = only(run_case(case, [changed(parameters=drift)]))
    assert result.status == "fails" and name in {v.tensor for v in result.verdicts if not v.conforms}


def test_training_that_does_nothing_fails(case):
    class Lazy(RoundedModel):
        def train_step(self, batch):
            return float(np.float32(evaluate(self.spec, self.values, batch).tensors["loss"].value))

    class Idle(Rounded):
        def create(self, spec, parameters, device="cpu"):
            return Lazy(spec, parameters)

    failing = {v.tensor for v in only(run_case(case, [Idle()])).verdicts if not v.conforms}
    assert {"bottom.0.weight", "tables.0.weight", "tables.3.pooling", "bottom.0.weight.moment"} <= failing


def test_missing_and_broken_backends_are_told_apart_from_wrong_ones(case):
    class Absent(Rounded):
        name = "absent"

        def available(self):
            return Availability(False, "not installed", "pip install it")

    class Broken(Rounded):
        name = "broken"

        def create(self, spec, parameters, device="cpu"):
            raise EngineError("the worker died (SIGKILL)")

    result = run_case(case, [Absent(), Rounded()])
    assert result.conforms and [b.status for b in result.backends] == ["missing", "conforms"]
    result = run_case(case, [Broken(), Rounded()])
    assert not result.conforms and "SIGKILL" in result.backends[0].reason
    assert not run_case(case, [Absent()]).conforms, "comparing nothing is no pass"


def test_an_all_zero_tensor_would_fail_everywhere_it_is_not_zero_itself(case):
    """Must show 3: every bound is far below the size of the tensor that it guards."""
    verdicts = only(run_case(case, [load_backend("torch")])).verdicts
    assert all(v.null_ratio is None or v.null_ratio > 10 for v in verdicts)
    inexact = [v for v in verdicts if v.tightness > 0]
    assert len(inexact) > 50 and all(v.tightness < 1e-3 for v in inexact)


def test_report_is_plain_json(case):
    import json
    report = as_dict([run_case(case, [Rounded(), changed(trace=replaced("loss", lambda x: x * np.nan))])])
    text = json.dumps(report, allow_nan=False)
    assert not report["conforms"] and '"worst": "inf"' in text
