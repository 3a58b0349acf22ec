"""Nets that others wrote, as ONNX: in the manner of facebookresearch/dlrm's script, and against genuine Caffe2."""

from pathlib import Path

import legacy
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from operator_formulas import FORMULAS, FORMULAS_OF_CAFFE2
from operator_source import Case
from test_operators import judge

from dlrm_caffe2.export import export_onnx
from dlrm_caffe2.foreign import Converted, convert_files
from dlrm_caffe2.model import init_net, predict_net
from dlrm_caffe2.net import make_operator, write_net
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, TensorProto
from spec import exported, tensor_file, toml
from spec.data.random import random_batch
from spec.errors import EngineError, InputError
from spec.parameters import initial_parameters

OF_HELPERS = {"order": "NCHW", "use_cudnn": 1, "cudnn_exhaustive_search": 0}
SIZES = {"emb:::sls0": 7, "emb:::sls1": 4}
BATCH = ("dense_in", "emb:::sls0_i", "emb:::sls0_l", "emb:::sls1_i", "emb:::sls1_l", "target")


def forward() -> list:
    """Two tables, the dot interaction, a mean squared error. Arguments in an order that ours never have."""
    ops = [make_operator("SparseLengthsSum", [f"{table}_w", f"{table}_i", f"{table}_l"], [f"{table}_z"])
           for table in SIZES]
    ops += [
        make_operator("FC", ["dense_in", "bot:::fc1_w", "bot:::fc1_b"], ["bot:::fc1_y"], **OF_HELPERS),
        make_operator("Relu", ["bot:::fc1_y"], ["dense_out"], **OF_HELPERS),
        make_operator("Concat", ["dense_out", "emb:::sls0_z", "emb:::sls1_z"], ["cat", "cat_info"], add_axis=1, axis=1),
        make_operator("BatchMatMul", ["cat", "cat"], ["matmul"], trans_b=1),
        make_operator("Flatten", ["matmul"], ["flat"], axis=1),
        make_operator("BatchGather", ["flat", "tril_indices"], ["chosen"]),
        make_operator("Concat", ["dense_out", "chosen"], ["interaction", "info"], order="NCHW"),
        make_operator("FC", ["interaction", "top:::fc1_w", "top:::fc1_b"], ["top:::fc1_y"]),
        make_operator("Sigmoid", ["top:::fc1_y"], ["prob_click"]),
        make_operator("SquaredL2Distance", ["prob_click", "target"], ["sd"]),
        make_operator("Scale", ["sd"], ["sd2"], scale=2.0),
        make_operator("AveragedLoss", ["sd2"], ["loss"]),
    ]
    for operator in ops:
        operator.device_option.device_type = 0
        operator.engine = "DEFAULT"
    return ops


def training() -> list:
    """What follows: gradients of the top layer, and updates in place; one blob is written twice."""
    return [
        make_operator("Iter", ["optim_it"], ["optim_it"], **OF_HELPERS),
        make_operator("LearningRate", ["optim_it"], ["optim_lr"], policy="fixed", base_lr=-0.5),
        make_operator("ConstantFill", ["loss"], ["loss_autogen_grad"], value=1.0),
        make_operator("AveragedLossGradient", ["sd2", "loss_autogen_grad"], ["sd2_grad"], gradient=True),
        make_operator("Scale", ["sd2_grad"], ["sd_grad"], gradient=True, scale=2.0),
        make_operator("SquaredL2DistanceGradient", ["prob_click", "target", "sd_grad"],
                      ["prob_click_grad", "target_grad"], gradient=True),
        make_operator("SigmoidGradient", ["prob_click", "prob_click_grad"], ["top_grad"], gradient=True),
        make_operator("FCGradient", ["interaction", "top:::fc1_w", "top_grad"],
                      ["top:::fc1_w_grad", "top:::fc1_b_grad", "interaction_grad"], gradient=True),
        make_operator("WeightedSum", ["top:::fc1_w", "const_one", "top:::fc1_w_grad", "optim_lr"], ["top:::fc1_w"]),
        make_operator("Adagrad", ["top:::fc1_b", "momentum", "top:::fc1_b_grad", "optim_lr"],
                      ["top:::fc1_b", "momentum"], weight_decay_=0.5, epsilon=1e-4, decay_=0.0),
        *(make_operator("Unique", [f"{table}_i"], ["unique"]) for table in SIZES),
    ]


