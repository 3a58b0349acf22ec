"""Reverse mode over NetDefs: accumulation, slices, pruning, errors; and against Caffe2's own."""

import legacy
import numpy as np
import pytest

from dlrm_caffe2.engine.aten import AtenEngine
from dlrm_caffe2.gradient import add_gradients
from dlrm_caffe2.model import gradient_net, init_net, trace_blobs
from dlrm_caffe2.net import make_operator as op
from dlrm_caffe2.operators.record import OperatorError, Slice
from dlrm_caffe2.proto.caffe2_pb2 import NetDef
from spec.data.random import random_batch
from spec.errors import InputError
from spec.model import MLP, Interaction, Loss, Table
from spec.parameters import initial_parameters, trained_parameters
from spec.tensors import activation_gradients
from spec.toml import load, preset_names

FLOAT = np.float32


def net_of(*operators):
    return NetDef(name="net", op=operators)


def signatures(net):
    return [(o.type, list(o.input), list(o.output)) for o in net.op]


def run(net, feeds, gradient):
    """The values of a gradient: an array, or (indices, values)."""
    engine = AtenEngine()
    engine.feed(feeds)
    engine.run_once(net)
    names = [gradient] if isinstance(gradient, str) else list(gradient)
    found = engine.fetch(names)
    return found[gradient] if isinstance(gradient, str) else tuple(found[name] for name in names)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


THREE_USES = [op("Sigmoid", ["x"], ["a"]), op("Mul", ["a", "x"], ["b"]), op("Sum", ["b", "x"], ["c"]),
              op("AveragedLoss", ["c"], ["loss"])]


def test_uses_of_a_blob_are_summed_under_caffe2s_names():
    """loss = mean(x sigmoid(x) + x)."""
    net = net_of(*THREE_USES)
    gradients = add_gradients(net, "loss", ["x"])
    assert gradients == {"x": "x_grad"}
    assert signatures(net)[4:] == [
        ("ConstantFill", ["loss"], ["loss_autogen_grad"]),
        ("AveragedLossGradient", ["c", "loss_autogen_grad"], ["c_grad"]),
        ("MulGradient", ["c_grad", "a", "x"], ["a_grad", "x_grad"]),
        ("SigmoidGradient", ["a", "a_grad"], ["_x_grad_autosplit_0"]),
        ("Sum", ["x_grad", "c_grad", "_x_grad_autosplit_0"], ["x_grad"]),
    ]
    x = np.array([[-1.5, 0.25], [2.0, 0.0]], FLOAT)
    s = sigmoid(x.astype(np.float64))
    np.testing.assert_allclose(run(net, {"x": x}, "x_grad"), (s + x * s * (1 - s) + 1) / 4, rtol=1e-6)


def test_an_operator_that_reads_a_blob_twice():
    """loss = mean(x x^T): d loss / d x_ik = (sum_j x_jk + sum_j x_jk) / n^2."""
    net = net_of(op("BatchMatMul", ["x", "x"], ["y"], trans_b=1), op("AveragedLoss", ["y"], ["loss"]))
    add_gradients(net, "loss", ["x"])
    assert [o for _, _, outputs in signatures(net)[4:] for o in outputs] == ["x_grad", "_x_grad_autosplit_0", "x_grad"]
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(FLOAT)
    np.testing.assert_allclose(run(net, {"x": x}, "x_grad"), np.tile(2 * x.sum(0) / 9, (3, 1)), rtol=1e-5)


