"""Compiled loops (spec/native): turns, vectors, and where the code is kept."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import carray

from spec.native.loops import Team, float32s, int64s, loop, turn
from spec.native.vectors import LANES, STEP, fma, load, splat, sqrt, store, total, where_not_positive

TEAM = Team(torch._C.__file__)


@loop(seen=int, count=int)
def count_turns(pointer):
    a = carray(pointer, 1)[0]
    turns, seen = a.turns, int64s(a.seen, a.count)
    number = turn(pointer)
    while number < turns:
        seen[number] += 1
        number = turn(pointer)


@loop(x=int, y=int, n=int, factor=float, sums=int)
def calculate(pointer):
    """y = sqrt(factor x + y / 2), but 7 where x is not positive; and the sum of x."""
    a = carray(pointer, 1)[0]
    turns, x, y, n, factor, sums = a.turns, a.x, a.y, a.n, a.factor, float32s(a.sums, 1)
    number = turn(pointer)
    while number < turns:
        for e in range(0, 4 * n, STEP):
            left = n - e // 4
            xs = load(x + e, left)
            made = sqrt(fma(splat(factor), xs, load(y + e, left) / splat(2)))
            store(y + e, where_not_positive(xs, splat(7), made), left)
            sums[0] += total(xs)
        number = turn(pointer)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("turns", [0, 1, 1000])
@pytest.mark.parametrize("openmp", [True, False])
def test_each_turn_is_taken_once(threads, turns, openmp):
    team = Team(torch._C.__file__)
    if not openmp:  # as for a library that was built without
        team._parallel = None
    seen = np.zeros(max(turns, 1), np.int64)
    team.run(count_turns, turns, threads, seen=seen.ctypes.data, count=turns)
    np.testing.assert_array_equal(seen, 1 if turns else 0)


@pytest.mark.parametrize("n", [1, LANES - 1, LANES, LANES + 1, 3 * LANES])
def test_vectors_that_are_full_or_not(n):
    rng = np.random.default_rng(n)
    x, y = (rng.random(n + 5).astype(np.float32) + 0.1 for _ in range(2))
    x[0] = -1
    x[n:], y[n:] = np.nan, 3  # what lies behind is neither read into the result nor written
    expected = np.sqrt(np.float32(1.5) * np.abs(x[:n]) + y[:n] / 2)
    expected[0] = 7
    sums = np.zeros(1, np.float32)
    TEAM.run(calculate, 1, 1, x=x.ctypes.data, y=y.ctypes.data, n=n, factor=1.5, sums=sums.ctypes.data)
    np.testing.assert_allclose(y[:n], expected, rtol=1e-6)
    assert (y[n:] == 3).all()
    np.testing.assert_allclose(sums[0], x[:n].sum(), rtol=1e-5)


def test_a_field_that_is_not_given_is_an_error():
    with pytest.raises(KeyError, match="count"):
        TEAM.run(count_turns, 1, 1, seen=0)


@pytest.mark.slow
def test_loops_run_where_no_folder_can_be_written_to(tmp_path: Path):
    """In memory alone, then."""
    (tmp_path / "loops_of_mine.py").write_text(
        "from spec.native.loops import loop\n@loop(n=int)\ndef nothing(pointer):\n    pass\n")
    (tmp_path / "__pycache__").write_text("a file where a folder is wanted")
    code = "import loops_of_mine; print(loops_of_mine.nothing.fields)"
    nowhere = {name: "/dev/null" for name in ("HOME", "XDG_CACHE_HOME")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | nowhere, capture_output=True,
                         text=True)
    assert run.returncode == 0 and run.stdout == "('n',)\n", run.stderr


@pytest.mark.slow
def test_kept_code_is_not_used_once_what_it_calls_has_changed(tmp_path: Path):
    """Numba itself looks at the file of the loop alone."""
    (tmp_path / "loops_of_mine.py").write_text(
        "from spec.native.loops import loop\n@loop(n=int)\ndef nothing(pointer):\n    pass\n")
    code = ("import sys, spec.native.loops as loops; loops.DIGEST = sys.argv[1] or loops.DIGEST\n"
            "import loops_of_mine; print(loops_of_mine.nothing._compiled.cache_hits)")
    hits = [subprocess.run([sys.executable, "-c", code, digest], cwd=tmp_path, capture_output=True, text=True,
                           check=True).stdout.strip() for digest in ("", "", "other", "other")]
    assert hits == ["0", "1", "0", "1"]
