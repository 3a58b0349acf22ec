"""ModelSpec and its files: derived sizes, capping, and one-line errors for everything that a user can get wrong."""

import errno
import os
import re
from importlib.resources import files

import pytest

from spec import parameters, tensors, toml
from spec.errors import InputError
from spec.files import replacing

TINY = files("spec").joinpath("presets/tiny.toml").read_text(encoding="utf-8")


def tiny_with(old: str, new: str):
    assert old in TINY
    return toml.loads(TINY.replace(old, new, 1), "tiny.toml")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("batch_size = 32", "batch_sise = 32",
     "batch_sise: expected only known keys, found an unknown key; did you mean 'batch_size'?"),
    ("[top]", "[tpo]", "tpo: expected only known keys, found an unknown key; did you mean 'top'?"),
    ("widths = [16, 8]", "width = [16, 8]",
     "bottom.width: expected only known keys, found an unknown key; did you mean 'widths'?"),
    ("batch_size = 32", "xyzzy = 1",
     "xyzzy: expected only known keys, found an unknown key; remove it, or see 'dlrm spec schema'"),
    ('name = "tiny"', "", "name: expected a value, found none; add the key"),
    ('name = "tiny"', 'name = "ti ny"',
     "name: expected pattern '^[A-Za-z0-9_.-]+$', found 'ti ny'; see 'dlrm spec schema'"),
    ("embedding_dim = 8", "embedding_dim = 9",
     "bottom.widths: expected a last width of 9, the embedding_dim, found 8; "
     "make the two equal: their vectors interact"),
    ("widths = [16, 1]", "widths = [16, 2]",
     "top.widths: expected a last width of 1, the probability, found 2; end the list with 1"),
    ("widths = [16, 1]", "widths = []",
     "top.widths: expected at least 1 item, found []; see 'dlrm spec schema'"),
    ("widths = [16, 8]", "widths = [-16, 8]",
     "bottom.widths.0: expected greater than 0, found -16; see 'dlrm spec schema'"),
    ("embedding_dim = 8", "embedding_dim = 0",
     "embedding_dim: expected greater than 0, found 0; see 'dlrm spec schema'"),
    ("dense_features = 5", "dense_features = -5",
     "dense_features: expected greater than 0, found -5; see 'dlrm spec schema'"),
    ("rows = 40", "rows = 0", "tables.0.rows: expected greater than 0, found 0; see 'dlrm spec schema'"),
    ("rows = 40", "rows = [1, -2]", "tables.1.rows: expected greater than 0, found -2; see 'dlrm spec schema'"),
    ("rows = 40", "rows = []",
     "tables.0.rows: expected a number, or a list of them, found an empty list; list the rows of each table"),
    ("rows = 40", "rows = 1.5", "tables.0.rows: expected a valid integer, found 1.5; see 'dlrm spec schema'"),
    ("rows = 40", "rows = true", "tables.0.rows: expected a valid integer, found True; see 'dlrm spec schema'"),
    ("rows = 40", "rows = 2147483649",
     "tables.0.rows: expected less than or equal to 2147483648, found 2147483649; see 'dlrm spec schema'"),
    ("rows = 40", "rows = [4, 5]\npublished_rows = [6]",
     "tables.0.published_rows: expected 2 numbers, as in rows, found [6]; list one number for each table"),
    ("rows = 40", "rows = 4\npublished_rows = 3",
     "tables.0.published_rows: expected more than 4, the rows they were capped to, found 3; "
     "remove the key where nothing was capped"),
    ("lookups = 3", "lookups = 0",
     "tables.2.lookups: expected k, a whole number above 0, or [min, max] with min 0 or more, found 0; "
     "lookups = 1 is one-hot"),
    ("lookups = 3", "lookups = [1, 2, 3]",
     "tables.2.lookups: expected k, a whole number above 0, or [min, max] with min 0 or more, found [1, 2, 3]; "
     "lookups = 1 is one-hot"),
    ("lookups = 3", "lookups = [3, 1]",
     "tables.2.lookups: expected [min, max] with min <= max, found [3, 1]; swap the two"),
    ('pooling = "mean"', 'pooling = "max"',
     "tables.1.pooling: expected 'sum', 'mean', 'weighted_fixed' or 'weighted_learned', found 'max'; "
     "see 'dlrm spec schema'"),
    ('kind = "dot"', 'kind = "cat"\nself_interaction = true',
     "interaction.self_interaction: expected false, since kind is 'cat', found true; remove the key"),
    ('kind = "dot"', 'kind = "dot"\nself_interaction = "yes"',
     "interaction.self_interaction: expected a valid boolean, found 'yes'; see 'dlrm spec schema'"),
    ('kind = "bce"', 'kind = "bce"\nclip = 0.5',
     "loss.clip: expected less than 0.5, found 0.5; see 'dlrm spec schema'"),
    ('kind = "bce"', 'kind = "mse"\nclip = 0.1',
     "loss.clip: expected 0, since kind is 'mse', found 0.1; remove the key or use kind 'bce' or 'wbce'"),
    ('kind = "bce"', 'kind = "wbce"',
     "loss.weights: expected the weights of class 0 and class 1, found none; add weights = [1.0, 1.0]"),
    ('kind = "bce"', 'kind = "bce"\nweights = [1.0, 2.0]',
     "loss.weights: expected none, since kind is 'bce', found [1.0, 2.0]; remove the key or use kind 'wbce'"),
    ("learning_rate = 0.1", 'learning_rate = "0.1"',
     "optimizer.learning_rate: expected a valid number, found '0.1'; see 'dlrm spec schema'"),
    ("learning_rate = 0.1", "learning_rate = nan",
     "optimizer.learning_rate: expected a finite number, found nan; see 'dlrm spec schema'"),
    ("learning_rate = 0.1", "eps = 0.0",
     "optimizer.eps: expected greater than 0, found 0.0; see 'dlrm spec schema'"),
])
def test_bad_file(old, new, message):
    with pytest.raises(InputError) as caught:
        tiny_with(old, new)
    assert str(caught.value) == f"tiny.toml: {message}"
    assert "\n" not in str(caught.value)


