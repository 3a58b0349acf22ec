"""Exported files in every runtime that they are for: the newest and the oldest ONNX Runtime, ONNX's own reference
implementation, and OpenVINO. The suite judges what they compute from the files: forward, gradients, optimizer steps.

With DLRM_EXHAUSTIVE=1 every variant and preset is trained for 10 steps by every optimizer in all of them: 20 minutes.
"""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported_backend import FUNCTIONS, INLINED, TORCH, ExportedBackend, predict_feeds, with_outputs
from onnx_runtimes import RUNTIMES

from conformance.case import OPTIMIZERS, make_case
from conformance.run import run_case
from dlrm_caffe2.export import export_onnx
from dlrm_torch.export import export_onnx as export_torch
from spec import pooling, toml
from spec.batch import Batch
from spec.model import MLP, Interaction, Loss, ModelSpec, Table
from spec.parameters import Arrays, initial_parameters
from spec.reference import evaluate

EXHAUSTIVE = bool(os.environ.get("DLRM_EXHAUSTIVE"))
POOLINGS = ("sum", "mean", "weighted_fixed", "weighted_learned")


def tables(*lookups: int | tuple[int, int]) -> tuple[Table, ...]:
    """One of each pooling; its lookups in turn."""
    return tuple(Table(rows=20, pooling=kind, lookups=k)
                 for kind, k in zip(POOLINGS, itertools.cycle(lookups), strict=False))


VARIANTS = {
    "dot bce ragged": {"tables": tables((0, 5))},
    "self mse fixed": {"interaction": Interaction(self_interaction=True), "loss": Loss(kind="mse"),
                       "tables": tables(3)},
    "cat wbce one-hot": {"interaction": Interaction(kind="cat"), "tables": tables(1),
                         "loss": Loss(kind="wbce", clip=0.01, weights=(0.5, 2.0))},
    "sigmoid logits mixed": {"bottom": MLP(widths=(16, 8), activation="sigmoid"), "loss": Loss(kind="bce_logits"),
                             "tables": tables(1, (0, 40), 2)},
}
PRESETS = toml.preset_names()
IN = [pytest.param(name, marks=pytest.mark.oldest if name == "onnxruntime-1.16" else ()) for name in RUNTIMES]
WHOLE = pytest.mark.skipif(not EXHAUSTIVE, reason="takes minutes: DLRM_EXHAUSTIVE=1")


def spec_of(name: str) -> ModelSpec:
    """A preset has few rows here, which are looked up often: at its own rate 10 steps would saturate its model."""
    if name in PRESETS:
        return toml.load(name).capped(20).with_optimizer("sgd", 0.01)
    return toml.load("tiny").model_copy(update=VARIANTS[name])


def endings(runtime: str) -> tuple[str, ...]:
    """OpenVINO knows no functions."""
    return (INLINED,) if runtime == "openvino" else (FUNCTIONS, INLINED)


def optimizers(name: str, runtime: str) -> tuple[str, ...]:
    """All of them in the newest runtime; in the others one for each variant, in turn: the product takes long."""
    if EXHAUSTIVE or runtime == "onnxruntime":
        return OPTIMIZERS
    return (OPTIMIZERS[list(VARIANTS).index(name) % len(OPTIMIZERS)],)


def conforms(spec: ModelSpec, backend: ExportedBackend, kinds: tuple[str, ...], steps: int, size: int) -> bool:
    result = run_case(make_case(spec, batch_size=size, steps=steps, optimizers=kinds), [backend])
    assert result.backends[0].elements > 1000
    return result.conforms


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("runtime", IN)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_interaction_loss_and_pooling_trains(name: str, runtime: str, files: Path):
    backend = ExportedBackend(runtime, files, endings(runtime))
    assert conforms(spec_of(name), backend, optimizers(name, runtime), 10, 5)


@WHOLE
@pytest.mark.slow
@pytest.mark.parametrize("runtime", IN)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name: str, runtime: str, files: Path):
    assert conforms(spec_of(name), ExportedBackend(runtime, files, endings(runtime)), OPTIMIZERS, 10, 3)


@pytest.mark.parametrize("name", [*VARIANTS, *PRESETS])
def test_openvino_predicts(name: str, files: Path):
    backend = ExportedBackend("openvino", files, endings("openvino"), trains=False)
    assert conforms(spec_of(name), backend, (), 0, 20)


