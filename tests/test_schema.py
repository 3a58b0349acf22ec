"""The published JSON Schema says what pydantic enforces, as far as a schema can."""

import json
import tomllib
from importlib.resources import files

import jsonschema
import pytest

from spec import toml
from spec.errors import InputError

TINY = files("spec").joinpath("presets/tiny.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(toml.schema())
    return jsonschema.Draft202012Validator(toml.schema())


def test_the_committed_schema_is_current():
    """If not: dlrm spec schema > spec/schema.json"""
    assert json.loads(files("spec").joinpath("schema.json").read_text(encoding="utf-8")) == toml.schema()


@pytest.mark.parametrize("name", toml.preset_names())
def test_presets_are_valid(validator, name):
    text = files("spec").joinpath(f"presets/{name}.toml").read_text(encoding="utf-8")
    validator.validate(tomllib.loads(text))
    validator.validate(tomllib.loads(toml.dumps(toml.load(name).capped(20))))


@pytest.mark.parametrize(("old", "new"), [
    ("batch_size", "batch_sise"), ("[top]", "[tpo]"), ('pooling = "mean"', 'poling = "mean"'), ("learning_rate", "lr"),
    ("lookups = 3", "lookup = 3"), ("[interaction]\nkind", "[interaction]\nkin"), ('name = "tiny"', ""),
    ('name = "tiny"', "name = 3"), ('name = "tiny"', 'name = ""'), ('name = "tiny"', 'name = "a b"'),
    ("dense_features = 5", "dense_features = 0"), ("embedding_dim = 8", "embedding_dim = -8"),
    ("rows = 40", "rows = 0"), ("rows = 40", "rows = []"), ("rows = 40", "rows = [3, 0]"), ("rows = 40", "rows = '40'"),
    ("rows = 40", "rows = true"), ("rows = 40", "rows = 1.5"), ("rows = 40", "rows = 3_000_000_000"),
    ("lookups = 3", "lookups = 0"), ("lookups = 3", "lookups = [1]"), ("lookups = 3", "lookups = [1, 2, 3]"),
    ("lookups = 3", "lookups = [-1, 2]"), ("lookups = 3", "lookups = [0, 0]"), ("lookups = 3", "lookups = '3'"),
    ("widths = [16, 1]", "widths = []"), ("widths = [16, 1]", "widths = 16"), ("widths = [16, 1]", "widths = [0, 1]"),
    ('pooling = "mean"', 'pooling = "max"'), ('kind = "dot"', 'kind = "DOT"'),
    ('kind = "dot"', 'kind = "dot"\nself_interaction = 1'), ('kind = "bce"', 'kind = "hinge"'),
    ('kind = "bce"', 'kind = "bce"\nclip = 0.5'), ('kind = "bce"', 'kind = "bce"\nclip = -0.1'),
    ('kind = "bce"', 'kind = "wbce"\nweights = [1.0]'), ('kind = "bce"', 'kind = "wbce"\nweights = [1.0, 0.0]'),
    ('kind = "sgd"', 'kind = "adam"'), ("learning_rate = 0.1", "learning_rate = 0"),
    ("learning_rate = 0.1", 'learning_rate = "0.1"'), ("learning_rate = 0.1", "eps = -1.0"),
    ('bottom = "chosen here"', "bottom = 1"),
])
def test_both_refuse(validator, old, new):
    assert old in TINY
    text = TINY.replace(old, new, 1)
    assert not validator.is_valid(tomllib.loads(text))
    with pytest.raises(InputError):
        toml.loads(text, "bad.toml")


@pytest.mark.parametrize(("old", "new"), [
    ("learning_rate = 0.1", "learning_rate = 1"), ("lookups = 3", "lookups = [3, 3]"), ("rows = 40", "rows = [40]"),
    ("rows = 40", "rows = 40\npublished_rows = 41"), ("rows = 40", "rows = [4, 5]\npublished_rows = [6, 7]"),
    ('kind = "bce"', 'kind = "wbce"\nweights = [1, 2.5]\nclip = 0'), ("batch_size = 32\n", ""),
])
def test_both_accept(validator, old, new):
    assert old in TINY
    text = TINY.replace(old, new, 1)
    validator.validate(tomllib.loads(text))
    toml.loads(text, "good.toml")
