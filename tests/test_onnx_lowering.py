"""Each operator's lowering to ONNX, judged by its formula in ONNX Runtime and in ONNX's reference."""


import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import adds_by_scattering, check, in_onnxruntime, in_reference
from operator_cases import cases
from operator_source import Case, make_case
from test_operators import judge, run_aten

from dlrm_caffe2.onnx.axes import Axes
from dlrm_caffe2.onnx.convert import export_net, inline
from dlrm_caffe2.operators import records
from dlrm_caffe2.proto.caffe2_pb2 import NetDef

LOWERED = sorted(type for type, operator in records().items() if operator.onnx)


def case_model(case: Case) -> onnx.ModelProto:
    """One operator; all its inputs are the model's, of sizes that the model does not know."""
    inputs, sizes = {}, {}
    for name, array in case.blobs.items():
        axes = tuple(f"{name}.{axis}" for axis in range(array.ndim))
        inputs[name] = Axes(array.dtype, axes)
        sizes |= zip(axes, array.shape, strict=True)
    net = NetDef(name="case", op=[case.definition], external_output=case.definition.output)
    return export_net(net, {}, inputs, sizes=sizes)


def fails_in_reference(flat: onnx.ModelProto, case: Case) -> bool:
    """ONNX's reference cannot flatten a tensor without elements."""
    return any(node.op_type == "Flatten" for node in flat.graph.node) and not all(x.size for x in case.inputs)


def judge_lowering(case: Case) -> None:
    """ONNX Runtime on both forms, and ONNX's reference, against the formula; types and shapes against the kernel."""
    model = case_model(case)
    flat = inline(model)
    assert not flat.functions and {imported.domain for imported in flat.opset_import} == {""}
    kernel = run_aten(case)
    for form in (model, flat):
        check(form)
        assert not adds_by_scattering(form)
        runs = [in_onnxruntime(form, case.blobs)]
        if not fails_in_reference(flat, case):
            runs.append(in_reference(form, case.blobs))
        for outputs in runs:
            judge(case, outputs)
            assert [(y.dtype, y.shape) for y in outputs] == [(y.dtype, y.shape) for y in kernel]


@pytest.mark.parametrize("type", LOWERED)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lowering(type: str, data: st.DataObject):
    judge_lowering(data.draw(cases(type)))


def test_every_operator_is_lowered():
    assert set(LOWERED) == set(records())


def bags(type: str, lengths: list[int], seed: int = 0, rows: int = 50, dtype: type = np.int64,
         **arguments: int) -> Case:
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    weights = [rng.normal(size=count).astype(np.float32)] if "Weighted" in type else []
    return make_case(type, [rng.normal(size=(rows, 3)).astype(np.float32), *weights,
                            rng.integers(0, rows, count).astype(dtype), np.array(lengths, np.int32)], **arguments)


LOOKUPS = ["SparseLengthsSum", "SparseLengthsMean", "SparseLengthsWeightedSum"]

RAGGED = {
    "no bags": [], "one empty bag": [0], "all empty": [0] * 5, "one bag of one": [1], "one-hot": [1] * 9,
    "empty at both ends": [0, 3, 0, 0, 2, 0], "a full tile": [16], "a tile and one": [17, 0, 16], "two turns": [256],
    "three turns": [257, 1, 0], "one giant bag": [0, 1, 5000, 2], "skewed": [1, 700, 0, 3, 90],
}


@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("type", LOOKUPS)
def test_ragged_bags(type: str, dtype: type, lengths: list[int]):
    judge_lowering(bags(type, lengths, dtype=dtype))


def test_one_model_takes_bags_of_any_sizes():
    model = case_model(bags("SparseLengthsSum", [2, 0, 1]))
    for seed, lengths in enumerate(RAGGED.values()):
        case = bags("SparseLengthsSum", lengths, seed)
        judge(case, in_onnxruntime(model, case.blobs))


@pytest.mark.parametrize("k", [1, 2, 50])
@pytest.mark.parametrize("type", LOOKUPS)
def test_bags_of_a_fixed_size(type: str, k: int):
    """One model for any number of bags, without sorting them out; it refuses bags of other sizes."""
    model = case_model(bags(type, [k] * 3, fixed_lookups=k))
    kinds = {node.op_type for node in inline(model).graph.node}
    assert {"Loop", "ScatterND", "MatMul"}.isdisjoint(kinds) and ("ReduceSum" in kinds) == (k > 1)
    for size in (0, 1, 100):
        case = bags(type, [k] * size, fixed_lookups=k)
        judge(case, in_onnxruntime(model, case.blobs))
        judge(case, in_reference(model, case.blobs))
    for lengths in ([k - 1, k + 1], [0] + [k] * 3 + [2 * k], [k + 1, k, k - 1]):
        case = bags(type, lengths)
        for run in (in_onnxruntime, in_reference):
            with pytest.raises(Exception, match=r"(?i)shape|squeeze"):
                run(model, case.blobs)


def test_relu_gradient_is_zero_where_the_output_is_whatever_comes_back():
    """Also an infinity or NaN, which times 0 would be NaN."""
    y, dy = np.float32([0, 0, 0, 0, 1, 1, 1, 1]), np.float32([np.inf, -np.inf, np.nan, 1] * 2)
    case = make_case("ReluGradient", [y, dy])
    for run in (in_onnxruntime, in_reference):
        for form in (case_model(case), inline(case_model(case))):
            np.testing.assert_array_equal(run(form, case.blobs)[0], np.where(y > 0, dy, 0))


def heavy(type: str) -> Case:
    """100,000 indices into 100 rows of 64: there ScatterND(reduction=add) loses updates on two threads. Into 1000 rows
    for what takes a turn for each time that a row is listed."""
    rng, count, width = np.random.default_rng(0), 100_000, 64
    rows = 1000 if type.endswith("SparseAdagrad") else 100
    table, values = (rng.normal(size=(size, width)).astype(np.float32) for size in (rows, count))
    indices = rng.integers(0, rows, count)
    if type.startswith("SparseLengths"):
        lengths = rng.multinomial(count, rng.dirichlet(np.full(500, 0.3))).astype(np.int32)
        if "Gradient" in type:
            dy = rng.normal(size=(500, width)).astype(np.float32)
            return make_case(type, [dy, lengths, indices])
        return make_case(type, [table, indices, lengths])
    if type == "UnsortedSegmentSum":
        return make_case(type, [values, indices.astype(np.int32)])
    if type == "ScatterWeightedSum":
        return make_case(type, [table, np.float32([1]), indices, values, np.float32([-0.1])])
    if type.endswith("SparseAdagrad"):
        moment = np.zeros(rows if type.startswith("RowWise") else (rows, width), np.float32)
        return make_case(type, [table, moment, indices, values, np.float32([-0.1])], 2, epsilon=1e-5)
    assert type == "BatchGatherGradient"
    return make_case(type, [np.zeros((width, rows), np.float32), indices, np.ascontiguousarray(values.T)])


@pytest.mark.parametrize("type", ["SparseLengthsSum", "SparseLengthsIndicesInGradientSumGradient",
                                  "UnsortedSegmentSum", "ScatterWeightedSum", "SparseAdagrad", "RowWiseSparseAdagrad",
                                  "BatchGatherGradient"])
def test_sums_are_the_same_in_every_run_on_two_threads(type: str):
    case = heavy(type)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(case_model(case).SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    first = session.run(None, case.blobs)
    judge(case, first)
    for _ in range(19):
        for again, output in zip(session.run(None, case.blobs), first, strict=True):
            np.testing.assert_array_equal(again, output)