@pytest.mark.parametrize("runtime", IN)
@pytest.mark.parametrize("name", [*VARIANTS, *PRESETS])
def test_what_pytorch_exports_predicts(name: str, runtime: str, files: Path):
    assert conforms(spec_of(name), ExportedBackend(runtime, files, (TORCH,)), (), 0, 20)


def test_the_readmes_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (script,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "onnxruntime" in block)
    monkeypatch.chdir(tmp_path)
    spec = toml.load("tiny")
    export_onnx(spec, initial_parameters(spec), Path("models"))
    names: dict = {}
    exec(script, names)
    batch = Batch.from_arrays(spec, names["batch"] | {"label": np.zeros((2, 1), np.float32)})
    expected = evaluate(spec, initial_parameters(spec), batch, gradients=False).tensors["probability"]
    (found,) = eval(capsys.readouterr().out, {"array": np.array, "float32": np.float32})
    assert found.shape == (2, 1) and (abs(found - expected.value) <= expected.reach + 1e-7).all()


BAGS = {
    "no samples": [], "one empty bag": [0], "all empty": [0] * 5, "one bag of one": [1], "one-hot": [1] * 9,
    "empty first": [0, 0, 3, 1], "empty in the middle": [2, 0, 0, 4], "empty last": [3, 1, 0, 0],
    "three turns": [257, 1, 0], "skewed": [1, 700, 0, 3, 90], "one giant bag": [0, 1, 100_000, 2],
}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory):
    """A model of ragged tables, one of each pooling, and the files that return what they pool and the probability."""
    spec = toml.load("tiny").model_copy(update={"tables": tables((0, 9))})
    parameters, folder = initial_parameters(spec, 1), tmp_path_factory.mktemp("ragged")
    export_onnx(spec, parameters, folder)
    export_torch(spec, parameters, folder)
    names = [*(f"tables.{number}.pooled" for number in range(len(spec.tables))), "probability"]
    for ending in (FUNCTIONS, INLINED, TORCH):
        path = folder / f"model{ending}"
        onnx.save(with_outputs(onnx.load(path), names), path)
    return spec, parameters, folder


def bags_of(spec: ModelSpec, lengths: list[int]) -> Batch:
    """The same bags in every table; 20 rows, so that most are looked up several times."""
    rng = np.random.default_rng(0)
    sizes = np.array(lengths, np.int32)
    indices = tuple(rng.integers(0, table.rows, sizes.sum()) for table in spec.tables)
    return Batch(rng.random((len(sizes), spec.dense_features), np.float32), indices, (sizes,) * len(spec.tables),
                 np.zeros((len(sizes), 1), np.float32))


def judge_bags(spec: ModelSpec, parameters: Arrays, batch: Batch, found: Arrays) -> None:
    for number, table in enumerate(spec.tables):
        name = f"tables.{number}"
        expected = pooling.forward(table, parameters[f"{name}.weight"], parameters.get(f"{name}.pooling"),
                                   batch.indices[number], batch.lengths[number])
        pooled = found[f"{name}.pooled"]
        assert pooled.shape == expected.value.shape
        assert (abs(pooled - expected.value) <= expected.reach).all(), table.pooling
        assert not pooled[batch.lengths[number] == 0].any()
    assert found["probability"].shape == (batch.size, 1)
    if batch.size:
        expected = evaluate(spec, parameters, batch, gradients=False).tensors["probability"]
        assert (abs(found["probability"] - expected.value) <= expected.reach).all()


@pytest.mark.parametrize("runtime", IN)
def test_one_session_takes_bags_of_any_sizes(runtime: str, ragged):
    for ending in (*endings(runtime), TORCH):
        judge_ragged(runtime, ending, *ragged)


def judge_ragged(runtime: str, ending: str, spec: ModelSpec, parameters: Arrays, folder: Path) -> None:
    session = RUNTIMES[runtime](folder / f"model{ending}")
    for case, lengths in BAGS.items():
        if not lengths and runtime == "reference":
            continue  # its Flatten fails on a tensor without elements
        batch = bags_of(spec, lengths)
        try:
            for _ in range(2):  # the second run reuses the memory of the first
                judge_bags(spec, parameters, batch, session(predict_feeds(batch)))
        except Exception as error:
            error.add_note(f"{ending}, {case}")
            raise