def test_bad_syntax_names_the_line():
    with pytest.raises(InputError, match=r"^x\.toml: expected TOML, found .*line 2.*; mend the syntax$"):
        toml.loads("a = 1\nb = \n", "x.toml")


def test_unknown_preset():
    with pytest.raises(InputError) as caught:
        toml.load("criteo-kagle")
    assert str(caught.value) == (
        f"spec 'criteo-kagle': expected one of {', '.join(toml.preset_names())}, or a .toml file, "
        "found no such preset; did you mean 'criteo-kaggle'?")


def test_missing_and_undecodable_file(tmp_path):
    missing, binary = tmp_path / "no.toml", tmp_path / "binary.toml"
    binary.write_bytes(b"name = \xff")
    with pytest.raises(InputError) as caught:
        toml.load(str(missing))
    assert str(caught.value) == (
        f"{missing}: expected a readable TOML file, found No such file or directory; check the path")
    with pytest.raises(InputError, match=r"binary\.toml: expected a readable TOML file"):
        toml.load(str(binary))


def test_save_and_load(tmp_path):
    spec = toml.load("criteo-kaggle").capped(1000)
    path = tmp_path / "new" / "my.toml"
    toml.save(spec, path)
    assert toml.load(str(path)) == spec
    assert [entry.name for entry in path.parent.iterdir()] == ["my.toml"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a writable folder"):
        toml.save(toml.load("tiny"), tmp_path / "file" / "my.toml")


def test_a_folder_in_the_way_and_a_full_disk(tmp_path):
    path = tmp_path / "my.toml"
    path.mkdir()
    with pytest.raises(InputError, match=r"my\.toml: expected a file that can be written, found Is a directory"):
        toml.save(toml.load("tiny"), path)
    path.rmdir()
    with pytest.raises(InputError, match="found No space left on device"), replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_list_of_rows_makes_a_table_of_each():
    spec = tiny_with("rows = 40", "rows = [40, 7, 9]")
    assert [table.rows for table in spec.tables] == [40, 7, 9, 30, 20, 25]


def test_capping_keeps_both_numbers_and_the_first_of_them():
    spec = toml.load("tiny").capped(30).capped(22)
    assert [(table.rows, table.published_rows) for table in spec.tables] == [(22, 40), (22, 30), (20, None), (22, 25)]
    assert not toml.load("tiny").capped(40).is_capped
    with pytest.raises(InputError) as caught:
        spec.capped(0)
    assert str(caught.value) == "max rows: expected 1 or more, found 0; a table has at least one row"


def test_pairs_and_widths():
    """The lower triangle, row by row: what numpy.tril_indices enumerates."""
    spec = toml.load("tiny")
    assert spec.pairs[:4] == ((1, 0), (2, 0), (2, 1), (3, 0))
    assert spec.interaction_width == 8 + 5 * 4 // 2
    itself = tiny_with('kind = "dot"', 'kind = "dot"\nself_interaction = true')
    assert itself.pairs[:4] == ((0, 0), (1, 0), (1, 1), (2, 0))
    assert itself.interaction_width == 8 + 5 * 6 // 2
    cat = tiny_with('kind = "dot"', 'kind = "cat"')
    assert (cat.pairs, cat.interaction_width) == ((), 5 * 8)


def test_parameters_and_state_of_tiny():
    spec = toml.load("tiny")
    assert parameters.parameter_shapes(spec) == {
        "bottom.0.weight": (16, 5), "bottom.0.bias": (16,), "bottom.1.weight": (8, 16), "bottom.1.bias": (8,),
        "top.0.weight": (16, 18), "top.0.bias": (16,), "top.1.weight": (1, 16), "top.1.bias": (1,),
        "tables.0.weight": (40, 8), "tables.1.weight": (30, 8), "tables.2.weight": (20, 8),
        "tables.2.pooling": (20,), "tables.3.weight": (25, 8), "tables.3.pooling": (25,)}
    assert parameters.state_shapes(spec) == {}
    rowwise = parameters.state_shapes(spec.with_optimizer("rowwise_adagrad", 0.1))
    assert rowwise["tables.0.weight.moment"] == (40,)
    assert rowwise["tables.3.pooling.moment"] == (25,)
    assert rowwise["top.0.weight.moment"] == (16, 18)
    assert "tables.2.pooling.moment" not in rowwise
    elementwise = parameters.state_shapes(spec.with_optimizer("adagrad", 0.1))
    assert elementwise["tables.0.weight.moment"] == (40, 8)


def test_trace_names_by_loss_and_interaction():
    spec = toml.load("tiny")
    names = tensors.trace_names(spec)
    assert len(names) == len(set(names))
    assert {"probability_grad", "interaction.features", "tables.3.pooling_grad_values"} <= set(names)
    assert not {"loss_grad", "tables.2.pooling_grad_values", "top.1.activation"} & set(names)
    assert "probability_grad" not in tensors.trace_names(tiny_with('kind = "bce"', 'kind = "bce_logits"'))
    cat = tensors.trace_names(tiny_with('kind = "dot"', 'kind = "cat"'))
    assert "interaction.output" in cat and "interaction.products" not in cat
    forward = tensors.trace_names(spec, gradients=False)
    assert "probability" in forward and not any("_grad" in name or name == "loss" for name in forward)


def test_the_digest_is_that_of_what_is_computed():
    spec = toml.load("tiny")
    assert tiny_with('name = "tiny"', 'name = "other"').digest == spec.digest
    assert tiny_with("batch_size = 32", "batch_size = 33").digest == spec.digest
    assert tiny_with("rows = 40", "rows = 41").digest != spec.digest
    assert tiny_with("learning_rate = 0.1", "learning_rate = 0.2").digest != spec.digest


def test_parameters_that_are_not_the_specs_are_named():
    spec = toml.load("tiny")
    good = parameters.initial_parameters(spec)
    parameters.check_parameters(spec, good)
    for bad, message in [
        ({name: array for name, array in good.items() if name != "top.1.bias"}, "top.1.bias: expected a parameter"),
        (good | {"top.9.bias": good["top.1.bias"]}, "top.9.bias: expected only parameters of spec 'tiny'"),
        (good | {"top.1.bias": good["top.1.bias"].astype("float64")},
         "top.1.bias: expected float32[1], found float64[1]"),
        (good | {"top.1.bias": good["top.1.bias"] * float("nan")}, "top.1.bias: expected finite numbers"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            parameters.check_parameters(spec, bad)
