"""Operators side by side that one kernel takes together (`Operator.aten_many`): the same bits as one by one."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from torch.multiprocessing.reductions import StorageWeakRef

from dlrm_caffe2.engine.aten import AtenEngine
from dlrm_caffe2.engine.plan import Stretch
from dlrm_caffe2.net import make_operator
from dlrm_caffe2.operators import records
from dlrm_caffe2.proto.caffe2_pb2 import NetDef, OperatorDef
from spec import toml
from spec.backend import load_backend
from spec.data.random import random_batch
from spec.errors import EngineError
from spec.parameters import initial_parameters

Blobs = Mapping[str, np.ndarray]
RNG = np.random.default_rng(0)
ROWS = (7, 3, 5)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the kernel took them, each time that it was asked."""
    taken: list[bool] = []
    ask = AtenEngine._run_together

    def noted(self: AtenEngine, stretch: Stretch) -> bool:
        taken.append(ask(self, stretch))
        return taken[-1]

    monkeypatch.setattr(AtenEngine, "_run_together", noted)
    return taken


def run(operators: Sequence[OperatorDef], feeds: Sequence[Blobs], nets: Sequence[Sequence[OperatorDef]]) -> Blobs:
    """Every output after three runs of the nets, one after the other. `feeds` are fed one by one."""
    engine = AtenEngine()
    for blobs in feeds:
        engine.feed(blobs)
    for number, net in enumerate(nets):
        engine.create(NetDef(name=f"net{number}", op=net))
    for _ in range(3):
        for number in range(len(nets)):
            engine.run(f"net{number}", {})
    return engine.fetch([name for operator in operators for name in operator.output])


def check(operators: Sequence[OperatorDef], feeds: Sequence[Blobs], taken: bool | None, together: list[bool]) -> None:
    """`taken`: None for operators that their kernel is not even asked to take together."""
    found = run(operators, feeds, [operators])
    assert together == ([] if taken is None else [taken, taken]), "asked in every run but the first"
    expected = run(operators, feeds, [[operator] for operator in operators])
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        np.testing.assert_array_equal(found[name], array, name)


def tables(*row: int, rows: Sequence[int] = ROWS) -> dict[str, np.ndarray]:
    return {f"w{n}": RNG.normal(size=(count, *row)).astype(np.float32) for n, count in enumerate(rows)}


def lookups(sizes: Sequence[int] = (4, 4, 4), dtype: type = np.int64) -> dict[str, np.ndarray]:
    """Rows that repeat, and the last one."""
    return {f"i{n}": np.append(RNG.integers(0, rows, size - 1), rows - 1).astype(dtype)
            for n, (size, rows) in enumerate(zip(sizes, ROWS, strict=True))}


GATHERS = [make_operator("Gather", [f"w{n}", f"i{n}"], [f"o{n}"]) for n in range(3)]


@pytest.mark.parametrize(("feeds", "taken"), [
    ([tables(2) | lookups()], True),
    ([tables(2, 3) | lookups(dtype=np.int32)], True),
    ([tables() | lookups((1, 1, 1))], True),
    ([tables(2), lookups()], True),
    ([tables(2) | lookups((4, 3, 4))], False),
    ([tables(2) | lookups() | {"i1": np.array([0, -1, 1, 2])}], False),
    ([tables(2) | lookups() | {"i1": np.array([0, 1, 1, 2], np.int32)}], False),
    ([tables(2) | {f"i{n}": np.zeros((2, 2), np.int64) for n in range(3)}], False),
    ([tables(2) | {f"i{n}": np.zeros(0, np.int64) for n in range(3)}], False),
    ([tables(2) | lookups(), {"w1": RNG.normal(size=(3, 2)).astype(np.float32)}], False),
    ([tables(2) | lookups() | {"w1": RNG.normal(size=(3, 4)).astype(np.float32)}], False),
], ids=["rows", "rows of two dimensions, int32", "numbers, one lookup", "fed apart", "other sizes", "negative",
        "other types", "matrices of indices", "no lookups", "a table of its own", "another width"])
def test_lookups(feeds: Sequence[Blobs], taken: bool | None, together: list[bool]):
    check(GATHERS, feeds, taken, together)


def updates(*row: int, old: float = 1.0) -> dict[str, np.ndarray]:
    values = {f"g{n}": RNG.normal(size=(4, *row)).astype(np.float32) for n in range(3)}
    return tables(*row) | lookups() | values | {"old": np.full(1, old, np.float32), "rate": np.full(1, -.3, np.float32)}


def scatters(*rates: str) -> list[OperatorDef]:
    return [make_operator("ScatterWeightedSum", [f"w{n}", "old", f"i{n}", f"g{n}", rate], [f"w{n}"])
            for n, rate in enumerate(rates)]


@pytest.mark.parametrize(("operators", "blobs", "taken"), [
    (scatters("rate", "rate", "rate"), updates(2), True),
    (scatters("rate", "rate", "rate"), updates(2, 3), True),
    (scatters("rate", "rate", "rate"), updates(), True),
    (scatters("rate", "rate", "rate"), updates(2, old=0.5), False),
    (scatters("rate", "old", "rate"), updates(2), None),
], ids=["rows", "rows of two dimensions", "numbers", "old rows have a weight", "other weights"])
def test_updates_of_rows(operators: Sequence[OperatorDef], blobs: Blobs, taken: bool | None, together: list[bool]):
    check(operators, [blobs], taken, together)