def test_one_operator_with_two_gradients_of_one_blob():
    """Split gives both halves the name x_grad."""
    net = net_of(op("Concat", ["x", "x"], ["y", "y_lengths"], axis=1), op("Sigmoid", ["y"], ["z"]),
                 op("AveragedLoss", ["z"], ["loss"]))
    add_gradients(net, "loss", ["x"])
    assert signatures(net)[-2:] == [("Split", ["y_grad", "y_lengths"], ["x_grad", "_x_grad_autosplit_0"]),
                                    ("Sum", ["x_grad", "_x_grad_autosplit_0"], ["x_grad"])]
    s = sigmoid(0.5)
    x = np.full((2, 3), 0.5, FLOAT)
    np.testing.assert_allclose(run(net, {"x": x}, "x_grad"), np.full((2, 3), 2 * s * (1 - s) / 12), rtol=1e-6)


def two_lookups():
    return [op("SparseLengthsSum", ["table", "i", "i_lengths"], ["a"]),
            op("SparseLengthsMean", ["table", "j", "j_lengths"], ["b"]),
            op("Mul", ["a", "b"], ["c"]), op("AveragedLoss", ["c"], ["loss"])]


def two_lookups_feeds():
    rng = np.random.default_rng(1)
    return {"table": rng.normal(size=(5, 3)).astype(FLOAT),
            "i": np.array([4, 0, 4], np.int64), "i_lengths": np.array([2, 1], np.int32),
            "j": np.array([1, 4, 4], np.int64), "j_lengths": np.array([1, 2], np.int32)}


