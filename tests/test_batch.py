"""What a batch must be, and the one line that says why another one is not."""

import re
from dataclasses import replace

import numpy as np
import pytest

from spec import toml
from spec.batch import Batch
from spec.errors import InputError
from spec.model import Table

SPEC = toml.load("tiny")


def batch() -> Batch:
    """Three samples by hand; the second has empty bags where that is allowed."""
    indices = [0, 39, 39], [29, 0], [*range(9)], [24]
    lengths = [1, 1, 1], [2, 0, 0], [3, 3, 3], [1, 0, 0]
    return Batch(np.arange(15, dtype=np.float32).reshape(3, 5), tuple(np.array(i, np.int64) for i in indices),
                 tuple(np.array(n, np.int32) for n in lengths), np.array([[0], [1], [1]], np.float32))


def changed(name: str, value: object) -> dict:
    return batch().arrays() | {name: value}


def with_element(name: str, place: tuple, value: float) -> np.ndarray:
    array = batch().arrays()[name].copy()
    array[place] = value
    return array


def error(named: dict, spec=SPEC) -> str:
    with pytest.raises(InputError) as caught:
        Batch.from_arrays(spec, named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_loss(**loss):
    return SPEC.model_copy(update={"loss": type(SPEC.loss)(**loss)})


def test_a_good_batch_survives_its_arrays():
    arrays = batch().arrays()
    assert list(arrays) == ["dense", *(f"tables.{t}.{part}" for t in range(4) for part in ("indices", "lengths")),
                            "label"]
    again = Batch.from_arrays(SPEC, arrays)
    assert again.size == 3
    assert all(again.arrays()[name] is array for name, array in arrays.items())


@pytest.mark.parametrize(("name", "value", "message"), [
    ("dense", with_element("dense", (2, 1), np.nan),
     "dense[2, 1]: expected a finite number, found nan; clean the data first"),
    ("dense", with_element("dense", (0, 4), -np.inf),
     "dense[0, 4]: expected a finite number, found -inf; clean the data first"),
    ("label", with_element("label", (1, 0), np.nan),
     "label[1, 0]: expected a finite number, found nan; clean the data first"),
    ("dense", np.zeros((3, 5)),
     "dense: expected dtype float32, found float64; convert it with .astype('float32')"),
    ("dense", [[0.0] * 5] * 3,
     "dense: expected a NumPy array, found list; convert it with numpy.asarray"),
    ("dense", np.zeros((3, 4), np.float32), "dense: expected shape [B, 5], found [3, 4]; see SPEC.md, 2"),
    ("dense", np.zeros(5, np.float32), "dense: expected shape [B, 5], found [5]; see SPEC.md, 2"),
    ("dense", np.array(1, np.float32), "dense: expected shape [B, 5], found []; see SPEC.md, 2"),
    ("dense", np.zeros((0, 5), np.float32),
     "dense: expected at least one sample, found none; the mean over no samples has no value"),
    ("label", np.zeros(3, np.float32), "label: expected shape [3, 1], found [3]; see SPEC.md, 2"),
    ("label", np.zeros((2, 1), np.float32), "label: expected shape [3, 1], found [2, 1]; see SPEC.md, 2"),
    ("label", np.zeros((3, 1), np.int32),
     "label: expected dtype float32, found int32; convert it with .astype('float32')"),
    ("tables.0.indices", np.array([0, 40, 1]),
     "tables.0.indices[1]: expected 0 to 39, a row of the table, found 40; "
     "map the ids into the table, for example modulo its rows"),
    ("tables.0.indices", np.array([0, 1, -1]),
     "tables.0.indices[2]: expected 0 to 39, a row of the table, found -1; "
     "map the ids into the table, for example modulo its rows"),
    ("tables.0.indices", np.array([0, 1, 2], np.int32),
     "tables.0.indices: expected dtype int64, found int32; convert it with .astype('int64')"),
    ("tables.0.indices", np.array([[0, 1, 2]]),
     "tables.0.indices: expected shape [K], found [1, 3]; see SPEC.md, 2"),
    ("tables.1.lengths", np.array([2, 0, 0]),
     "tables.1.lengths: expected dtype int32, found int64; convert it with .astype('int32')"),
    ("tables.1.lengths", np.array([2, 0], np.int32),
     "tables.1.lengths: expected shape [3], found [2]; see SPEC.md, 2"),
    ("tables.1.lengths", np.array([2, 1, 0], np.int32),
     "tables.1.lengths: expected a sum of 2, the number of indices, found 3; every index belongs to one sample"),
    ("tables.1.lengths", np.array([1, 0, 0], np.int32),
     "tables.1.lengths: expected a sum of 2, the number of indices, found 1; every index belongs to one sample"),
    ("tables.1.lengths", np.array([3, -1, 0], np.int32),
     "tables.1.lengths[1]: expected 0 or more, found -1; an empty bag has length 0"),
    ("tables.1.lengths", np.array([2**31 - 1, 2**31 - 1, 4], np.int32),
     "tables.1.lengths: expected a sum of 2, the number of indices, found 4294967298; "
     "every index belongs to one sample"),
    ("tables.2.lengths", np.array([3, 4, 2], np.int32),
     "tables.2.lengths[1]: expected 3, the table's fixed number of lookups, found 4; "
     "declare the table ragged: lookups = [min, max]"),
    ("tables.4.indices", np.zeros(3, np.int64),
     "tables.4.indices: expected only the inputs of spec 'tiny', found an array of this name; remove it"),
])
def test_bad_array(name, value, message):
    assert error(changed(name, value)) == message


@pytest.mark.parametrize("name", ["dense", "label", "tables.3.lengths"])
def test_missing_array(name):
    named = batch().arrays()
    del named[name]
    assert error(named) == f"{name}: expected an array, found none; a batch holds every input of the spec"


def test_too_few_tables():
    with pytest.raises(InputError) as caught:
        replace(batch(), indices=batch().indices[:3]).validate(SPEC)
    assert str(caught.value) == (
        "indices: expected 4 arrays, one for each table, found 3; give every table its lookups")


@pytest.mark.parametrize(("loss", "value", "message"), [
    ({"kind": "bce"}, 0.5, "label[2, 0]: expected 0 or 1, found 0.5; use another loss, or round the labels"),
    ({"kind": "wbce", "weights": (1.0, 2.0)}, 2.0,
     "label[2, 0]: expected 0 or 1, found 2.0; use another loss, or round the labels"),
    ({"kind": "bce_logits"}, -0.5,
     "label[2, 0]: expected a number in [0, 1], found -0.5; use another loss, or round the labels"),
])
def test_labels_that_a_loss_refuses(loss, value, message):
    assert error(changed("label", with_element("label", (2, 0), value)), with_loss(**loss)) == message


@pytest.mark.parametrize(("loss", "value"), [({"kind": "mse"}, -3.5), ({"kind": "bce_logits"}, 0.5)])
def test_labels_that_a_loss_takes(loss, value):
    Batch.from_arrays(with_loss(**loss), changed("label", with_element("label", (2, 0), value)))


def test_a_batch_of_empty_bags_is_legal():
    arrays = batch().arrays() | {"tables.1.indices": np.zeros(0, np.int64), "tables.1.lengths": np.zeros(3, np.int32)}
    Batch.from_arrays(SPEC, arrays)


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda i, n: (np.add(i, [0, 0, 0, 7, 0]), n), "tables.1.indices[3]: expected 0 to 6, a row of the table, found 7"),
    (lambda i, n: (i - [0, 0, 1, 0, 0], n), "tables.1.indices[2]: expected 0 to 6, a row of the table, found -1"),
    (lambda i, n: (i, n + np.int32(1)), "tables.1.lengths[0]: expected 1, the table's fixed number of lookups"),
    (lambda i, n: (i[:-1], n), "tables.1.lengths: expected a sum of 4, the number of indices"),
    (lambda i, n: (i.astype(np.int32), n), "tables.1.indices: expected dtype int64"),
    (lambda i, n: (i, n[:, None]), "tables.1.lengths: expected shape [5]"),
    (lambda i, n: (list(i), n), "tables.1.indices: expected a NumPy array"),
])
def test_of_several_one_hot_tables_the_wrong_one_is_named(change, complaint):
    """They are looked at all at once."""
    spec = SPEC.model_copy(update={"tables": tuple(Table(rows=rows, lookups=1) for rows in (9, 7, 9))})
    dense, label = np.ones((5, spec.dense_features), np.float32), np.ones((5, 1), np.float32)
    rows, ones = np.zeros(5, np.int64), np.ones(5, np.int32)
    Batch(dense, (rows, rows, rows), (ones, ones, ones), label).validate(spec)
    wrong_rows, wrong_lengths = change(rows, ones)
    with pytest.raises(InputError, match=re.escape(complaint)):
        Batch(dense, (rows, wrong_rows, rows), (ones, wrong_lengths, ones), label).validate(spec)
