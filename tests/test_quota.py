"""Non-vacuity: a run that compared less than it should, or left too much undecided, does not conform."""

import numpy as np
import pytest
from rounded import Rounded

from conformance import training
from conformance.case import make_case
from conformance.ledger import ledger
from conformance.quota import enforce, trace_quota, training_quota
from conformance.result import Section
from conformance.run import run_case
from conformance.verdict import TensorVerdict
from conformance.xfail import Entry, ExpectedFailures
from spec.model import Interaction, Loss
from spec.reference import evaluate
from spec.shapes import trace_shapes
from spec.tensors import slice_names
from spec.toml import load, preset_names


@pytest.fixture(scope="module")
def case():
    return make_case(load("tiny"), steps=3)


def only(result):
    (backend,) = result.backends
    return backend


VARIANTS = [{"interaction": Interaction(kind="cat")}, {"interaction": Interaction(self_interaction=True)},
            {"loss": Loss(kind="bce_logits")}]


@pytest.mark.parametrize("spec", [*(load(name).capped(30) for name in preset_names()),
                                  *(load("tiny").model_copy(update=variant) for variant in VARIANTS)],
                         ids=lambda spec: spec.name)
def test_shapes_are_those_that_the_reference_computes(spec):
    case = make_case(spec, batch_size=5, steps=0)
    evaluation = evaluate(spec, case.parameters, case.batches[0])
    found = {name: tensor.value.shape for name, tensor in evaluation.tensors.items()}
    for parameter, rows in evaluation.rows.items():
        indices, values = slice_names(parameter)
        found |= {indices: rows.rows.shape, values: rows.gradient.value.shape}
    assert trace_shapes(spec, case.batches[0]) == found


def test_a_whole_run_meets_its_quota_exactly(case):
    found = only(run_case(case, [Rounded()]))
    assert found.status == "conforms"
    for section in found.sections:
        assert section.required == sum(verdict.elements for verdict in section.tensors) > 1000
    counted = ledger(found)
    assert counted.required == counted.elements == sum(counted.histogram) == found.elements
    assert counted.exact + counted.inexact == counted.tensors and not counted.vacuous and counted.weakest > 1


@pytest.mark.parametrize("after", [0, 2])
def test_an_expected_failure_that_ends_the_training_does_not_excuse_the_rest(case, after):
    class Forgetful(Rounded):
        """Its sums of squares vanish at some step."""
        steps = 0

        def train_step(self, batch):
            self.steps += 1
            return super().train_step(batch)

        def optimizer_state(self):
            return {name: array for name, array in super().optimizer_state().items()
                    if name != "top.0.bias.moment" or self.steps < after}

    known = Entry("*", "top.0.bias.moment", "not there yet")
    result = only(run_case(case, [Forgetful()], expected=ExpectedFailures([known])))
    short = {v.tensor: v.problem for v in result.sections[2].tensors if v.fails}
    assert result.status == "fails" and {"loss", "bottom.0.weight", "tables.0.weight.moment", "predict"} <= short.keys()
    assert "compared; it ended at top.0.bias.moment" in short["bottom.0.weight"]
    entries = [Entry("*", "*", "no Adagrad yet", optimizer=optimizer) for optimizer in ("adagrad", "rowwise_adagrad")]
    assert only(run_case(case, [Forgetful()], expected=ExpectedFailures(entries))).status == "conforms"


def test_a_judge_that_looks_at_half_of_a_tensor_is_found_out(case, monkeypatch):
    """The quota is no count of what the judge did, but of what the spec says there is."""
    whole = training.judge_update

    def half(name, before, after, *more):
        verdict = whole(name, before, after, *more)
        verdict.elements //= 2 if name == "bottom.1.weight" else 1
        return verdict

    monkeypatch.setattr(training, "judge_update", half)
    result = only(run_case(case, [Rounded()]))
    assert result.status == "fails" and {v.tensor for v in result.verdicts if v.fails} == {"bottom.1.weight"}


def test_a_comparison_of_nothing_fails(case):
    quota = training_quota(case.under("sgd"), case.batches)
    section = Section("sgd", 3, tensors=[TensorVerdict("loss", "forward")])
    enforce(section, quota)
    assert {verdict.tensor for verdict in section.tensors} == quota.elements.keys()
    assert not any(verdict.conforms for verdict in section.tensors)


@pytest.mark.parametrize(("count", "conforms"), [(4, True), (9, False)])
def test_few_elements_may_be_undecided(case, count, conforms):
    """Of 512 in bottom.0.preactivation: FEW, or the share of them that is granted."""
    quota = trace_quota(case.spec, case.batches[0], True)
    section = Section(None, 1, kinks={"bottom.0.preactivation": count}, tensors=[
        TensorVerdict(name, "forward", elements) for name, elements in quota.elements.items()])
    enforce(section, quota)
    failing = [verdict for verdict in section.tensors if not verdict.conforms]
    assert quota.deciding["bottom.0.preactivation"] == 512 and (not failing) is conforms
    assert conforms or (failing[0].tensor == "bottom.0.preactivation" and "9 of 512 elements are undecided"
                        in failing[0].problem)


def test_activations_all_at_the_kink_do_not_pass_for_a_comparison():
    """Without inputs and biases every ReLU of the bottom is at 0, where either gradient is granted."""
    case = make_case(load("tiny"), steps=0)
    case.parameters |= {name: np.zeros_like(array) for name, array in case.parameters.items()
                        if name.startswith("bottom") and name.endswith("bias")}
    case.batches[0].dense[:] = 0
    result = only(run_case(case, [Rounded()]))
    assert result.status == "fails" and "512 of 512 elements are undecided" in result.worst.problem
