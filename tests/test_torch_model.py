"""The PyTorch modules: names, and every traced gradient against finite differences in float64."""

import numpy as np
import pytest
import torch

from dlrm_torch.engine import evaluate, trace
from dlrm_torch.inputs import Inputs, inputs_from
from dlrm_torch.model import DLRM, Linear
from dlrm_torch.optimizer import Optimizer
from dlrm_torch.step import AutogradStep, TrainStep
from spec.data.random import random_batch
from spec.model import ModelSpec
from spec.parameters import initial_parameters, is_sparse, parameter_shapes, trained_parameters
from spec.tensors import activation_gradients, activations, slice_names, trace_names
from spec.toml import load

CASES = {
    "mse": {"loss": {"kind": "mse"}},
    "bce": {"loss": {"kind": "bce"}},
    "bce, clipped": {"loss": {"kind": "bce", "clip": 0.334}},
    "bce_logits": {"loss": {"kind": "bce_logits"}},
    "wbce": {"loss": {"kind": "wbce", "weights": [0.3, 2.5]}},
    "wbce, clipped": {"loss": {"kind": "wbce", "weights": [0.3, 2.5], "clip": 0.334}},
    "self-interaction": {"interaction": {"kind": "dot", "self_interaction": True}},
    "cat": {"interaction": {"kind": "cat"}},
    "sigmoid": {"bottom": {"widths": [6, 8], "activation": "sigmoid"},
                "top": {"widths": [7, 1], "activation": "sigmoid"}},
    "one layer each": {"bottom": {"widths": [8]}, "top": {"widths": [1]}},
    "every lookup of every pooling": {"tables": tuple(
        {"rows": 9, "pooling": pooling, "lookups": lookups}
        for pooling in ("sum", "mean", "weighted_fixed", "weighted_learned") for lookups in (1, 3, (0, 4)))},
}


def make(changes: dict) -> tuple[ModelSpec, DLRM, Inputs]:
    """The tiny preset with some keys changed, its model and a batch, all in float64."""
    spec = ModelSpec.model_validate({**load("tiny").model_dump(), **changes})
    model = DLRM(spec)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in initial_parameters(spec, 3).items()})
    batch = random_batch(spec, 24, seed=5, number=0)
    assert any((lengths == 0).any() for lengths in batch.lengths)
    assert any(len(np.unique(indices)) < len(indices) for indices in batch.indices)
    inputs = inputs_from(batch, model.double().tables)
    return spec, model, inputs._replace(dense=inputs.dense.double(), label=inputs.label.double())


@pytest.fixture(params=CASES)
def case(request):
    return make(CASES[request.param])


def test_state_dict_has_the_names_and_shapes_of_the_spec(case):
    spec, model, _ = case
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == parameter_shapes(spec)
    trained = [name for name, x in model.named_parameters() if x.requires_grad]
    assert tuple(trained) == trained_parameters(spec)


def test_trace_has_every_name_of_the_spec_in_order(case):
    spec, model, inputs = case
    assert tuple(trace(model, inputs)) == trace_names(spec)


def test_trace_leaves_the_model_alone(case):
    _, model, inputs = case
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trace(model, inputs)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())


