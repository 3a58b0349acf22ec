"""Sources of batches: their values against the formats' definitions, and one line for every bad file."""

import itertools
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from spec import toml
from spec.batch import Batch
from spec.counter import integers, uniform
from spec.data import open_batches
from spec.data.random import random_batch
from spec.errors import InputError

TINY = toml.load("tiny")
KAGGLE = toml.load("criteo-kaggle").capped(1000)
SAMPLE = Path(os.environ.get("DLRM_CRITEO_SAMPLE",
                             Path(__file__).parents[2] / "shared" / "data" / "criteo_kaggle_head.tsv"))


def first(source: str, spec, size: int = 4, count: int = 1, seed: int = 0) -> list[Batch]:
    return list(itertools.islice(open_batches(source, spec, size, seed), count))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.arrays().keys() == other.arrays().keys()
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name], err_msg=name, strict=True)


def message(source: str, spec=KAGGLE, size: int = 4) -> str:
    with pytest.raises(InputError) as caught:
        first(source, spec, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# random


def test_a_random_batch_by_its_streams():
    batch = random_batch(TINY, 50, seed=3, number=7)
    np.testing.assert_array_equal(batch.dense, uniform(3, "batch.7.dense", (50, 5), 0, 1))
    lengths = integers(3, "batch.7.tables.1.lengths", 50, 0, 7)
    np.testing.assert_array_equal(batch.lengths[1], lengths)
    np.testing.assert_array_equal(batch.indices[1],
                                  integers(3, "batch.7.tables.1.indices", int(lengths.sum()), 0, 30))
    np.testing.assert_array_equal(batch.label[:, 0], integers(3, "batch.7.label", 50, 0, 2))


def test_random_batches_can_be_drawn_alone_and_differ():
    batches = first("random", TINY, 20, 3, seed=5)
    assert_same(batches[2], random_batch(TINY, 20, 5, 2))
    arrays = [batch.dense.tobytes() for batch in (*batches, *first("random", TINY, 20, 1, seed=6))]
    assert len(set(arrays)) == 4


def test_random_batches_hold_all_that_the_spec_allows():
    batches = first("random", TINY, 64, 8)
    lengths = [np.concatenate([batch.lengths[table] for batch in batches]) for table in range(4)]
    assert [set(values.tolist()) for values in lengths] == [{1}, set(range(7)), {3}, set(range(5))]
    for table, spec in enumerate(TINY.tables):
        indices = np.concatenate([batch.indices[table] for batch in batches])
        assert set(indices.tolist()) == set(range(spec.rows))
    assert {float(value) for batch in batches for value in batch.label[:, 0]} == {0.0, 1.0}
    dense = np.concatenate([batch.dense for batch in batches])
    assert dense.min() >= 0 and dense.max() < 1 and abs(dense.mean() - 0.5) < 5 * np.sqrt(1 / 12 / dense.size)


# criteo


def row(label="0", ints=None, ids=None) -> str:
    return "\t".join([label, *(ints or ["1"] * 13), *(ids or ["ff"] * 26)])


def write(path: Path, *rows: str) -> str:
    path.write_text("".join(f"{line}\n" for line in rows))
    return f"criteo:{path}"


def generated(count: int) -> list[str]:
    """Rows in Criteo's format, with missing values and negative numbers."""
    draw = random.Random(0)
    return [row(str(draw.randint(0, 1)),
                [draw.choice(["", str(draw.randint(-3, 10**draw.randint(0, 6)))]) for _ in range(13)],
                [draw.choice(["", f"{draw.getrandbits(32):08x}"]) for _ in range(26)]) for _ in range(count)]


def test_criteo_values_by_hand(tmp_path):
    ints = ["", "0", "1", "-1", "-3", "99", "1000000", *["2"] * 6]
    ids = ["", "0", "3e7", "3E8", "ffffffff", "68fd1e64", *["1"] * 20]
    source = write(tmp_path / "rows", row("1", ints, ids), row("0"))
    batch, = first(source, KAGGLE, 2)
    expected = np.log(1 + np.array([0, 0, 1, 0, 0, 99, 1e6, *[2] * 6]))
    np.testing.assert_allclose(batch.dense[0], expected, rtol=2**-23, atol=0)
    assert batch.dense[0, 2] == np.float32(np.log(2))
    rows = [table.rows for table in KAGGLE.tables]
    assert rows[:6] == [1000, 583, 1000, 1000, 305, 24]
    assert [int(batch.indices[table][0]) for table in range(6)] == [
        0, 0, 999, 0, 4294967295 % 305, 0x68FD1E64 % 24]
    assert all(lengths.tolist() == [1, 1] for lengths in batch.lengths)
    assert batch.label.tolist() == [[1], [0]]


def test_criteo_rows_against_a_plain_reading(tmp_path):
    lines = generated(57)
    batches = first(write(tmp_path / "rows", *lines), KAGGLE, 20, 3)
    assert [batch.size for batch in batches] == [20, 20, 17]
    for number, line in enumerate(lines):
        batch, place = batches[number // 20], number % 20
        fields = line.split("\t")
        assert batch.label[place, 0] == int(fields[0])
        for column in range(13):
            value = np.log1p(max(int(fields[1 + column] or 0), 0))
            assert batch.dense[place, column] == np.float32(value)
        for table in range(26):
            assert batch.indices[table][place] == int(fields[14 + table] or "0", 16) % KAGGLE.tables[table].rows


def test_criteo_starts_again_from_the_top(tmp_path):
    source = write(tmp_path / "rows", *generated(5))
    batches = first(source, KAGGLE, 3, 4)
    assert [batch.size for batch in batches] == [3, 2, 3, 2]
    assert_same(batches[0], batches[2])
    assert_same(batches[1], batches[3])
    assert [batch.size for batch in first(source, KAGGLE, 100, 2)] == [5, 5]


def test_criteo_without_a_last_newline_and_with_carriage_returns(tmp_path):
    lines = generated(3)
    plain = first(write(tmp_path / "plain", *lines), KAGGLE, 3)[0]
    (tmp_path / "other").write_bytes("\r\n".join(lines).encode())
    assert_same(plain, first(f"criteo:{tmp_path / 'other'}", KAGGLE, 3)[0])


@pytest.mark.parametrize(("line", "found"), [
    ("\t".join(row().split("\t")[:38]),
     ": expected 40 tab-separated fields: label, 13 integers, 26 ids, found 38; mend or remove the row"),
    (row() + "\t", ": expected 40 tab-separated fields: label, 13 integers, 26 ids, found 41; mend or remove the row"),
    ("", ": expected 40 tab-separated fields: label, 13 integers, 26 ids, found 1; mend or remove the row"),
    (row("2"), ": field 1: expected a label, 0 or 1, found '2'; mend or remove the row"),
    (row(""), ": field 1: expected a label, 0 or 1, found ''; mend or remove the row"),
    (row("0", ["1"] * 12 + ["1.5"]),
     ": field 14: expected an integer or nothing, found '1.5'; mend or remove the row"),
    (row("0", ["1_0"] + ["1"] * 12),
     ": field 2: expected an integer or nothing, found '1_0'; mend or remove the row"),
    (row("0", ["nan"] + ["1"] * 12),
     ": field 2: expected an integer or nothing, found 'nan'; mend or remove the row"),
    (row("0", None, ["xyz"] + ["1"] * 25),
     ": field 15: expected a hexadecimal id of at most 8 digits or nothing, found 'xyz'; mend or remove the row"),
    (row("0", None, ["1"] * 25 + ["-1"]),
     ": field 40: expected a hexadecimal id of at most 8 digits or nothing, found '-1'; mend or remove the row"),
    (row("0", None, ["1"] * 25 + ["123456789"]),
     ": field 40: expected a hexadecimal id of at most 8 digits or nothing, found '123456789'; "
     "mend or remove the row"),
])
def test_bad_criteo_row(tmp_path, line, found):
    """The third row is bad: the batch before it comes, and then FILE:3."""
    path = tmp_path / "rows"
    batches = open_batches(write(path, row(), row(), line, row()), KAGGLE, 2)
    assert next(batches).size == 2
    with pytest.raises(InputError) as caught:
        next(batches)
    assert str(caught.value) == f"{path}:3{found}"


def test_bad_criteo_file(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.touch()
    assert message(f"criteo:{missing}") == (
        f"{missing}: expected a readable file of rows, found No such file or directory; check the path")
    assert message(f"criteo:{tmp_path}") == (
        f"{tmp_path}: expected a readable file of rows, found Is a directory; check the path")
    assert message(f"criteo:{empty}") == (
        f"{empty}: expected at least one row, found an empty file; is the download complete?")


def test_a_spec_that_criteo_does_not_fit(tmp_path):
    source = write(tmp_path / "rows", row())
    remedy = "use a spec for Criteo, for example criteo-kaggle"
    assert message(source, TINY) == f"dense_features: expected 13, as in Criteo's rows, found 5; {remedy}"
    fewer = KAGGLE.model_copy(update={"tables": KAGGLE.tables[:25]})
    assert message(source, fewer) == f"tables: expected 26, as in Criteo's rows, found 25; {remedy}"
    twice = KAGGLE.tables[0].model_copy(update={"lookups": 2})
    other = KAGGLE.model_copy(update={"tables": (*KAGGLE.tables[:25], twice)})
    assert message(source, other) == (
        f"tables.25.lookups: expected 1: Criteo's rows hold one id for each table, found 2; {remedy}")


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"no sample of Criteo's rows at {SAMPLE} (set DLRM_CRITEO_SAMPLE)")
def test_real_criteo_rows():
    """1,999 rows, 418 of them clicks, as their description says."""
    batches = first(f"criteo:{SAMPLE}", KAGGLE, 128, 16)
    assert sum(batch.size for batch in batches) == 1999
    assert sum(batch.label.sum() for batch in batches) == 418
    assert all((batch.dense >= 0).all() for batch in batches)
    assert max(batch.dense.max() for batch in batches) > 5


# npz


def saved(path: Path, **changes) -> str:
    arrays = random_batch(TINY, 4, 0, 0).arrays() | {name.replace("__", "."): array for name, array in changes.items()}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return f"npz:{path}"


def test_npz_gives_its_batch_again_and_again(tmp_path):
    for batch in first(saved(tmp_path / "b.npz"), TINY, 999, 3):
        assert_same(batch, random_batch(TINY, 4, 0, 0))


@pytest.mark.parametrize(("changes", "found"), [
    ({"dense": np.full((4, 5), np.nan, np.float32)},
     "dense[0, 0]: expected a finite number, found nan; clean the data first"),
    ({"dense": np.zeros((4, 5))},
     "dense: expected dtype float32, found float64; convert it with .astype('float32')"),
    ({"dense": np.zeros((4, 5), ">f4")},
     "dense: expected dtype float32, found >f4; convert it with .astype('float32')"),
    ({"tables__0__indices": np.array([0, 1, 2, 40])},
     "tables.0.indices[3]: expected 0 to 39, a row of the table, found 40; "
     "map the ids into the table, for example modulo its rows"),
    ({"tables__0__indices": np.array([-1, 1, 2, 4])},
     "tables.0.indices[0]: expected 0 to 39, a row of the table, found -1; "
     "map the ids into the table, for example modulo its rows"),
    ({"tables__0__indices": np.array([0, 1, 2])},
     "tables.0.lengths: expected a sum of 3, the number of indices, found 4; every index belongs to one sample"),
    ({"label": None}, "label: expected an array, found none; a batch holds every input of the spec"),
    ({"extra": np.zeros(1)},
     "extra: expected only the inputs of spec 'tiny', found an array of this name; remove it"),
])
def test_bad_array_in_npz(tmp_path, changes, found):
    path = tmp_path / "b.npz"
    assert message(saved(path, **changes), TINY) == f"{path}: {found}"


def test_npz_never_unpickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    source = saved(tmp_path / "b.npz", label=np.array([Bomb()], object))
    assert message(source, TINY).startswith(f"{tmp_path / 'b.npz'}: expected an .npz archive of plain arrays")
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "b.npz"
    wanted = f"{path}: expected an .npz archive of plain arrays, found something else ("
    assert message(f"npz:{path}", TINY) == (
        f"{path}: expected a readable file, found No such file or directory; check the path")
    for content in (b"", b"text", b"PK\x03\x04 not a zip", b"\x80\x04N."):
        path.write_bytes(content)
        assert message(f"npz:{path}", TINY).startswith(wanted)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert message(f"npz:{path}", TINY).startswith(wanted)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dense", b"not an array")
    assert message(f"npz:{path}", TINY).startswith(str(path))


def test_a_corrupted_npz_is_refused_or_intact(tmp_path):
    """One byte changed anywhere: an InputError that names the file, or a part that the format does not use."""
    good = tmp_path / "good.npz"
    saved(good)
    content, bad = good.read_bytes(), tmp_path / "bad.npz"
    refused = 0
    draw = random.Random(0)
    for _ in range(300):
        place = draw.randrange(len(content))
        bad.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1:])
        try:
            batch, = first(f"npz:{bad}", TINY)
        except InputError as error:
            assert str(error).startswith(f"{bad}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert_same(batch, random_batch(TINY, 4, 0, 0))
    bad.write_bytes(content[:len(content) // 2])
    assert message(f"npz:{bad}", TINY).startswith(f"{bad}: expected an .npz archive")
    assert refused > 100


# sources


@pytest.mark.parametrize("source", ["", "randon", "criteo", "criteo:", "npz:", "csv:file", "random:zipf"])
def test_unknown_source(source):
    assert message(source) == (f"data '{source}': expected random, criteo:FILE or npz:FILE, found another source; "
                               "for example --data criteo:train.txt")


def test_bad_batch_size():
    assert message("random", TINY, 0) == "batch size: expected 1 or more, found 0; ask for at least one sample"