def test_a_table_of_two_lookups_gets_both_slices():
    net = net_of(*two_lookups())
    gradients = add_gradients(net, "loss", ["table"])
    assert gradients["table"] == Slice("table_grad_indices_concat", "table_grad_values_concat")
    assert signatures(net)[-2:] == [
        ("Concat", ["j", "i"], ["table_grad_indices_concat", "table_grad_indices_concat_split"]),
        ("Concat", ["_table_grad_values_autosplit_0", "_table_grad_values_autosplit_1"],
         ["table_grad_values_concat", "table_grad_values_concat_split"])]
    feeds = two_lookups_feeds()
    indices, values = run(net, feeds, gradients["table"])
    t = feeds["table"].astype(np.float64)
    a, b = np.array([t[4] + t[0], t[4]]), np.array([t[1], t[4]])
    expected = np.zeros((5, 3))
    np.add.at(expected, [4, 0, 4], np.array([b[0], b[0], b[1]]) / 6)
    np.add.at(expected, [1, 4, 4], np.array([a[0], a[1] / 2, a[1] / 2]) / 6)
    found = np.zeros((5, 3))
    np.add.at(found, indices, values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_for_is_computed():
    net = net_of(op("FC", ["x", "w", "b"], ["y"]), op("BatchMatMul", ["constant", "y"], ["z"]),
                 op("AveragedLoss", ["z"], ["loss"]), op("Sigmoid", ["y"], ["unrelated"]))
    gradients = add_gradients(net, "loss", ["b", "w"])
    assert list(gradients.items()) == [("b", "b_grad"), ("w", "w_grad")]
    assert signatures(net)[6:] == [("BatchMatMul", ["constant", "z_grad"], ["y_grad"]),
                                   ("FCGradient", ["x", "w", "y_grad"], ["w_grad", "b_grad"])]
    assert all(o.is_gradient_op for o in net.op[5:])


def test_gradients_of_blobs_on_the_way():
    net = net_of(op("Sigmoid", ["x"], ["y"]), op("Sigmoid", ["y"], ["z"]), op("AveragedLoss", ["z"], ["loss"]))
    assert add_gradients(net, "loss", ["y", "loss"]) == {"y": "y_grad", "loss": "loss_autogen_grad"}
    assert "x_grad" not in {name for o in net.op for name in o.output}


def test_in_place_operators():
    """Each version of a blob has a gradient of its own: here mean(relu(sigmoid(x)))."""
    net = net_of(op("Sigmoid", ["x"], ["y"]), op("Relu", ["y"], ["y"]), op("AveragedLoss", ["y"], ["loss"]))
    with pytest.raises(OperatorError, match="its gradient needs 'y', which a later operator overwrites"):
        add_gradients(net, "loss", ["x"])  # the sigmoid's own gradient reads its output
    net = net_of(op("Copy", ["x"], ["y"]), op("Relu", ["y"], ["y"]), op("AveragedLoss", ["y"], ["loss"]))
    gradients = add_gradients(net, "loss", ["x"])
    np.testing.assert_array_equal(run(net, {"x": np.array([-1, 0, 3, 4], FLOAT)}, gradients["x"]), [0, 0, 0.25, 0.25])


@pytest.mark.parametrize("operators, wanted, error, message", [
    ([op("Cast", ["x"], ["y"], to=1), op("AveragedLoss", ["y"], ["loss"])], "x", OperatorError,
     "Cast.*expected an operator with a gradient"),
    ([op("Sigmoid", ["x"], ["y"]), op("Copy", ["y"], ["z"]), op("Relu", ["x"], ["y"]),
      op("AveragedLoss", ["z"], ["loss"])], "x", OperatorError, "needs 'y', which a later operator overwrites"),
    ([op("SparseLengthsSum", ["x", "i", "l"], ["a"]), op("Sigmoid", ["x"], ["b"]), op("Mul", ["a", "b"], ["c"]),
      op("AveragedLoss", ["c"], ["loss"])], "x", OperatorError, "blob 'x'.*found a mix"),
    ([op("AveragedLoss", ["x"], ["other"])], "x", InputError, "loss 'loss'.*found none of this name"),
    ([op("AveragedLoss", ["x"], ["loss"])], "w", InputError, "blob 'w': expected one that 'loss' depends on"),
    ([op("Mul", ["x", "x_grad"], ["y"]), op("AveragedLoss", ["y"], ["loss"])], "x", InputError,
     "blob 'x_grad': expected a name that no gradient has"),
    ([op("Nope", ["x"], ["loss"])], "x", OperatorError, "operator 'Nope'"),
], ids=["not differentiable", "overwritten", "dense and sparse", "no loss", "unreached", "name", "unknown"])
def test_errors_name_the_place_and_leave_the_net_alone(operators, wanted, error, message):
    net = net_of(*operators)
    with pytest.raises(error, match=message):
        add_gradients(net, "loss", [wanted])
    assert signatures(net) == signatures(net_of(*operators))


@pytest.mark.parametrize("operators, wanted", [
    ([op("Sigmoid", ["w"], ["y"]), op("Scale", ["y"], ["z"]), op("Sum", ["y", "x"], ["y"]),
      op("Mul", ["y", "z"], ["p"]), op("AveragedLoss", ["p"], ["loss"])], ["w", "x"]),
    ([op("Copy", ["w"], ["y"]), op("Scale", ["y"], ["y"], scale=3.0), op("Sum", ["y", "x"], ["y"]),
      op("AveragedLoss", ["y"], ["loss"])], ["w", "x"]),
    ([op("Copy", ["w"], ["y"]), op("Scale", ["y"], ["y"], scale=3.0), op("AveragedLoss", ["y"], ["loss"])], ["w", "y"]),
], ids=["summed into", "scaled", "asked for"])
def test_a_gradient_that_is_still_needed_is_not_overwritten(operators, wanted):
    """y_grad is handed on to x as well, or asked for, before the gradient of an earlier y takes its name."""
    with pytest.raises(OperatorError, match="blob 'y_grad': a gradient that is still needed would be overwritten"):
        add_gradients(net_of(*operators), "loss", wanted)


VARIANTS = {
    "mse, cat, sigmoid": {"loss": Loss(kind="mse"), "interaction": Interaction(kind="cat"),
                          "bottom": MLP(widths=(16, 8), activation="sigmoid")},
    "bce clipped, self interaction": {"loss": Loss(clip=0.45), "interaction": Interaction(self_interaction=True)},
    "bce_logits, sigmoid": {"loss": Loss(kind="bce_logits"), "top": MLP(widths=(16, 1), activation="sigmoid")},
    "wbce, clipped": {"loss": Loss(kind="wbce", weights=(0.3, 1.7), clip=1e-3)},
    "wbce, one layer each": {"loss": Loss(kind="wbce", weights=(2.0, 0.5)), "bottom": MLP(widths=(8,)),
                             "top": MLP(widths=(1,))},
    "one table, learned": {"tables": (Table(rows=9, pooling="weighted_learned", lookups=(0, 3)),)},
    "mean, one lookup, cat": {"tables": (Table(rows=9, pooling="mean", lookups=1),),
                              "interaction": Interaction(kind="cat")},
}


def all_specs():
    return {name: load(name).capped(100) for name in preset_names()} | {
        name: load("tiny").model_copy(update=changes) for name, changes in VARIANTS.items()}


@pytest.fixture(scope="module")
def genuine_gradients(tmp_path_factory):
    """By spec: (blobs of our gradient net, gradients by Caffe2's own), both run by genuine Caffe2."""
    specs, jobs = all_specs(), []
    for spec in specs.values():
        net = gradient_net(spec)
        forward = NetDef(name="forward", op=[o for o in net.op if not o.is_gradient_op])
        del forward.op[[o.output[0] for o in forward.op].index("loss") + 1:]
        parameters = initial_parameters(spec, seed=3)
        init, feeds = init_net(spec, parameters).SerializeToString(), random_batch(spec, 8, seed=4, number=0).arrays()
        wanted = [*trained_parameters(spec), *(name.removesuffix("_grad") for name in activation_gradients(spec))]
        jobs += [legacy.Job(net.SerializeToString(), feeds, list(trace_blobs(spec).values()), init),
                 legacy.Job(forward.SerializeToString(), feeds, ["loss"], init, wanted)]
    results = legacy.run(tmp_path_factory.mktemp("genuine"), *jobs)
    return dict(zip(specs, zip(results[::2], results[1::2], strict=True), strict=True))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", all_specs())
def test_gradients_are_those_of_caffe2s_own(genuine_gradients, name):
    """The same operators on the same engine: the same bits."""
    ours, theirs = genuine_gradients[name]
    blobs = trace_blobs(all_specs()[name])
    np.testing.assert_array_equal(ours["loss"], theirs.pop("loss"))
    assert len(theirs) == len([blob for blob in blobs if "_grad" in blob])
    for key, expected in theirs.items():
        blob, part = key.split(":")
        traced = f"{blob}_grad" if f"{blob}_grad" in blobs else f"{blob}_grad_{part}"
        np.testing.assert_array_equal(ours[blobs[traced]], expected, err_msg=traced)
        assert ours[blobs[traced]].dtype == expected.dtype


@pytest.mark.engine
def test_accumulation_is_that_of_caffe2s_own(tmp_path):
    """Dense uses, and a table of two lookups: the same values in the same order."""
    feeds = {"x": np.random.default_rng(2).normal(size=(3, 4)).astype(FLOAT)}
    cases = [(THREE_USES, feeds, "x"), (two_lookups(), two_lookups_feeds(), "table")]
    jobs, blobs = [], []
    for operators, arrays, wanted in cases:
        net = net_of(*operators)
        gradient = add_gradients(net, "loss", [wanted])[wanted]
        blobs.append([gradient] if isinstance(gradient, str) else list(gradient))
        jobs += [legacy.Job(net.SerializeToString(), arrays, blobs[-1]),
                 legacy.Job(net_of(*operators).SerializeToString(), arrays, gradients_of=[wanted])]
    results = legacy.run(tmp_path, *jobs)
    for names, ours, theirs in zip(blobs, results[::2], results[1::2], strict=True):
        assert len(names) == len(theirs)
        for name, expected in zip(names, theirs.values(), strict=True):
            np.testing.assert_array_equal(ours[name], expected)