def slope(loss_at, like: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """A random direction of +-1 and the loss's central difference along it."""
    direction = torch.randint(0, 2, like.shape, generator=generator).double() * 2 - 1
    h = 1e-5
    return direction, (loss_at(h * direction) - loss_at(-h * direction)) / (2 * h)


def check(name: str, gradient: torch.Tensor, direction: torch.Tensor, measured: float) -> None:
    """Truncation is of the order h^2 = 1e-10, rounding of 2^-52 / h = 2e-11; the gradients are far above both."""
    assert abs(float((gradient * direction).sum()) - measured) < 5e-9, name
    assert float(gradient.abs().sum()) > 1e-5, name


@torch.no_grad()
def test_activation_gradients_are_the_slopes_of_the_loss(case):
    spec, model, inputs = case
    with torch.enable_grad():
        traced = trace(model, inputs)
    generator = torch.Generator().manual_seed(1)
    for gradient_name in activation_gradients(spec):
        name = gradient_name.removesuffix("_grad")

        def loss_at(step, name=name):
            return float(evaluate(model, inputs, lambda at, x: x + step if at == name else x))

        for _ in range(2):
            check(name, traced[gradient_name], *slope(loss_at, traced[name], generator))


@torch.no_grad()
def test_parameter_gradients_are_the_slopes_of_the_loss(case):
    spec, model, inputs = case
    with torch.enable_grad():
        traced = trace(model, inputs)
    generator = torch.Generator().manual_seed(2)
    parameters = dict(model.named_parameters())
    for name in trained_parameters(spec):
        parameter = parameters[name]
        if is_sparse(name):
            indices, values = (traced[part] for part in slice_names(name))
            gradient = torch.zeros_like(parameter).index_add_(0, indices, values)
        else:
            gradient = traced[f"{name}_grad"]

        def loss_at(step, parameter=parameter):
            before = parameter.clone()
            parameter.add_(step)
            loss = float(evaluate(model, inputs))
            parameter.copy_(before)
            return loss

        for _ in range(2):
            check(name, gradient, *slope(loss_at, parameter, generator))


def test_a_preactivation_of_zero_passes_no_gradient():
    _, model, inputs = make({"bottom": {"widths": [4, 8]}})
    with torch.no_grad():
        model.bottom[0].weight[1] = 0
        model.bottom[0].bias[1] = 0
    traced = trace(model, inputs)
    assert (traced["bottom.0.preactivation"][:, 1] == 0).all()
    assert (traced["bottom.0.activation_grad"][:, 1] != 0).any()
    assert (traced["bottom.0.preactivation_grad"][:, 1] == 0).all()


@pytest.mark.parametrize("self_interaction", [False, True])
def test_pairs_follow_the_dense_vector_in_the_order_of_the_spec(self_interaction):
    _, model, inputs = make({"interaction": {"kind": "dot", "self_interaction": self_interaction}})
    traced = {name: x.numpy() for name, x in trace(model, inputs).items()}
    vectors = [traced["bottom.1.activation"], *(traced[f"tables.{t}.pooled"] for t in range(4))]
    columns = [vectors[0]]
    for i in range(5):
        for j in range(i + self_interaction):
            columns.append((vectors[i] * vectors[j]).sum(1, keepdims=True))
    np.testing.assert_allclose(traced["interaction.output"], np.concatenate(columns, 1), rtol=1e-13, atol=1e-15)
    used = np.tril(np.ones((5, 5), bool), 0 if self_interaction else -1)
    assert (traced["interaction.products_grad"][:, ~used] == 0).all()  # (i, j), not its twin (j, i)


def test_forward_is_the_probability_that_a_trace_records():
    spec, model, inputs = make({})
    traced, batch = trace(model, inputs), random_batch(spec, 24, seed=5, number=0)
    probability = model(inputs.dense, *([torch.from_numpy(array) for array in arrays]
                                        for arrays in (batch.indices, batch.lengths)))
    assert torch.equal(probability, traced["probability"]) and probability.shape == (24, 1)
    assert set(activations(spec)) <= traced.keys()


@pytest.mark.parametrize("name", ["bce, clipped", "wbce, clipped"])
def test_the_clipped_cases_have_samples_on_either_side_of_the_bound(name):
    traced = trace(*make(CASES[name])[1:])
    clipped = traced["probability_grad"] == 0
    assert clipped.any() and not clipped.all()


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("name", CASES)
def test_the_step_written_out_is_autograds(name: str, kind: str, monkeypatch):
    """In float64, over several steps: what is left of their difference is rounding. Products are added to weights of
    any width, and what lies behind a weight is never read."""
    monkeypatch.setattr("dlrm_torch.optimizer.ADDED_WIDTH", 1)
    after = []
    for step in (TrainStep, AutogradStep):
        _, model, inputs = make(CASES[name] | {"optimizer": {"kind": kind, "learning_rate": 0.1}})
        followed_by_nan(model.top[0])
        optimizer = Optimizer(model)
        take = step(model, optimizer)
        losses = [take(inputs) for _ in range(3)]
        after.append({"loss": np.array(losses)} | {name: x.numpy() for name, x in (
            model.state_dict() | optimizer.state).items()})
    assert after[0]["loss"][0] != after[0]["loss"][1]
    for name, array in after[0].items():
        np.testing.assert_allclose(array, after[1][name], rtol=1e-9, atol=1e-12, err_msg=name)


def followed_by_nan(linear: Linear) -> None:
    """The weight moves to where the columns that `padded` adds are NaN."""
    outputs, inputs = linear.weight.shape
    memory = torch.full((-(-inputs // 8) * 8, outputs), torch.nan, dtype=linear.weight.dtype)
    memory[:inputs] = linear.weight.detach().t()
    linear.weight.data = memory[:inputs].t()
    assert torch.equal(linear.padded().isnan().any(0), torch.arange(len(memory)) >= inputs)


@pytest.mark.parametrize("inputs, width", [(13, 16), (16, 16), (1, 8)])
def test_a_weight_is_padded_where_it_was_made(inputs: int, width: int):
    linear = Linear(inputs, 5)
    with torch.no_grad():
        linear.weight.fill_(1)
    padded = linear.padded()
    assert padded.shape == (5, width) and padded.data_ptr() == linear.weight.data_ptr()
    assert (padded[:, :inputs] == 1).all() and not padded[:, inputs:].any()
    assert linear.double().padded().shape == (5, inputs)
    linear.weight.data = linear.weight.detach().contiguous()
    assert linear.padded().shape == (5, inputs)
