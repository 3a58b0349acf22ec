"""Training steps in exported files with the bags that are hard: empty, huge, or of rows that are not finite."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from exported_backend import FUNCTIONS, INLINED, TORCH, ExportedBackend, predict_feeds, with_outputs
from onnx_runtimes import RUNTIMES
from test_onnx_reach import IN, bags_of, endings, tables

from conformance.case import OPTIMIZERS, make_case
from conformance.run import run_case
from dlrm_caffe2.export import export_onnx
from dlrm_torch.export import forward_model, write_model
from spec import toml
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import initial_parameters, initial_state, is_sparse, state_shapes

RAGGED = toml.load("tiny").model_copy(update={"tables": tables((0, 9))})


@pytest.mark.parametrize("runtime", IN)
def test_steps_of_any_batch_in_one_session(runtime: str, tmp_path: Path):
    """Also of one bag of 100,000 beside empty ones, of empty bags alone, and of one sample."""
    case = make_case(RAGGED, batch_size=4, steps=4, optimizers=OPTIMIZERS[:1])
    batches = [bags_of(RAGGED, lengths) for lengths in ([0, 1, 100_000, 0], [0] * 5, [1], [0])]
    backend = ExportedBackend(runtime, tmp_path, endings(runtime)[-1:])
    assert run_case(replace(case, batches=batches), [backend]).conforms


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_no_samples_changes_nothing(kind: str, tmp_path: Path):
    spec = RAGGED.with_optimizer(kind, 0.1)
    variables = initial_parameters(spec) | initial_state(spec)
    export_onnx(spec, initial_parameters(spec), tmp_path)
    for ending in (FUNCTIONS, INLINED):
        outputs = RUNTIMES["onnxruntime"](tmp_path / f"train{ending}")(bags_of(spec, []).arrays() | variables)
        assert outputs.pop("loss") == 0 and outputs
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, variables[name.removesuffix(".new")], err_msg=name)


LOOKED_UP = {"one-hot": tables(1), "fixed": tables(3), "ragged": tables((0, 40))}
BAD_ROW, SAMPLES = 7, 6


def poisoned(lookups: str) -> tuple[ModelSpec, dict[str, np.ndarray], dict[str, np.ndarray], Batch]:
    """A model, its parameters, the same with one row of each table not finite, and a batch whose first sample alone
    looks these up, once among others."""
    spec = toml.load("tiny").model_copy(update={"tables": LOOKED_UP[lookups]})
    good = initial_parameters(spec, 1)
    bad = {name: array.copy() for name, array in good.items()}
    for number in range(len(spec.tables)):
        bad[f"tables.{number}.weight"][BAD_ROW] = np.resize(np.float32([np.nan, np.inf, -np.inf]), spec.embedding_dim)
    lengths = {"one-hot": [1] * SAMPLES, "fixed": [3] * SAMPLES, "ragged": [3, 0, 40, 1, 2, 17]}[lookups]
    batch = bags_of(spec, lengths)
    indices = tuple(np.where(array == BAD_ROW, BAD_ROW + 1, array) for array in batch.indices)
    for array in indices:
        array[0] = BAD_ROW
    return spec, good, bad, replace(batch, indices=indices)


@pytest.mark.parametrize("ending", [FUNCTIONS, INLINED, TORCH])
@pytest.mark.parametrize("lookups", LOOKED_UP)
def test_a_row_that_is_not_finite_spoils_the_samples_that_look_it_up_alone(lookups: str, ending: str, tmp_path: Path):
    spec, good, bad, batch = poisoned(lookups)
    names = [*(f"tables.{number}.pooled" for number in range(len(spec.tables))), "probability"]
    found = []
    exported = forward_model(spec) if ending == TORCH else None
    for number, parameters in enumerate((good, bad)):
        folder = tmp_path / str(number)
        if exported:  # without the check of the parameters
            write_model(exported, parameters, folder / f"model{ending}", names, {})
        else:
            export_onnx(spec, parameters, folder)
        path = folder / f"model{ending}"
        onnx.save(with_outputs(onnx.load(path), names), path)
        found.append(RUNTIMES["onnxruntime"](path)(predict_feeds(batch)))
    for name in names:
        np.testing.assert_array_equal(found[1][name][1:], found[0][name][1:], err_msg=name)
        assert name == "probability" or not np.isfinite(found[1][name][0]).any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("lookups", LOOKED_UP)
def test_a_gradient_that_is_not_finite_spoils_the_rows_that_it_belongs_to_alone(lookups: str, kind: str,
                                                                               tmp_path: Path):
    spec, good, bad, batch = poisoned(lookups)
    spec = spec.with_optimizer(kind, 0.1)
    export_onnx(spec, good, tmp_path)
    first = [indices[:lengths[0]] for indices, lengths in zip(batch.indices, batch.lengths, strict=True)]
    for ending in (FUNCTIONS, INLINED):
        step = RUNTIMES["onnxruntime"](tmp_path / f"train{ending}")
        expected, found = (step(batch.arrays() | parameters | initial_state(spec)) for parameters in (good, bad))
        assert np.isnan(found["loss"])
        for name in (*good, *state_shapes(spec)):
            if is_sparse(name) and f"{name}.new" in found:
                others = np.delete(np.arange(len(found[f"{name}.new"])), first[int(name.split(".")[1])])
                np.testing.assert_array_equal(found[f"{name}.new"][others], expected[f"{name}.new"][others],
                                              err_msg=name)