def fill(name: str, array: np.ndarray):
    types = {"float32": "GivenTensorFill", "int32": "GivenTensorIntFill", "int64": "GivenTensorInt64Fill"}
    return make_operator(types[str(array.dtype)], [], [name], values=array.ravel().tolist(), shape=array.shape)


def weights(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"bot:::fc1_w": (5, 3), "bot:::fc1_b": (5,), "top:::fc1_w": (1, 8), "top:::fc1_b": (1,),
              "momentum": (1,)} | {f"{table}_w": (rows, 5) for table, rows in SIZES.items()}
    arrays = {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"tril_indices": np.array([3, 6, 7], np.int32)}


def batch(size: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    arrays = {"dense_in": rng.random((size, 3), np.float32), "target": rng.random((size, 1), np.float32)}
    for table, rows in SIZES.items():
        lengths = rng.integers(0, 4, size).astype(np.int32)
        arrays |= {f"{table}_l": lengths, f"{table}_i": rng.integers(0, rows, lengths.sum()).astype(np.int32)}
    return arrays


def nets(folder: Path, operators: list, **fields) -> tuple[Path, Path]:
    init = [fill(name, array) for name, array in weights().items()]
    init += [make_operator("ConstantFill", [], ["const_one"], value=1.0, shape=[1]),
             make_operator("ConstantFill", [], ["optim_it"], shape=[1], dtype=TensorProto.INT64, value=0)]
    write_net(NetDef(name="DLRM_init", op=init), folder / "init_net.pb")
    write_net(NetDef(name="DLRM", op=operators, **fields), folder / "net.pb")
    return folder / "net.pb", folder / "init_net.pb"


def convert(folder: Path, operators: list, *options: str, outputs: tuple[str, ...] = (), **fields) -> Converted:
    net, init = nets(folder, operators, **fields)
    return convert_files(net, folder, init, None, ("*_i=int32", *options), outputs)


def inputs_of(path: Path) -> dict[str, list]:
    return {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in onnx.load(path).graph.input}


@pytest.mark.engine
@pytest.mark.parametrize("size", [1, 6])
def test_every_blob_of_a_foreign_net_is_caffe2s(tmp_path: Path, size: int):
    """The bound is each operator's own, on the very inputs that the engine had; and nothing else may differ."""
    operators, feeds = [*forward(), *training()[:-2]], batch(size)
    made = tuple(dict.fromkeys(name for operator in operators for name in operator.output))
    converted = convert(tmp_path, operators, outputs=made)
    for path in converted.paths:
        onnx.checker.check_model(path, full_check=True)
    (theirs,) = legacy.run(tmp_path, legacy.Job((tmp_path / "net.pb").read_bytes(), feeds, made,
                                                init=(tmp_path / "init_net.pb").read_bytes()))
    ours = converted.run(feeds)
    assert set(made) == {name.removesuffix(".new") for name in ours}
    before = weights() | feeds | {"const_one": np.ones(1, np.float32), "optim_it": np.zeros(1, np.int64)}
    mine = {name.removesuffix(".new"): array for name, array in ours.items()}
    for found, formulas in ((mine, FORMULAS), (theirs, FORMULAS_OF_CAFFE2)):
        now = dict(before)
        for operator in operators:
            case = Case(operator, tuple(now[name].reshape(1) if name == "optim_lr" else now[name]
                                        for name in operator.input))
            now |= {name: found[name] for name in operator.output}
            judge(case, [now[name] for name in operator.output], formulas)
    for name, array in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (array.dtype, array.shape), name


def test_a_training_net_starts_from_its_init_net_and_goes_on(tmp_path: Path):
    """What it updates is an input with a default."""
    converted = convert(tmp_path, [*forward(), *training()])
    shapes = inputs_of(converted.paths[0])
    updated = {"top:::fc1_w", "top:::fc1_b", "momentum", "optim_it"}
    assert shapes.keys() == {*BATCH, *updated}
    first = converted.run(batch())
    assert updated <= {name.removesuffix(".new") for name in first} and first["optim_it.new"] == 1
    second = converted.run(batch() | {name: first[f"{name}.new"] for name in updated})
    assert second["optim_it.new"] == 2 and (second["top:::fc1_w.new"] != first["top:::fc1_w.new"]).any()
    assert "input momentum=float32[1] (has a default)" in converted.lines


def test_types_are_derived_and_axes_named(tmp_path: Path):
    converted = convert(tmp_path, forward(), "dense_in=float32[B,3]", "emb:::sls1_i=int64[?]")
    shapes = inputs_of(converted.paths[0])
    assert shapes == {"dense_in": ["B", 3], "target": ["B", 1], "emb:::sls0_l": ["B"], "emb:::sls1_l": ["B"],
                      "emb:::sls0_i": ["emb:::sls0_i.0"], "emb:::sls1_i": ["emb:::sls1_i.0"]}
    assert [line for line in converted.lines if line.startswith("output")] == [
        "output cat_info=int32[3]", "output info=int32[2]", "output loss=float32[]"]
    assert "input emb:::sls0_i=int32[emb:::sls0_i.0]" in converted.lines
    fixed = convert(tmp_path, forward(), "dense_in=float32[6,3]", outputs=("prob_click",))
    assert inputs_of(fixed.paths[0])["emb:::sls0_l"] == [6]
    assert list(fixed.run({name: array for name, array in batch().items() if name != "target"})) == ["prob_click"]


def test_our_own_nets_become_our_own_models(tmp_path: Path):
    spec = toml.load("tiny")
    parameters = initial_parameters(spec, 3)
    write_net(predict_net(spec), tmp_path / "predict_net.pb")
    write_net(init_net(spec, parameters), tmp_path / "init_net.pb")
    converted = convert_files(tmp_path / "predict_net.pb", tmp_path, tmp_path / "init_net.pb",
                              inputs=["*.indices=int64"])
    own = Converted(export_onnx(spec, parameters, tmp_path)[:2], [])
    feeds = {name: array for name, array in random_batch(spec, 9, 0, 0).arrays().items() if name != "label"}
    np.testing.assert_array_equal(converted.run(feeds)["probability"], own.run(feeds)["probability"])


def test_text_and_the_types_in_it(tmp_path: Path):
    """As facebookresearch/dlrm writes with --save-proto-types-shapes: the sizes of an example, and no init net."""
    net = NetDef(name="DLRM", op=forward())
    info = net.arg.add(name="input_shape_info")
    for name, array in (weights() | batch()).items():
        kind = TensorProto.FLOAT if array.dtype.kind == "f" else TensorProto.INT32
        info.tensors.add(name=name, data_type=kind, dims=array.shape)
    path = tmp_path / "dlrm_s_caffe2.proto"
    path.write_text(text_format.MessageToString(net))
    converted = convert_files(path, tmp_path)
    assert inputs_of(converted.paths[0])["dense_in"] == [6, 3]
    open_sizes = ["dense_in=float32[B,3]", "*_l=int32[B]", "*_i=int64[?]", "target=float32[B,1]"]
    tensor_file.write(tmp_path / "w.safetensors", {name: tensor_file.ArrayType(array.dtype, array.shape)
                                                   for name, array in weights().items()}, weights().__getitem__)
    with_values = convert_files(path, tmp_path / "out", None, tmp_path / "w.safetensors", open_sizes)
    assert set(inputs_of(with_values.paths[0])) == set(BATCH)
    feeds = batch() | {name: array.astype(np.int64) for name, array in batch().items() if name.endswith("_i")}
    expected = converted.run({name: array for name, array in (weights() | batch()).items() if name != "momentum"})
    np.testing.assert_array_equal(with_values.run(feeds)["loss"], expected["loss"])
    referring = convert_files(path, tmp_path, None, tmp_path / "w.safetensors", open_sizes)
    np.testing.assert_array_equal(referring.run(feeds)["loss"], expected["loss"])
    tensors = onnx.load(referring.paths[-1], load_external_data=False).graph.initializer
    assert {entry.value for tensor in tensors for entry in tensor.external_data
            if entry.key == "location"} == {"w.safetensors"}


def test_many_values_are_written_beside_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = convert(tmp_path, forward()).run(batch())["loss"]
    monkeypatch.setattr(exported, "EMBEDDED_BYTES", 100)
    converted = convert(tmp_path, forward())
    assert converted.paths[0] == tmp_path / "net.safetensors"
    np.testing.assert_array_equal(converted.run(batch())["loss"], expected)


def test_what_stands_in_for_an_input_is_one(tmp_path: Path):
    """mobile_exporter makes every input a zero of shape [1, 1], so that it exists."""
    net, init = nets(tmp_path, forward())
    with_inputs = NetDef.FromString(init.read_bytes())
    with_inputs.op.extend(fill(name, np.zeros((1, 1), np.float32)) for name in BATCH)
    write_net(with_inputs, init)
    assert set(inputs_of(convert_files(net, tmp_path, init, None, ["*_i=int32"]).paths[0])) == set(BATCH)


def test_a_random_fill_needs_its_values(tmp_path: Path):
    net, init = nets(tmp_path, forward())
    random = NetDef.FromString(init.read_bytes())
    random.op[0].CopyFrom(make_operator("XavierFill", [], [random.op[0].output[0]], shape=[5, 3]))
    write_net(random, init)
    with pytest.raises(InputError, match=r"init_net.pb: net 'DLRM_init': expected fills from values, found XavierFill, "
                                         r"which draws 'bot:::fc1_w' at random; pass the values .*--parameters"):
        convert_files(net, tmp_path, init, None, ["*_i=int32"])
    w = weights()["bot:::fc1_w"]
    tensor_file.write(tmp_path / "w.safetensors", {"bot:::fc1_w": tensor_file.ArrayType(w.dtype, w.shape)}, lambda _: w)
    assert convert_files(net, tmp_path, init, tmp_path / "w.safetensors", ["*_i=int32"]).run(batch())


@pytest.mark.parametrize(("operators", "options", "message"), [
    ([*forward(), make_operator("Softmax", ["loss"], ["x"]), make_operator("Conv", ["x"], ["y"])], ["*_i=int32"],
     r"net.pb: net 'DLRM': expected operators that this package knows, found others: Conv, Softmax; "),
    (forward(), [], r"undetermined: 'emb:::sls0_i' \(int32 or int64, rank 1\); 'emb:::sls1_i' \(int32 or int64, rank 1"
                    r"\); say them, for example --input 'emb:::sls0_i=int64\[\?\]'"),
    ([make_operator("Relu", ["x"], ["y"])], [], r"undetermined: 'x' \(float32, of any rank\); say them"),
    ([make_operator("FC", ["x", "w", "b"], ["y"])], [], r"'x' \(nothing known\); .*or make it with --init"),
    (forward(), ["*_j=int32"], r"--input '\*_j=int32': expected one of the net's inputs: emb:::sls0_w, .*found '\*_j'"),
    (forward(), ["target=float31"], r"--input 'target=float31': expected a type: float32, .*found 'float31'"),
    (forward(), ["target"], r"--input 'target': expected NAME=TYPE or"),
    (forward(), ["target=float32[B,-1]"], r"expected NAME=TYPE or"),
    (forward(), ["*_i=int32", "dense_in=float32[B,4]"], r"net.pb: net 'DLRM', operator 2 \(FC\): .*K = 4.*K = 3"),
    (forward(), ["*_i=float32"], r"operator 0 \(SparseLengthsSum\): .*expected int32 or int64, found float32"),
    ([make_operator("Relu", ["dense_in"], ["y"], alpha=1.0)], [], r"operator 0 \(Relu\): .*found 'alpha'"),
])
def test_what_cannot_be_converted_is_named(tmp_path: Path, operators: list, options: list[str], message: str):
    net, init = nets(tmp_path, operators)
    with pytest.raises((InputError, EngineError), match=message) as caught:
        convert_files(net, tmp_path / "out", init, None, options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_bad_files_and_outputs_are_named(tmp_path: Path):
    net, init = nets(tmp_path, forward())
    with pytest.raises(InputError, match="--output 'nothing': expected a blob that the net makes"):
        convert_files(net, tmp_path, init, None, ["*_i=int32"], ["nothing"])
    init.write_bytes(init.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"init_net.pb: expected a serialized caffe2 NetDef"):
        convert_files(net, tmp_path, init)
    net.write_text('name: "net"\nop { typ: "Relu" }\n')
    with pytest.raises(InputError, match=r"net.pb: expected a caffe2 NetDef, serialized or as text, found .*2:6.*typ"):
        convert_files(net, tmp_path)
    with pytest.raises(InputError, match=r"none.pb: expected a readable NetDef file"):
        convert_files(tmp_path / "none.pb", tmp_path)