def sums(*inputs: Sequence[str]) -> list[OperatorDef]:
    return [make_operator("WeightedSum", names, [names[0]]) for names in inputs]


@pytest.mark.parametrize(("operators", "taken"), [
    (sums(["w0", "old", "g0", "rate"], ["w1", "old", "g1", "rate"]), True),
    (sums(["w0", "old", "g0", "rate"], ["w1", "old", "g1", "old"]), None),
    (sums(["w0", "rate", "g0", "rate"], ["w1", "rate", "g1", "rate"]), False),
    (sums(["w0", "old"], ["w1", "old"]), None),
    ([make_operator("WeightedSum", [f"w{n}", "old", "g0", "rate"], [f"o{n}"]) for n in range(2)], None),
], ids=["steps", "other weights", "the old have a weight", "of one", "not in place"])
def test_updates(operators: Sequence[OperatorDef], taken: bool | None, together: list[bool]):
    check(operators, [updates(2, 3) | tables(2, 3, rows=(4, 4, 4))], taken, together)


def test_one_that_reads_what_another_makes_comes_after_it(together: list[bool]):
    """The second update of one table, and a sum of what the first one makes."""
    chained = sums(["w0", "old", "g0", "rate"], ["w1", "old", "w0", "rate"])
    for operators, blobs in (([*scatters("rate"), *scatters("rate")], updates(2)),
                             (chained, updates(2) | tables(2, rows=(4, 4, 4)))):
        found = run(operators, [blobs], [operators])
        for name, array in run(operators, [blobs], [[operator] for operator in operators]).items():
            np.testing.assert_array_equal(found[name], array)
    assert together == []


@pytest.mark.parametrize("operators", [GATHERS, scatters("rate", "rate", "rate")], ids=["Gather", "ScatterWeightedSum"])
def test_a_row_beyond_a_table_is_an_error_though_the_next_table_has_it(operators: Sequence[OperatorDef]):
    engine = AtenEngine()
    engine.feed(updates(2))
    engine.create(NetDef(name="net", op=operators))
    engine.run("net", {})
    with pytest.raises(EngineError, match=rf"operator 1 \({operators[0].type}\): .*index 3 is out of bounds"):
        engine.run("net", {"i1": np.array([0, 1, 2, 3])})


def test_what_is_known_of_tables_and_rows_is_forgotten_with_them(together: list[bool]):
    """Tables fed anew, alone or all of them; rows that change in place, and rows of which some are fed anew."""
    blobs, new = tables(2) | lookups(), tables(2)
    engine = AtenEngine()
    engine.feed(blobs)
    engine.create(NetDef(name="net", op=GATHERS))

    def check_run() -> None:
        found = engine.run("net", {}, [f"o{n}" for n in range(3)])
        for n in range(3):
            np.testing.assert_array_equal(found[f"o{n}"], blobs[f"w{n}"][blobs[f"i{n}"]])

    def change(changes: Blobs) -> None:
        engine.feed(changes)
        blobs.update(changes)
        for _ in range(2):
            check_run()

    change({})
    change(new)
    change({"w1": blobs["w1"] + 1})
    change({"w0": blobs["w0"] + 1})
    change(tables(2))
    change({f"i{n}": np.zeros(4, np.int64) for n in range(3)})
    change({"i1": np.ones(4, np.int64)})
    change({f"i{n}": np.zeros(1, np.int64) for n in range(3)})
    engine.create(NetDef(name="count", op=[make_operator("Iter", ["i2"], ["i2"])]))
    engine.run("count", {})
    blobs["i2"] = np.ones(1, np.int64)
    for _ in range(2):
        check_run()
    assert True in together and False in together


def test_tables_are_gone_as_soon_as_others_are_fed(together: list[bool]):
    """Though rows that were looked up in them are remembered: there may be no room for both."""
    engine = AtenEngine()
    engine.feed(tables(2) | lookups())
    engine.create(NetDef(name="net", op=GATHERS))
    for _ in range(2):
        engine.run("net", {})
    storage = StorageWeakRef(engine._blobs["w0"].untyped_storage())
    assert together == [True] and not storage.expired()
    engine.feed(tables(2))
    assert storage.expired()


def test_tables_that_are_looked_up_alike_are_told_apart(together: list[bool]):
    first, second = tables(2), tables(2, rows=(9, 8, 6))
    blobs = first | lookups() | {f"v{name[1:]}": table for name, table in second.items()}
    others = [make_operator("Gather", [f"v{n}", f"i{n}"], [f"p{n}"]) for n in range(3)]
    operators = [*GATHERS, make_operator("Copy", ["o0"], ["c"]), *others]
    found = run(operators, [blobs], [operators])
    for n in range(3):
        np.testing.assert_array_equal(found[f"p{n}"], blobs[f"v{n}"][blobs[f"i{n}"]])
    assert together == [True] * 4


def test_criteos_step_takes_its_tables_together(together: list[bool]):
    spec = toml.load("criteo-kaggle").capped(50)
    model = load_backend("caffe2-aten").create(spec, initial_parameters(spec))
    for number in range(3):
        model.train_step(random_batch(spec, 8, 0, number))
    model.close()
    assert together == [True] * 6, "lookups, and updates of the MLPs and of the tables, in two steps"


def test_every_such_kernel_is_tested_here():
    assert {type for type, operator in records().items() if operator.aten_many} == {
        "Gather", "ScatterWeightedSum", "WeightedSum"}
