"""Terms that a running float32 sum rounds alike: found, covered by the bound, and none seen where there are none."""

import numpy as np
import pytest

from spec.alike import alike
from spec.rounding import C, Tracked, exact, fully_connected_gradient, recorded, summed


def groups(column: list[float]) -> tuple[float, float]:
    like = alike(np.array(column)[:, None])
    return like.count.item(), like.squares.item()


@pytest.mark.parametrize(("column", "expected"), [
    ([1.1, 2.2, 3.3], (0, 0)),
    ([1.1, 1.1, 3.3], (2, 4)),
    ([3.3, 1.1, 3.3, 1.1, 3.3], (5, 13)),
    ([0.0, 0.0, -0.0, 1.1], (0, 0)),
    ([1.1, -1.1], (0, 0)),
    ([], (0, 0)),
])
def test_equal_terms_are_counted_in_groups(column: list[float], expected: tuple[float, float]):
    assert groups(column) == expected


def test_more_terms_are_alike_the_more_there_are():
    near = [1.1, 1.1 * (1 + 1e-5)]
    assert groups(near) == (0, 0)
    assert groups(near * 512) == (1024, 1024**2)


def test_columns_and_runs_are_sums_of_their_own():
    terms = np.array([[1.1, 5], [1.1, 6], [1.1, 7], [2.2, 7]])
    assert alike(terms).count.tolist() == [[3, 2]]
    like = alike(terms, np.array([2, 0, 2]))
    assert like.count.tolist() == [[2, 0], [0, 0], [0, 2]]
    assert like.squares.tolist() == [[4, 0], [0, 0], [0, 4]]


def running(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The weights' gradient, sample by sample in float32."""
    sums = np.zeros((dy.shape[1], x.shape[1]), np.float32)
    for a, b in zip(dy, x, strict=True):
        sums += np.outer(a, b)
    return sums


def test_the_gradient_over_samples_nearly_alike_drifts_and_the_bound_covers_it():
    random, batch = np.random.default_rng(0), 3000
    dy = (0.37 * (1 + 2e-6 * random.standard_normal((batch, 5)))).astype(np.float32)
    x = (random.random(7) * (1 + 2e-6 * random.standard_normal((batch, 7)))).astype(np.float32)
    assert len(np.unique(np.concatenate([dy, x], 1), axis=0)) > 0.99 * batch  # as equal as that they are not
    dw, db, _ = fully_connected_gradient(exact(x), np.ones((5, 7)), exact(dy))
    error = np.abs(running(dy, x) - dw.value)
    independent = C * np.sqrt(summed(batch, (dy.astype(np.float64)**2).T @ x.astype(np.float64)**2, dw.value))
    assert (error > independent).any() and (error <= dw.reach).all()
    assert (np.abs(np.add.accumulate(dy)[-1] - db.value) <= db.reach).all()


def test_some_columns_alike_are_covered_among_others_that_are_not():
    random, batch = np.random.default_rng(1), 8000
    dy = np.where(random.random((batch, 4)) < 0.9, [0.37, 0.41, 0.53, 0.67], 0).astype(np.float32)
    x = random.standard_normal((batch, 6)).astype(np.float32)
    x[:, 2] = 0.71 * (1 + 1e-6 * x[:, 2])
    dw, _, _ = fully_connected_gradient(exact(x), np.ones((4, 6)), exact(dy))
    independent = C * np.sqrt(summed(batch, (dy.astype(np.float64)**2).T @ x.astype(np.float64)**2, dw.value))
    error = np.abs(running(dy, x) - dw.value)
    assert (error[:, 2] > independent[:, 2]).any() and (error <= dw.reach).all()
    assert (dw.reach[:, 2] > 3 * independent[:, 2]).all()


def test_random_samples_are_granted_nothing_worth_mentioning():
    random = np.random.default_rng(2)
    for batch, most in ((1, 1), (2, 1), (256, 1.01), (4096, 1.5)):
        dy, x = (recorded(random.standard_normal((batch, width)).astype(np.float32)) for width in (9, 8))
        dw, _, _ = fully_connected_gradient(x, np.ones((9, 8)), dy)
        inherited = dy.variance.T @ x.value**2 + (dy.value**2).T @ x.variance
        plain = Tracked(dw.value, inherited + summed(batch, (dy.value**2).T @ x.value**2, dw.value))
        assert (dw.reach <= most * plain.reach + 1e-12).all()
