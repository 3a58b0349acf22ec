"""Tests of the tester: what the judge must refuse, and what it must let pass."""

import numpy as np
import pytest

from conformance.verdict import RATIO_EDGES, judge, judge_rows, judge_update, missing
from spec.pooling import RowGradient
from spec.rounding import C, Tracked
from spec.update import Updated


def tracked(value, sigma=1e-6):
    value = np.asarray(value, np.float64)
    return Tracked(value, np.full(value.shape, sigma**2))


def test_an_error_inside_the_bound_conforms_and_one_outside_does_not():
    expected = tracked([1.0, 2.0, 3.0])
    inside = judge("x", "forward", np.float32([1, 2 + 0.9 * C * 1e-6, 3]), expected)
    outside = judge("x", "forward", np.float32([1, 2, 3 - 1.1 * C * 1e-6]), expected)
    assert inside.conforms and inside.place == [1] and inside.worst == pytest.approx(0.9, abs=0.05)
    assert not outside.conforms and outside.place == [2] and outside.elements == 3
    assert "x[2]" in outside.summary() and "expected 3" in outside.summary()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_even_under_a_wide_bound(bad):
    verdict = judge("x", "forward", np.float32([bad]), tracked([1.0], sigma=1e30))
    assert not verdict.conforms and verdict.worst == np.inf


@pytest.mark.parametrize(("value", "sigma"), [(1.0, np.inf), (1.0, np.nan), (np.inf, 1.0), (np.nan, 1.0)])
def test_a_reference_that_is_not_finite_judges_nothing(value, sigma):
    """Under an infinite bound everything would conform."""
    verdict = judge("x", "forward", np.float32([1, 1]), tracked([1.0, value], sigma=np.array([1e-6, sigma])))
    assert not verdict.conforms and "nothing can be judged at [1]" in verdict.problem


def test_exact_tensors_must_match_exactly():
    expected = tracked([1.0, 0.0], sigma=0)
    assert judge("x", "forward", np.float32([1, 0]), expected).conforms
    assert judge("x", "forward", np.float32([np.nextafter(np.float32(1), np.float32(2)), 0]), expected).worst == np.inf


def test_shape_and_dtype_are_judged_first():
    expected = tracked([[1.0, 2.0]])
    assert "expected float32[1, 2], found float32[2]" in judge("x", "forward", np.float32([1, 2]), expected).problem
    assert "found float64" in judge("x", "forward", np.array([[1.0, 2.0]]), expected).problem
    assert not missing("x", "forward").conforms


def test_an_all_zero_result_scores_the_null_ratio():
    expected = tracked([0.0, 1.0])
    zeros = judge("x", "backward", np.zeros(2, np.float32), expected)
    assert not zeros.conforms and zeros.worst == zeros.null_ratio > 1
    assert judge("x", "backward", np.zeros(2, np.float32), tracked([0.0, 0.0])).null_ratio is None


def test_histogram_counts_every_element_once():
    errors = np.array([0, 1e-5, 5e-4, 5e-3, 5e-2, 0.2, 0.5, 2.0])
    sigma = 1e-3
    verdict = judge("x", "forward", (errors * C * sigma).astype(np.float32), tracked(np.zeros(8), sigma))
    assert verdict.histogram == [2, 1, 1, 1, 1, 1, 1] and len(RATIO_EDGES) == 6


def test_merging_steps_keeps_the_worse_and_adds_the_elements():
    good, bad = (judge("x", "update", np.float32([value]), tracked([1.0])) for value in (1, 1.1))
    good.step, bad.step = 1, 2
    for merged in (good.merge(bad), bad.merge(good)):
        assert not merged.conforms and merged.step == 2 and merged.elements == 2
    assert not good.merge(missing("x", "update")).conforms


def rows(values, sigma=1e-6):
    return RowGradient(np.array([2, 5]), np.array([1, 2]), np.square(values), tracked(values, sigma))


def test_duplicates_of_a_sparse_gradient_are_summed_before_it_is_judged():
    expected = rows([[1.0], [5.0]])
    assert judge_rows("g", np.array([5, 2, 5]), np.float32([[2], [1], [3]]), expected).conforms
    assert judge_rows("g", np.array([2, 5]), np.float32([[1], [5]]), expected).conforms
    dropped = judge_rows("g", np.array([5, 2]), np.float32([[2], [1]]), expected)
    assert not dropped.conforms and dropped.place == [5, 0]


def test_rows_that_are_missing_or_too_many_fail():
    expected = rows([[1.0], [5.0]])
    assert judge_rows("g", np.array([5]), np.float32([[5]]), expected).place == [2, 0]
    assert "row 3 has a gradient and was not looked up" in judge_rows(
        "g", np.array([2, 5, 3]), np.float32([[1], [5], [0]]), expected).problem
    assert not judge_rows("g", np.array([2.0, 5.0]), np.float32([[1], [5]]), expected).conforms
    assert not judge_rows("g", np.array([2, 5]), np.float32([[1, 1], [5, 5]]), expected).conforms


def test_an_update_may_touch_its_own_rows_alone():
    before = np.arange(8, dtype=np.float32).reshape(4, 2)
    expected = Updated(np.array([1]), tracked([[2.5, 3.5]]))
    right = before.copy()
    right[1] += 0.5
    assert judge_update("w", before, right, expected, 1).elements == 8
    assert judge_update("w", before, right, expected, 1).conforms
    negative_zero = right.copy()
    negative_zero[0, 0] = -0.0
    assert "row 0 changed" in judge_update("w", before, negative_zero, expected, 1).problem
    stray = right.copy()
    stray[3, 0] = np.nextafter(stray[3, 0], np.float32(0))
    assert "row 3 changed" in judge_update("w", before, stray, expected, 1).problem
    stale = judge_update("w", before, before, expected, 1)
    assert not stale.conforms and stale.worst == stale.null_ratio
