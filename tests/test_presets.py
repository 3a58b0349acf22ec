"""Presets against the published numbers that their sources give in other words than the files do."""

import math

import pytest

from spec import toml
from spec.parameters import parameter_shapes

# first top width, parameters, GiB of tables; "540M parameters" is Naumov et al. 2019, section 5.1
PUBLISHED = {
    "paper-benchmark": (100, 514_499_137, 1.91),
    "criteo-kaggle": (367, 540_677_217, 2.01),
    "criteo-terabyte": (415, 3_144_845_185, 11.7),
    "mlperf-v1": (479, 24_036_595_969, 89.5),
    "rmc1": (288, 1_024_100_833, 3.81),
    "rmc2": (2112, 1_024_319_937, 3.81),
    "rmc3": (352, 643_205_409, 2.38),
}
SOURCED = ("dense_features", "embedding_dim", "batch_size", "bottom", "top", "interaction", "tables.rows",
           "tables.lookups", "loss", "optimizer")


def test_every_preset_is_listed():
    assert set(toml.preset_names()) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_derived_sizes(name):
    width, parameters, gibibytes = PUBLISHED[name]
    spec = toml.load(name)
    shapes = parameter_shapes(spec)
    assert spec.interaction_width == width
    assert shapes["top.0.weight"][1] == width
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    tables = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("tables."))
    assert round(tables * 4 / 2**30, 1 if gibibytes > 10 else 2) == gibibytes


def test_parameters_of_criteo_kaggle_layer_by_layer():
    """Rows of the 26 tables by 16, and (in + 1) out for each layer written in the paper."""
    rows = sum(table.rows for table in toml.load("criteo-kaggle").tables)
    layers = [(13, 512), (512, 256), (256, 64), (64, 16), (367, 512), (512, 256), (256, 1)]
    assert rows == 33_762_577
    assert rows * 16 + sum((i + 1) * o for i, o in layers) == 540_677_217


@pytest.mark.parametrize("name", toml.preset_names())
def test_every_number_has_a_source(name):
    sources = toml.load(name).sources
    for key in SOURCED:
        head = key.split(".")[0]
        assert sources.get(key, sources.get(head, "")).strip(), f"{name}: {key} has no source"
    known = {*SOURCED, *(key.split(".")[0] for key in SOURCED)}
    assert sources.keys() <= known


@pytest.mark.parametrize("name", toml.preset_names())
def test_name_and_round_trip(name):
    spec = toml.load(name)
    assert spec.name == name
    assert spec.description
    assert toml.loads(toml.dumps(spec), name) == spec
    capped = spec.capped(25)
    assert toml.loads(toml.dumps(capped), name) == capped
    assert capped.is_capped and max(table.rows for table in capped.tables) == 25
    assert [table.published_rows or table.rows for table in capped.tables] == [t.rows for t in spec.tables]


def test_lookups_of_the_ragged_and_fixed_presets():
    lookups = {name: {table.lookups for table in toml.load(name).tables} for name in PUBLISHED}
    assert lookups == {"paper-benchmark": {(1, 100)}, "criteo-kaggle": {1}, "criteo-terabyte": {1}, "mlperf-v1": {1},
                       "rmc1": {80}, "rmc2": {120}, "rmc3": {20}}
