"""Operators that the embedded engine takes together (engine/fused.py): what they compute one by one, and when they are
taken, left alone, or refused."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from dlrm_caffe2.engine.aten import AtenEngine
from dlrm_caffe2.engine.fused import mark
from dlrm_caffe2.engine.fusions import FUSIONS
from dlrm_caffe2.engine.plan import Stretch
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import kernels, read, record
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec import toml
from spec.backend import load_backend
from spec.data.random import random_batch
from spec.errors import EngineError
from spec.parameters import initial_parameters

Blobs = Mapping[str, np.ndarray]
RNG = np.random.default_rng(0)
SPREAD = "SparseLengthsIndicesInGradientSumGradient"


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def scalar(value: float) -> np.ndarray:
    return np.full(1, value, np.float32)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """For each time that operators might have been taken together: the type, how many, and whether they were."""
    seen: list[tuple[str, int, bool]] = []
    ask = AtenEngine._run_fused

    def noted(self: AtenEngine, stretch: Stretch, known: bool) -> bool:
        seen.append((stretch.type, len(stretch.steps), ask(self, stretch, known)))
        return seen[-1][2]

    monkeypatch.setattr(AtenEngine, "_run_fused", noted)
    return seen


def net(operators: Sequence[OperatorDef], wanted: Sequence[str]) -> NetDef:
    return NetDef(name="net", op=operators, external_output=wanted)


def run(made: NetDef, feeds: Blobs, times: int = 2) -> Blobs:
    engine = AtenEngine()
    engine.feed(feeds)
    engine.create(made)
    for _ in range(times):
        engine.run("net", {})
    return engine.fetch(made.external_output)


def compare(operators: Sequence[OperatorDef], feeds: Blobs, wanted: Sequence[str]) -> None:
    plain = net(operators, wanted)
    expected = run(plain, feeds)
    for name, array in run(mark(plain), feeds).items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
        np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


LAYER = [make_operator("FC", ["x", "w", "b"], ["z"]), make_operator("Relu", ["z"], ["z"])]
STEPS = [make_operator("WeightedSum", ["w", "one", "dw", "rate"], ["w"]),
         make_operator("WeightedSum", ["b", "one", "db", "rate"], ["b"])]


def layer(samples: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {"x": floats(samples, inputs), "w": floats(outputs, inputs), "b": floats(outputs), "one": scalar(1),
            "y": floats(samples, outputs), "dy": floats(samples, outputs), "rate": scalar(-0.01)}


def test_layer(taken: list):
    compare(LAYER, layer(5, 3, 4), ["z"])
    assert taken == [("FC", 2, True)] * 2


@pytest.mark.parametrize("sizes", [(5, 3, 4), (300, 13, 70), (200, 70, 80)], ids=["thin", "many", "product added"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_gradient_of_a_layer_and_its_step(sizes: tuple[int, int, int], hidden: bool, first: bool, taken: list):
    relu = [make_operator("ReluGradient", ["y", "dy"], ["dz"])] if hidden else []
    dx = [] if first else ["dx"]
    gradient = make_operator("FCGradient", ["x", "w", "dz" if hidden else "dy"], ["dw", "db", *dx])
    compare([*relu, gradient, *STEPS], layer(*sizes), ["w", "b", *dx])
    assert taken == [("FCGradient", 3 + hidden, True)] * 2


def test_a_step_follows_its_gradient_at_once(taken: list):
    """Though other operators lie between; not past one that reads the weight."""
    gradient = make_operator("FCGradient", ["x", "w", "dy"], ["dw", "db", "dx"])
    other = make_operator("Sigmoid", ["dx"], ["s"])
    compare([gradient, other, *STEPS], layer(5, 3, 4), ["w", "b", "s"])
    assert taken == [("FCGradient", 3, True)] * 2
    taken.clear()
    compare([gradient, make_operator("FC", ["x", "w", "b"], ["s"]), *STEPS], layer(5, 3, 4), ["w", "b", "s", "dx"])
    assert taken == []


GATHERS = [make_operator("Gather", [f"t{n}", f"i{n}"], [f"g{n}"]) for n in range(2)]
JOIN = make_operator("Concat", ["x", "g0", "g1"], ["f", "lengths"], axis=1, add_axis=1)


def tables(samples: int, width: int, dtype: type = np.int64) -> dict[str, np.ndarray]:
    return {"x": floats(samples, width), "t0": floats(7, width), "t1": floats(3, width),
            "i0": RNG.integers(0, 7, samples).astype(dtype), "i1": RNG.integers(0, 3, samples).astype(np.int64)}


@pytest.mark.parametrize("width", [3, 16, 40])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_beside_each_other(width: int, dtype: type, taken: list):
    feeds = tables(70, width, dtype)
    compare([*GATHERS, JOIN], feeds, ["f", "lengths"])
    assert taken == [("Gather", 3, True)] * 2


@pytest.mark.parametrize("changes", [{"i0": np.array([0, -1] * 35)}, {"i0": np.zeros((70, 1), np.int64)}],
                         ids=["counted from the end", "a matrix of indices"])
def test_rows_that_are_gathered_one_by_one(changes: Blobs, taken: list):
    feeds = tables(70, 4) | changes
    join = JOIN if feeds["i0"].ndim == 1 else make_operator("Concat", ["g0"], ["f", "lengths"], axis=1, add_axis=1)
    compare([*GATHERS, join], feeds, ["f"])
    assert not any(together for *_, together in taken)


INTERACTION = [
    make_operator("BatchMatMul", ["f", "f"], ["products"], trans_b=1), make_operator("Flatten", ["products"], ["flat"]),
    make_operator("BatchGather", ["flat", "pairs"], ["chosen"]),
    make_operator("Concat", ["x", "chosen"], ["y", "lengths"], axis=1)]


def features(samples: int, vectors: int, width: int) -> dict[str, np.ndarray]:
    pairs = [i * vectors + j for i in range(vectors) for j in range(i)]
    return {"f": floats(samples, vectors, width), "x": floats(samples, 5), "pairs": np.array(pairs)}


@pytest.mark.parametrize("width", [3, 16, 40])
def test_interaction(width: int, taken: list):
    compare(INTERACTION, features(70, 6, width), ["y"])
    assert taken == [("BatchMatMul", 4, True)] * 2


def test_a_product_has_the_same_bits_in_a_net_that_is_traced():
    feeds = features(70, 6, 20)
    whole = run(net(INTERACTION, ["products", "y"]), feeds)
    np.testing.assert_array_equal(run(mark(net(INTERACTION, ["y"])), feeds)["y"], whole["y"])
    expected = feeds["f"].astype(np.float64) @ feeds["f"].astype(np.float64).transpose(0, 2, 1)
    np.testing.assert_allclose(whole["products"].reshape(70, 6, 6), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beyond", [make_operator("ConstantFill", ["label"], ["d"], value=0.0),
                                    make_operator("Scale", ["dy"], ["d"], scale=2.0)], ids=["zeros", "doubles"])
@pytest.mark.parametrize("width", [3, 16, 40])
def test_gradient_of_the_interaction(beyond: OperatorDef, width: int, taken: list):
    vectors, columns = 4, 9
    last = columns + (1 if beyond.type == "ConstantFill" else columns)
    feeds = {"label": floats(70, 1), "dy": floats(70, columns), "f": floats(70, vectors, width),
             "places": RNG.integers(0, last, (vectors, vectors))}
    pieces = [f"p{n}" for n in range(vectors)]
    compare([beyond, make_operator("Concat", ["dy", "d"], ["c", "lengths"], axis=1),
             make_operator("BatchGather", ["c", "places"], ["both"]),
             make_operator("BatchMatMul", ["both", "f"], ["df"]),
             make_operator("Split", ["df"], pieces, axis=1, add_axis=1)], feeds, pieces)
    assert taken == [("BatchMatMul", 5, True)] * 2


LOSS = [
    make_operator("MakeTwoClass", ["p"], ["classes"]), make_operator("FlattenToVec", ["label"], ["flat"]),
    make_operator("Cast", ["flat"], ["class"], to=2),
    make_operator("LabelCrossEntropy", ["classes", "class"], ["terms"]),
    make_operator("AveragedLoss", ["terms"], ["loss"]), make_operator("ConstantFill", ["loss"], ["start"], value=1.0),
    make_operator("AveragedLossGradient", ["terms", "start"], ["dterms"]),
    make_operator("LabelCrossEntropyGradient", ["classes", "class", "dterms"], ["dclasses"]),
    make_operator("MakeTwoClassGradient", ["dclasses"], ["dp"]),
    make_operator("SigmoidGradient", ["p", "dp"], ["dz"])]


def test_cross_entropy(taken: list):
    samples = 5000  # more than one turn
    p = (1 / (1 + np.exp(-5 * RNG.normal(size=(samples, 1))))).astype(np.float32)
    p[:4, 0] = 0, 1, 0, 1  # saturated, with both labels
    label = RNG.integers(0, 2, (samples, 1)).astype(np.float32)
    label[:4, 0] = 0, 0, 1, 1
    compare(LOSS, {"p": p, "label": label}, ["loss", "dz"])
    assert taken == [("LabelCrossEntropy", 10, True)] * 2


def test_a_nan_stays_one():
    p = np.array([[np.nan], [0.5]], np.float32)
    assert np.isnan(run(mark(net(LOSS, ["loss", "dz"])), {"p": p, "label": np.ones((2, 1), np.float32)})["loss"])


def test_labels_between_the_classes_are_cut_off_one_by_one(taken: list):
    compare(LOSS, {"p": np.full((2, 1), 0.3, np.float32), "label": np.array([[0.5], [1]], np.float32)}, ["loss", "dz"])
    assert taken == [("LabelCrossEntropy", 10, False)] * 2


def updates(width: int, ragged: bool) -> tuple[list[OperatorDef], dict[str, np.ndarray]]:
    """Of two tables; rows that repeat, and in bags some that are empty."""
    feeds, operators = {"one": scalar(1), "rate": scalar(-0.1)}, []
    for n, rows in enumerate((9, 4)):
        lengths = RNG.integers(0, 5, 60).astype(np.int32)
        count = lengths.sum() if ragged else 60
        feeds |= {f"t{n}": floats(rows, width), f"i{n}": RNG.integers(0, rows, count), f"v{n}": floats(60, width)}
        if ragged:
            feeds[f"n{n}"] = lengths
            operators.append(make_operator(SPREAD, [f"v{n}", f"n{n}", f"i{n}"], [f"s{n}"]))
    for n in range(2):
        operators.append(make_operator("ScatterWeightedSum", [
            f"t{n}", "one", f"i{n}", f"{'s' if ragged else 'v'}{n}", "rate"], [f"t{n}"]))
    return operators, feeds


@pytest.mark.parametrize("width", [1, 16, 40])
@pytest.mark.parametrize("ragged", [False, True])
def test_updates_of_rows(width: int, ragged: bool, taken: list):
    compare(*updates(width, ragged), ["t0", "t1"])
    assert taken == [("ScatterWeightedSum", 4 if ragged else 2, True)] * 2


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_updates_of_rows_have_the_same_bits_with_any_number_of_threads(threads: int):
    table, indices, values = (torch.from_numpy(x) for x in (floats(6, 20), RNG.integers(0, 6, 400), floats(400, 20)))
    expected = table.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    kernels.add_rows([expected], [indices], [values], -0.1)
    torch.set_num_threads(threads)
    kernels.add_rows([table], [indices], [values], -0.1)
    torch.set_num_threads(before)
    assert torch.equal(table, expected)


def test_a_table_that_is_updated_twice_is_updated_in_order(taken: list):
    operators, feeds = updates(3, False)
    compare([operators[0], operators[0]], feeds, ["t0"])
    assert {count for _, count, _ in taken} == {1}


def test_old_rows_with_a_weight(taken: list):
    operators, feeds = updates(3, False)
    compare(operators, feeds | {"one": scalar(0.5)}, ["t0", "t1"])
    assert not any(together for *_, together in taken)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_row_beyond_a_table_is_an_error_and_nothing_is_written(ragged: bool):
    operators, feeds = updates(3, ragged)
    engine = AtenEngine()
    engine.feed(feeds)
    engine.create(mark(net(operators, ["t0", "t1"])))
    engine.run("net", {})
    before = engine.fetch(["t1"])["t1"]
    bad = feeds["i1"].copy()
    bad[-1] = 4
    with pytest.raises(EngineError, match=r"operator \d \(ScatterWeightedSum\): .*index 4 is out of bounds"):
        engine.run("net", {"i1": bad})
    np.testing.assert_array_equal(engine.fetch(["t1"])["t1"], before)


def test_lengths_that_do_not_add_up_are_an_error():
    operators, feeds = updates(3, True)
    engine = AtenEngine()
    engine.feed(feeds)
    engine.create(mark(net(operators, ["t0", "t1"])))
    with pytest.raises(EngineError, match=rf"\({SPREAD}\): .*the sum of lengths"):
        engine.run("net", {"n1": feeds["n1"] + np.int32(1)})


def test_shapes_are_checked_before_anything_is_taken_together():
    engine = AtenEngine()
    engine.feed(layer(5, 3, 4))
    engine.create(mark(net(LAYER, ["z"])))
    engine.run("net", {})
    with pytest.raises(EngineError, match=r"operator 0 \(FC\): .*dimension mismatch"):
        engine.run("net", {"x": floats(5, 2)})


def test_what_somebody_wants_or_reads_is_made(taken: list):
    plain = net(LAYER, ["z"])
    gradient = make_operator("FCGradient", ["x", "w", "dy"], ["dw", "db"])
    found = run(mark(net([gradient, *STEPS], ["w", "b", "dw"])), layer(5, 3, 4))
    assert found["dw"].shape == (4, 3) and taken == []
    run(mark(net([gradient, *STEPS, make_operator("Sigmoid", ["db"], ["s"])], ["w", "b", "s"])), layer(5, 3, 4))
    assert taken == []
    run(plain, layer(5, 3, 4))
    assert taken == [], "a net that is not marked"


def test_criteos_step_is_fused_also_where_bags_differ_in_size(taken: list):
    for name, gather in (("criteo-kaggle", [("Gather", 27, True)]), ("paper-benchmark", [])):
        spec = toml.load(name).capped(50)
        model = load_backend("caffe2-aten").create(spec, initial_parameters(spec))
        taken.clear()
        for number in range(3):
            model.train_step(random_batch(spec, 8, 0, number))
        model.close()
        assert set(gather) <= set(taken) and all(together for *_, together in taken)
        assert {type for type, *_ in taken} >= {"FC", "BatchMatMul", "FCGradient", "ScatterWeightedSum"}


def test_classes_that_are_not_one_a_sample_are_left_to_the_operators(taken: list):
    """p [B, 2] makes four classes of each sample, and there are fewer labels than numbers."""
    feeds = {"p": np.full((6, 2), 0.3, np.float32), "label": np.ones((6, 1), np.float32)}
    compare(LOSS, feeds, ["loss", "dz"])
    assert taken == [("LabelCrossEntropy", 10, False)] * 2
    fused = next(fusion for fusion in FUSIONS if "MakeTwoClass" in fusion.types.pattern).match(list(map(read, LOSS)))
    assert fused.run(torch.full((6, 2), 0.3), torch.ones(12, 1)[:6]) is None, "what lies behind a label is none"


def test_a_table_of_one_row_however_it_lies(taken: list):
    """The stride of a dimension of size 1 says nothing of the row."""
    table, indices, values = torch.zeros(20, 1).t(), torch.zeros(3, dtype=torch.int64), torch.ones(3, 20)
    assert table.shape == (1, 20) and table.stride(0) == 1 and table.is_contiguous()
    kernels.add_rows([table], [indices], [values], 2.0)
    assert (table == 6).all()


@pytest.mark.parametrize("type", ["Gather", "ScatterWeightedSum"])
def test_indices_that_lie_apart(type: str):
    """A loop would read what lies between them."""
    apart = torch.tensor([1, 2, 0, 2])[::2]
    node = read(GATHERS[0] if type == "Gather" else updates(4, False)[0][0])
    if type == "Gather":
        fused = next(fusion for fusion in FUSIONS if fusion.types.match("Gather Concat ")).match(
            [node, read(make_operator("Concat", ["g0"], ["f", "lengths"], axis=1, add_axis=1))])
        assert fused.run(torch.ones(3, 4), apart) is None
    else:
        found = record(type).aten(node, torch.zeros(3, 4), torch.ones(1), apart, torch.ones(2, 4), torch.ones(1))
        assert found.sum(1).tolist() == [4, 4, 0]


def test_what_one_of_them_makes_is_not_read_from_before(taken: list):
    """Concat's first input is the matrix that Flatten has just made; a gathered row is the next one's table."""
    feeds = features(7, 4, 5)
    join = make_operator("Concat", ["flat", "chosen"], ["y", "lengths"], axis=1)
    compare([*INTERACTION[:3], join], feeds | {"flat": floats(7, 16)}, ["y"])
    assert taken == []
    chained = [make_operator("Gather", ["t0", "i0"], ["t1"]), make_operator("Gather", ["t1", "i1"], ["g1"])]
    feeds = {name: array for name, array in tables(6, 4).items() if name != "x"}
    compare([*chained, make_operator("Concat", ["t1", "g1"], ["f", "lengths"], axis=1, add_axis=1)], feeds, ["f"])
    assert {count for _, count, _ in taken} == {2}, "the second row and the join"


def test_biases_of_another_shape_are_left_to_the_operators(taken: list):
    """WeightedSum compares sizes alone."""
    gradient = make_operator("FCGradient", ["x", "w", "dy"], ["dw", "db"])
    feeds = layer(5, 3, 4)
    compare([gradient, *STEPS], feeds | {"b": feeds["b"][:, None]}, ["w", "b"])
    assert not any(together for *_, together in taken)


def test_a_sum_of_one_tensor_is_no_step():
    assert len(mark(net([make_operator("WeightedSum", ["w", "one"], ["w"])], ["w"])).op) == 1
