"""Every Operator record on its own: its ATen kernel, its type rule, what it refuses, its gradient maker."""

import json
import subprocess
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operator_cases import GENERATORS, cases
from operator_formulas import FORMULAS, FORMULAS_OF_CAFFE2, formula
from operator_refusals import REFUSALS, Refusal
from operator_source import Case

from dlrm_caffe2.engine import NetEngine
from dlrm_caffe2.engine.venv import check_installed, interpreter
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import OperatorError, read, records
from dlrm_caffe2.operators.record import GradientOps, Slice, TensorType
from dlrm_caffe2.operators.rules import no_gradient
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec.errors import EngineError

torch = pytest.importorskip("torch")

U = 2.0**-24
UNDERFLOW = 2.0**-126
"""Results below it may be flushed to zero."""

EXAMPLES = settings(max_examples=40, deadline=None)


def run_aten(case: Case) -> list[np.ndarray]:
    """Rule and kernel of a case's record, on copies of its inputs."""
    node = read(case.definition)
    operator = records()[node.type]
    types = operator.infer(node, [TensorType(array.dtype, array.shape) for array in case.inputs])
    tensors = [torch.from_numpy(array.copy()) for array in case.inputs]
    with torch.inference_mode():
        outputs = operator.aten(node, *tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(types) == len(node.outputs)
    for number, (output, type) in enumerate(zip(outputs, types, strict=True)):
        found = TensorType(np.dtype(str(output.dtype).removeprefix("torch.")), tuple(output.shape))
        assert found.dtype == type.dtype and len(found.shape) == len(type.shape), f"rule {type}, kernel {found}"
        assert all(want in (-1, have) for want, have in zip(type.shape, found.shape, strict=True))
        assert output.is_contiguous()
        for position, tensor in enumerate(tensors):
            shared = output.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() != 0
            assert shared == (operator.in_place.get(number) == position) or not tensor.numel()
    for position, (tensor, array) in enumerate(zip(tensors, case.inputs, strict=True)):
        if position not in operator.in_place.values():
            np.testing.assert_array_equal(tensor.numpy(), array, "an input was changed")
    return [output.numpy() for output in outputs]


def judge(case: Case, outputs: list[np.ndarray], formulas: Mapping = FORMULAS) -> None:
    """Every output against its formula in float64, within the roundings that float32 must make."""
    expected = formula(read(case.definition), case.inputs, formulas)
    assert len(outputs) == len(expected)
    for number, (output, (value, error)) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape == np.shape(value), f"output {number}"
        difference = abs(output.astype(np.float64) - value)
        bound = U * error + (UNDERFLOW if np.any(error) else 0)
        assert (difference <= bound).all(), f"output {number}: {difference.max()} above the bound\n{case}"


def test_every_record_has_a_case_and_a_formula():
    assert set(GENERATORS) == set(FORMULAS) == set(records())


@pytest.mark.parametrize("type", sorted(records()))
@EXAMPLES
@given(data=st.data())
def test_kernel_computes_the_formula(type: str, data: st.DataObject):
    case = data.draw(cases(type))
    judge(case, run_aten(case))


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refusal_comes_before_any_write(refusal: Refusal):
    tensors = [torch.from_numpy(array.copy()) for array in refusal.case.inputs]
    with pytest.raises(OperatorError, match=refusal.case.definition.type):
        node = read(refusal.case.definition)
        operator = records()[node.type]
        operator.infer(node, [TensorType(array.dtype, array.shape) for array in refusal.case.inputs])
        operator.aten(node, *tensors)
    for tensor, array in zip(tensors, refusal.case.inputs, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_unknown_operator_is_refused():
    with pytest.raises(OperatorError, match="'Softmax'"):
        read(make_operator("Softmax", ["x"], ["y"]))


@pytest.mark.parametrize("type", ["ScatterWeightedSum", "SparseAdagrad", "RowWiseSparseAdagrad", "Iter"])
def test_in_place_operator_must_name_its_input_as_output(type: str):
    inputs = [f"i{number}" for number in range(records()[type].inputs[0])]
    with pytest.raises(OperatorError, match="in place"):
        read(make_operator(type, inputs, [f"o{number}" for number in range(records()[type].outputs[0])]))


DIFFERENTIABLE = sorted(type for type, operator in records().items() if operator.gradient is not None)


def output_gradients(definition: OperatorDef) -> list[str | None]:
    """Names of the gradients that come in; Concat's second output has none."""
    return [None if (definition.type, number) == ("Concat", 1) else f"{name}_grad"
            for number, name in enumerate(definition.output)]


def make_gradient(definition: OperatorDef) -> GradientOps:
    node = read(definition)
    return records()[node.type].gradient(node, output_gradients(definition))


def backward(case: Case) -> tuple[GradientOps, dict[str, np.ndarray]]:
    """What the gradient maker makes of a case, and the blobs to run it on: a random gradient of each output."""
    node, rng = read(case.definition), np.random.default_rng(0)
    outputs = dict(zip(node.outputs, (value for value, _ in formula(node, case.inputs)), strict=True))
    if node.type == "Concat":
        outputs[node.outputs[1]] = outputs[node.outputs[1]].astype(np.int32)
    gradients = {f"{name}_grad": rng.normal(size=np.shape(value)) for name, value in outputs.items()}
    return make_gradient(case.definition), case.blobs | outputs | gradients


@pytest.mark.parametrize("type", [type for type in DIFFERENTIABLE if records()[type].gradient is not no_gradient])
@EXAMPLES
@given(data=st.data())
def test_gradient_is_the_derivative(type: str, data: st.DataObject):
    """Central differences of the forward formula against the gradient operators' formulas, all in float64."""
    drawn = data.draw(cases(type))
    case = Case(drawn.definition, tuple(  # away from the kinks of Relu, Clip and the logarithm's floor
        np.where(abs(x) < 1e-4, 0.1, x.astype(np.float64)) if x.dtype == np.float32 else x for x in drawn.inputs))
    assume(case.inputs[0].dtype.kind == "f")  # whole numbers have no derivative
    made, blobs = backward(case)
    for definition in made.operators:
        node = read(definition)
        values = [value for value, _ in formula(node, [blobs[name] for name in node.inputs])]
        blobs.update(zip(node.outputs, values, strict=True))

    node, rng, step = read(case.definition), np.random.default_rng(1), 1e-6

    def weighted(inputs: list[np.ndarray]) -> float:
        return sum(np.sum(value * blobs[f"{name}_grad"]) for name, (value, _) in
                   zip(node.outputs, formula(node, inputs), strict=True))

    assert len(made.gradients) == len(node.inputs)
    for position, gradient in enumerate(made.gradients):
        x = case.inputs[position]
        if gradient is None or x.dtype != np.float64:
            continue
        direction = rng.uniform(-1, 1, x.shape)
        moved = [[*case.inputs[:position], x + sign * step * direction, *case.inputs[position + 1:]]
                 for sign in (1, -1)]
        found = (weighted(moved[0]) - weighted(moved[1])) / (2 * step)
        dense = blobs[gradient] if isinstance(gradient, str) else np.zeros_like(x)
        if isinstance(gradient, Slice):
            np.add.at(dense, blobs[gradient.indices], blobs[gradient.values])
        assert dense.shape == x.shape
        size = abs(dense * direction).sum() + abs(weighted(list(case.inputs)))
        assert found == pytest.approx((dense * direction).sum(), rel=1e-6, abs=1e-6 * size + 1e-6)


# Forward definitions whose gradients are compared with those that Caffe2 itself makes.
FORWARD = [
    make_operator("FC", ["X", "W", "b"], ["Y"]),
    make_operator("FC", ["X", "W", "b"], ["Y"], axis=2),
    *(make_operator("BatchMatMul", ["A", "B"], ["C"], trans_a=a, trans_b=b) for a in (0, 1) for b in (0, 1)),
    make_operator("BatchMatMul", ["A", "A"], ["C"], trans_b=1),
    *(make_operator(type, ["X"], ["Y"]) for type in ("Relu", "Sigmoid", "Flatten", "FlattenToVec", "Copy", "Scale",
                                                     "MakeTwoClass", "Clip", "AveragedLoss", "ConstantFill")),
    make_operator("Flatten", ["X"], ["Y"], axis=1),
    make_operator("Scale", ["X"], ["Y"], scale=2.0),
    make_operator("Clip", ["X"], ["Y"], min=0.1, max=0.9),
    *(make_operator(type, ["D", "I", "L"], ["Y"], **options) for type in ("SparseLengthsSum", "SparseLengthsMean")
      for options in ({}, {"fixed_lookups": 1})),
    *(make_operator("SparseLengthsWeightedSum", ["D", "w", "I", "L"], ["Y"], **options)
      for options in ({}, {"grad_on_weights": 0}, {"grad_on_weights": 1}, {"grad_on_weights": 1, "fixed_lookups": 2})),
    *(make_operator(type, ["D", "I"], ["Y"]) for type in ("Gather", "BatchGather")),
    make_operator("Concat", ["A", "B"], ["C", "info"]),
    make_operator("Concat", ["A", "B"], ["C", "info"], axis=1, add_axis=1),
    make_operator("Split", ["A"], ["B", "C"]),
    make_operator("Split", ["A"], ["B", "C"], axis=1, split=[1, 2]),
    make_operator("Split", ["A", "L"], ["B", "C"], axis=1),
    make_operator("Sum", ["A", "B"], ["C"]),
    *(make_operator(type, ["A", "B"], ["C"]) for type in ("LabelCrossEntropy", "SigmoidCrossEntropyWithLogits",
                                                          "SquaredL2Distance", "Mul")),
    make_operator("GivenTensorFill", [], ["Y"], values=[1.0]),
    make_operator("GivenTensorInt64Fill", [], ["Y"], values=[1]),
    make_operator("GivenTensorIntFill", [], ["Y"], values=[1]),
    make_operator("GivenTensorDoubleFill", [], ["Y"], values=[1.0]),
    make_operator("GivenTensorBoolFill", [], ["Y"], values=[1]),
    make_operator("Iter", ["it"], ["it"]),
    make_operator("LearningRate", ["it"], ["lr"], base_lr=-0.1, policy="fixed"),
]


def test_every_gradient_maker_is_compared_with_caffe2():
    assert {definition.type for definition in FORWARD} == set(DIFFERENTIABLE)


@pytest.fixture(scope="module")
def genuine():
    """One worker for all cases: nothing in them depends on what ran before."""
    from dlrm_caffe2.engine.caffe2 import Caffe2Engine

    engine = Caffe2Engine()
    yield engine
    engine.close()


def run_genuine(engine: NetEngine, case: Case) -> list[np.ndarray]:
    engine.feed(case.blobs)
    engine.run_once(NetDef(name="case", op=[case.definition]))
    fetched = engine.fetch(tuple(case.definition.output))
    return [fetched[name] for name in case.definition.output]


@pytest.mark.engine
@pytest.mark.parametrize("type", sorted(records()))
@EXAMPLES
@given(data=st.data())
def test_kernel_agrees_with_caffe2(genuine: NetEngine, type: str, data: st.DataObject):
    """Both within the bound of the formula; the same bits where nothing is rounded; the same types and shapes."""
    case = data.draw(cases(type))
    ours, theirs = run_aten(case), run_genuine(genuine, case)
    judge(case, theirs, FORMULAS_OF_CAFFE2)
    judge(case, ours)
    for our, their, (_, error) in zip(ours, theirs, formula(read(case.definition), case.inputs), strict=True):
        assert (our.dtype, our.shape) == (their.dtype, their.shape)
        if not np.any(error):
            np.testing.assert_array_equal(our, their)


@pytest.mark.engine
@pytest.mark.parametrize("refusal", [refusal for refusal in REFUSALS if not refusal.here_only], ids=str)
def test_caffe2_refuses_the_same(genuine: NetEngine, refusal: Refusal):
    with pytest.raises(EngineError):
        run_genuine(genuine, refusal.case)


GRADIENTS_OF_CAFFE2 = """
import json, sys
from caffe2.proto import caffe2_pb2
from caffe2.python import core

for line in sys.stdin:
    definition, outputs = json.loads(line)
    definition = caffe2_pb2.OperatorDef.FromString(bytes.fromhex(definition))
    operators, gradients = core.GradientRegistry.GetGradientForOp(definition, outputs)
    print(json.dumps([[op.SerializeToString().hex() for op in operators], gradients]))
"""


def signature(operator: OperatorDef) -> tuple:
    arguments = sorted(argument.SerializeToString() for argument in operator.arg)
    return operator.type, list(operator.input), list(operator.output), arguments, operator.is_gradient_op


@pytest.mark.engine
def test_gradient_makers_emit_what_caffe2_emits(genuine: NetEngine):
    asked = "\n".join(json.dumps([definition.SerializeToString().hex(), output_gradients(definition)])
                      for definition in FORWARD)
    python = interpreter(check_installed())
    done = subprocess.run([python, "-c", GRADIENTS_OF_CAFFE2], input=asked, capture_output=True, text=True,
                          timeout=120, check=True)
    answers = done.stdout.splitlines()
    assert len(answers) == len(FORWARD)
    for definition, answer in zip(FORWARD, answers, strict=True):
        theirs, gradients = json.loads(answer)
        made = make_gradient(definition)
        assert [signature(ours) for ours in made.operators] == [
            signature(OperatorDef.FromString(bytes.fromhex(text))) for text in theirs], definition
        ours = [list(gradient) if isinstance(gradient, Slice) else gradient for gradient in made.gradients]
        padding = [None] * (len(ours) - len(gradients))  # Caffe2 leaves out trailing inputs that get none
        assert ours == gradients + padding, definition
