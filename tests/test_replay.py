"""Replay: errors split into own and inherited, and the first step at fault named."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from rounded import Rounded

from conformance.case import OPTIMIZERS, make_case
from conformance.examine import examine
from conformance.report import as_dict
from conformance.run import run_case
from conformance.xfail import Entry, ExpectedFailures
from spec.backend import load_backend
from spec.batch import Batch
from spec.errors import InputError
from spec.graph import steps, update_steps
from spec.model import ModelSpec
from spec.reference import evaluate
from spec.toml import load
from spec.update import update
from tools.cli import main

LOSSES = [{"kind": "mse"}, {"kind": "bce"}, {"kind": "wbce", "weights": [0.5, 3.0], "clip": 0.01},
          {"kind": "bce_logits"}]


@pytest.fixture(scope="module")
def case():
    return make_case(load("tiny"), steps=2)


def only(result):
    (backend,) = result.backends
    return backend


def small(loss, interaction, activation):
    tables = [{"rows": 5, "pooling": pooling, "lookups": [1, 4]}
              for pooling in ("sum", "mean", "weighted_fixed", "weighted_learned")]
    return ModelSpec.model_validate({
        "name": "small", "dense_features": 3, "embedding_dim": 4, "batch_size": 7,
        "bottom": {"widths": [6, 4], "activation": activation}, "top": {"widths": [5, 1], "activation": activation},
        "interaction": interaction, "loss": loss, "tables": tables,
        "optimizer": {"kind": "rowwise_adagrad", "learning_rate": 0.1}})


def named(evaluation):
    return {name: tensor.value for name, tensor in evaluation.tensors.items()} | {
        f"{name}_grad_values": rows.gradient.value for name, rows in evaluation.rows.items()}


@pytest.mark.parametrize(("loss", "interaction", "activation"), [
    *((loss, {"kind": "dot"}, "relu") for loss in LOSSES), (LOSSES[1], {"kind": "cat"}, "sigmoid"),
    (LOSSES[3], {"kind": "dot", "self_interaction": True}, "sigmoid")])
def test_the_graph_is_what_a_replay_really_reads(loss, interaction, activation):
    """Each tensor, parameter and input is moved in turn: only the steps that the graph says read it may change, and
    all of them do."""
    spec = small(loss, interaction, activation)
    case = make_case(spec, steps=1, seed=3)
    batch = case.batches[0]
    model = Rounded().create(spec, case.parameters)
    trace = model.trace(batch)
    graph = steps(spec)

    def replayed(parameters, batch, trace):
        return named(evaluate(spec, parameters, batch, engine=trace, replay=True))

    before = replayed(case.parameters, batch, trace)
    assert set(graph) == set(before)

    def reversed_(array):
        return array[::-1].copy()

    for source in {source for sources in graph.values() for source in sources}:
        parameters, moved, arrays = dict(case.parameters), dict(trace), batch.arrays()
        if source in moved:
            moved[source] = moved[source] * np.float32(-1.5) + np.float32(0.125)
        elif source in parameters:
            parameters[source] = parameters[source] * np.float32(-1.5) + np.float32(0.125)
        elif source == "label":
            arrays[source] = 1 - arrays[source]
        else:
            arrays[source] = reversed_(arrays[source])
        after = replayed(parameters, Batch.from_arrays(spec, arrays), moved)
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed == {name for name, sources in graph.items() if source in sources}, source


def test_the_graph_of_the_update_names_what_is_updated():
    for optimizer in OPTIMIZERS:
        spec = load("tiny").with_optimizer(optimizer, 0.1)
        case = make_case(spec, steps=1)
        model = Rounded().create(spec, case.parameters)
        expected = update(spec, case.parameters, model.optimizer_state(), evaluate(spec, case.parameters,
                                                                                  case.batches[0]))
        assert set(update_steps(spec)) == set(expected)


@pytest.mark.parametrize("backend", [load_backend("torch"), load_backend("caffe2-aten"), Rounded()],
                         ids=lambda backend: backend.name)
def test_own_bounds_hold_and_mean_something(case, backend):
    """A correct engine's own errors lie within the bound of each step alone, and not far below it; also those of an
    engine that goes on with more digits than it shows."""
    judged = [v for v in only(run_case(make_case(case.spec, steps=0), [backend])).sections[0].tensors if v.own]
    assert len(judged) == len(steps(case.spec))
    assert all(v.own.worst <= 1 and v.own.beyond == 0 for v in judged)
    inexact = [v for v in judged if v.own.worst > 0]
    assert len(inexact) > 20 and np.median([v.own.worst for v in inexact]) > 0.01
    for v in judged:
        assert v.own.error + v.own.inherited == pytest.approx(v.value - v.reference, abs=1e-15)


@pytest.mark.parametrize("name", ["bottom.0.preactivation", "tables.1.pooled", "interaction.products",
                                  "top.0.preactivation", "probability_grad", "top.0.activation_grad",
                                  "tables.3.pooled_grad", "bottom.1.activation_grad"])
def test_an_error_is_own_where_it_is_made_and_inherited_behind(case, name):
    """The fault goes on through everything after it, as in a real backend."""
    class Wrong(Rounded):
        def trace(self, batch):
            good = super().trace(batch)
            bad = {name: (good[name] * np.float32(1.01)).astype(np.float32)}
            for _ in range(len(good)):  # each round is right one step further
                replayed = named(evaluate(self.spec, self.held, batch, engine=good | bad, replay=True))
                nxt = {key: value.astype(np.float32) for key, value in replayed.items() if key != name} | {
                    name: bad[name]}
                if all(np.array_equal(nxt[key], bad.get(key)) for key in nxt):
                    break
                bad = nxt
            return good | bad

    result = only(run_case(make_case(case.spec, steps=0), [Wrong()]))
    assert result.status == "fails" and result.fault.tensor == name and result.fault.alone
    wrong = [v for v in result.verdicts if v.own and v.own.worst > 1]
    assert [v.tensor for v in wrong] == [name]
    behind = [v for v in result.verdicts if not v.conforms and v.own and v.tensor != name]
    assert behind and all(abs(v.own.inherited) > 100 * abs(v.own.error) for v in behind)


@pytest.mark.parametrize(("wrong", "first"), [
    (["tables.0.weight.moment", "tables.0.weight"], "tables.0.weight.moment"), (["top.1.bias"], "top.1.bias")])
def test_an_update_at_fault_is_named_with_its_step(case, wrong, first):
    class Late(Rounded):
        def train_step(self, batch):
            self.faults = {name: lambda x: x * np.float32(1.01) for name in wrong} if getattr(self, "late", 0) else {}
            self.late = True
            return super().train_step(batch)

    result = only(run_case(make_case(case.spec, steps=2, optimizers=["rowwise_adagrad"]), [Late()]))
    assert (result.fault.tensor, result.fault.optimizer, result.fault.step) == (first, "rowwise_adagrad", 2)
    assert result.fault.sources == update_steps(case.under("rowwise_adagrad"))[first]


def test_a_wrong_gradient_is_no_fault_of_the_update(case):
    result = only(run_case(case, [Rounded(faults={"top.0.bias_grad": lambda x: -x})]))
    assert result.fault.tensor == "top.0.bias_grad" and result.fault.optimizer is None


def test_what_was_expected_to_fail_is_not_named():
    expected = ExpectedFailures([Entry("*", "top.1.bias_grad", "known")])
    wrong = Rounded(faults={"top.1.bias_grad": lambda x: -x, "top.0.bias_grad": lambda x: -x})
    result = only(run_case(make_case(load("tiny"), steps=0), [wrong], expected=expected))
    assert result.status == "fails" and result.fault.tensor == "top.0.bias_grad"


def test_many_small_errors_that_add_up_are_nobodys_fault(case):
    """Own errors inside their bounds, all of one sign, are beyond the bound of the whole only when they are many."""
    from conformance.replay import find_faults
    from conformance.verdict import Own, TensorVerdict
    verdict = TensorVerdict("top.0.preactivation", "forward", 1, worst=1.5, place=[0, 0],
                            own=Own(0.9, [0, 0], 1, 1, 1, 0, 0, 1))
    (fault,) = find_faults(case.spec, [verdict], {})
    assert not fault.alone and "no step is wrong by itself" in fault.summary()


@pytest.mark.parametrize(("backend", "tensor", "operator"), [
    ("caffe2-aten", "top.1.weight_grad", "FCGradient (operator"), ("torch", "top.1.weight_grad", "Linear top.1"),
    ("caffe2-aten", "tables.1.pooled", "SparseLengthsMean (operator"), ("torch", "tables.1.pooled", "EmbeddingBag"),
    ("caffe2-aten", "tables.0.weight", "SparseAdagrad"), ("torch", "tables.0.weight", "Optimizer (adagrad)")])
def test_backends_name_the_operator_of_every_step(case, backend, tensor, operator):
    spec = case.under("adagrad")
    model = load_backend(backend).create(spec, case.parameters)
    try:
        names = model.operators()
    finally:
        model.close()
    assert operator in names[tensor]
    assert {*steps(spec), *update_steps(spec)} <= names.keys()


def test_an_examination_of_a_right_and_a_wrong_step(case):
    right = examine(case, load_backend("torch"), "tables.3.weight", "adagrad", 2)
    assert right.conforms and set(right.inputs) == {"tables.3.weight", "tables.3.weight.moment",
                                                    "tables.3.weight_grad_values"}
    name = "tables.1.weight_grad_values"
    wrong = examine(case, Rounded(faults={name: lambda x: x * 2}), name)
    assert not wrong.conforms and wrong.elements[0].ratio > 1
    assert wrong.elements[0].value == pytest.approx(2 * wrong.elements[0].replayed)
    with pytest.raises(InputError, match=r"top\.0\.weight_grad"):
        examine(case, Rounded(), "top.0.wieght_grad")


@pytest.mark.parametrize(("method", "name"), [("parameters", "top.0.weight"),
                                              ("optimizer_state", "top.0.weight.moment")])
@pytest.mark.parametrize("after", [0, 1])
def test_a_parameter_or_a_moment_that_is_missing_is_a_verdict(case, method, name, after):
    """Whatever is examined: it may be what is missing, be made from it, or stand behind a step that is."""
    class Odd(Rounded):
        steps = 0

        def train_step(self, batch):
            self.steps += 1
            return super().train_step(batch)

    setattr(Odd, method, lambda self: {key: array for key, array in getattr(Rounded, method)(self).items()
                                       if key != name or self.steps < after})
    found = examine(case, Odd(), name, "adagrad", 1)
    assert not found.conforms and found.verdict.tensor == name and "did not return it" in found.verdict.problem
    if not after:
        found = examine(case, Odd(), "bottom.0.weight", "adagrad", 2)
        assert not found.conforms and found.verdict.tensor == name
        assert examine(case, Odd(), "bottom.0.weight_grad", "adagrad", 1).conforms


def test_the_command_in_a_report_shows_the_fault_again(tmp_path):
    path = tmp_path / "report.json"
    run = ["conform", "tiny", "--max-rows", "25", "--backend", "faulty:OFFSET", "--steps", "1"]
    result = CliRunner().invoke(main, [*run, "--json", str(path)])
    (judged,) = json.loads(path.read_text())["cases"][0]["backends"]
    assert judged["fault"]["tensor"] == "tables.1.pooled" and judged["fault"]["operator"] == "EmbeddingBag tables.1"
    assert judged["command"] in result.output and "first at fault: tables.1.pooled" in result.output
    again = CliRunner().invoke(main, judged["command"].split()[1:])
    assert again.exit_code == 1 and "wrong by itself: tables.1.pooled" in again.output
    other = CliRunner().invoke(main, [*judged["command"].split()[1:-1], "interaction.features"])
    assert other.exit_code == 0 and "right by itself" in other.output


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "name one with --backend"), (["--backend", "torch", "--backend", "caffe2-aten"], "--only takes one spec"),
    (["--backend", "torch", "--only", "top.9.weight"], "no such tensor")])
def test_only_refuses_what_it_cannot_do(arguments, said):
    result = CliRunner().invoke(main, ["conform", "tiny", "--only", "loss", *arguments])
    assert result.exit_code == 2 and said in result.output


def test_own_errors_are_in_the_report(case):
    report = as_dict([run_case(make_case(case.spec, steps=0), [Rounded()])])
    (backend,) = report["cases"][0]["backends"]
    assert backend["fault"] is None
    for verdict in backend["sections"][0]["tensors"]:
        assert verdict["tensor"] == "predict" or {"worst", "error", "inherited", "bound"} <= verdict["own"].keys()
