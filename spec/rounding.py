"""Float64 values that carry the variance of a float32 engine's rounding error (SPEC.md, 10).

Every rounding of a result y is a random error, uniform in +-u y; errors propagate to first order and add by
variance. A worst-case bound would grow about 25-fold a layer at width 1024 and accept anything.

A running sum of n terms t with result y rounds each of its partial sums s: the variance is r sum s^2 with
r = u^2 / 3. Terms of mixed signs make sum s^2 about n / 2 sum t^2 (a random walk), terms of one sign about
n / 3 y^2, as a plain sum of n ReLU outputs really shows. Hence r n / 2 (sum t^2 + y^2) for any sum.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spec.alike import Alike, alike

U = 2.0**-24
"""Unit roundoff of float32."""

C = 16.0
"""An element conforms when |error| <= C sqrt(variance). One constant for everything: also for how near a
kink (ReLU at 0, a clip's bounds, Adagrad's sign) a value must be for the engine to land on the other side."""

FLIP = 1 / C
"""Share of the elements within reach of a kink that are granted to land on its other side: the variance of a
term t that may be there or not is t^2 / C, so that one flipped term uses a quarter of its tensor element's bound."""

ROUND = U**2 / 3
"""Relative variance of one rounding."""

FUNCTION = 4 * ROUND
"""Relative variance granted to one evaluation of log or sigmoid: they may be off by 2 u."""

UNDERFLOW = 2.0**-126
"""Least normal float32: an engine may flush what is smaller to zero."""


class Tracked(NamedTuple):
    """A float64 array and the variance of its rounding error, of the same shape."""

    value: np.ndarray
    variance: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        """C sigma: as far as an element of a conforming engine may be off."""
        return C * np.sqrt(self.variance)

    def __getitem__(self, key: object) -> "Tracked":
        return Tracked(self.value[key], self.variance[key])

    def reshape(self, *shape: int) -> "Tracked":
        return Tracked(self.value.reshape(shape), self.variance.reshape(shape))


Tap = Callable[[str, Tracked], Tracked]
"""Sees every tensor under its name as it is computed, and returns what the computation goes on with."""


def exact(value: np.ndarray) -> Tracked:
    """A value that has no error: an input, or a parameter as the engine itself holds it."""
    value = np.asarray(value, np.float64)
    return Tracked(value, np.zeros_like(value))


def summed(n: float | np.ndarray, squares: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    """Local variance of a sum of n roundings: `squares` is the sum of t^2, y the result."""
    return n * (ROUND / 2 * (squares + y**2) + UNDERFLOW**2)


def recorded(value: np.ndarray) -> Tracked:
    """An engine's own tensor, as its trace shows it: one rounding away from what it may have gone on with."""
    value = np.asarray(value, np.float64)
    return Tracked(value, ROUND * value**2)


def equal_rows(*arrays: np.ndarray) -> np.ndarray:
    """int64 [B]: a number for each row that rows share which are equal in float32, in all of the arrays [B, ...]."""
    with np.errstate(over="ignore"):
        rows = np.concatenate([array.reshape(len(array), -1) for array in arrays], 1).astype(np.float32) + np.float32(0)
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)


def occurrences(*arrays: np.ndarray) -> np.ndarray:
    """float64 [B]: how many rows are equal to each one in float32, itself included, in all of the arrays [B, ...].

    The errors of equal terms have one cause: in a sum, m of them have m^2 the variance of one.
    """
    groups = equal_rows(*arrays)
    return np.bincount(groups)[groups].astype(np.float64)


def drift(like: Alike, squares: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
    """What is added to a sum's variance where terms are like others of them; `squares` and `y` as in `summed`.

    A running sum rounds such terms all the same way while it stays within one power of two. Their errors are not
    independent: within a group they add up as they are, each at most u times a partial sum, which is |y| or a random
    walk; groups are independent of each other: of several, three standard deviations are granted. That is their reach.
    """
    partial = np.abs(y) + 3 * np.sqrt(squares)
    return (U / C * partial) ** 2 * np.minimum(like.count**2, 9 * like.squares)


def concatenate(parts: list[Tracked], axis: int) -> Tracked:
    return Tracked(np.concatenate([p.value for p in parts], axis), np.concatenate([p.variance for p in parts], axis))


def stack(parts: list[Tracked], axis: int) -> Tracked:
    return Tracked(np.stack([p.value for p in parts], axis), np.stack([p.variance for p in parts], axis))


def add(a: Tracked, b: Tracked) -> Tracked:
    y = a.value + b.value
    return Tracked(y, a.variance + b.variance + ROUND * y**2)


def fully_connected(x: Tracked, w: np.ndarray, b: np.ndarray) -> Tracked:
    """x W^T + b for x [B, K], W [N, K], b [N] (Caffe2's FC)."""
    n = w.shape[1] + 1
    y = x.value @ w.T + b
    squares = summed(n, x.value**2, 0)  # summed over the products by the same matrix product as the variances
    return Tracked(y, (squares + x.variance) @ (w**2).T + summed(n, b**2, y))


def fully_connected_gradient(x: Tracked, w: np.ndarray, dy: Tracked) -> tuple[Tracked, Tracked, Tracked]:
    """(dW [N, K], db [N], dx [B, K]) of `fully_connected` for dy [B, N] (Caffe2's FCGradient)."""
    batch, outputs = dy.value.shape
    dw = dy.value.T @ x.value
    dy_squared = dy.value**2
    m = occurrences(dy.value, x.value)[:, None]
    dw_variance = (m * dy.variance + summed(batch, dy_squared, 0)).T @ x.value**2 + dy_squared.T @ (m * x.variance)
    of_dy, of_x = alike(dy.value), alike(x.value)  # a product is like others where both factors are
    both = np.ix_(np.flatnonzero(of_dy.count), np.flatnonzero(of_x.count))
    dw_variance[both] += drift(Alike(*(np.minimum(a.T, b)[both] for a, b in zip(of_dy, of_x, strict=True))),
                               dy_squared[:, both[0][:, 0]].T @ x.value[:, both[1][0]] ** 2, dw[both])
    db = dy.value.sum(0)
    m = occurrences(dy.value)[:, None]
    db_variance = (m * dy.variance).sum(0) + summed(max(batch - 1, 0), dy_squared.sum(0), db)
    db_variance += drift(Alike(*(numbers[0] for numbers in of_dy)), dy_squared.sum(0), db)
    dx = dy.value @ w
    dx_variance = (dy.variance + summed(outputs, dy_squared, 0)) @ w**2 + summed(outputs, 0, dx)
    return (Tracked(dw, dw_variance + summed(batch, 0, dw)), Tracked(db, db_variance), Tracked(dx, dx_variance))


def near(x: Tracked, kink: float) -> np.ndarray:
    """Where an engine may find itself on the other side of a kink."""
    return (np.abs(x.value - kink) <= x.reach) & (x.variance > 0)


def relu(z: Tracked) -> Tracked:
    return Tracked(np.maximum(z.value, 0), np.where((z.value > 0) | near(z, 0), z.variance, 0))


def relu_gradient(z: Tracked, dy: Tracked, engine_z: np.ndarray | None = None) -> Tracked:
    """dy where z > 0.

    Near 0 the engine's mask may rightly differ. Given its own z, its mask is taken there, and the bound stays
    tight; not given, the variance takes the flip in.
    """
    on, undecided = z.value > 0, near(z, 0)
    if engine_z is None:
        flips = np.where(undecided, dy.variance + FLIP * dy.value**2, 0)
        return Tracked(np.where(on, dy.value, 0), np.where(on, dy.variance, 0) * ~undecided + flips)
    on = np.where(undecided, engine_z > 0, on)
    return Tracked(np.where(on, dy.value, 0), np.where(on, dy.variance, 0))


def sigmoid_value(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), accurate at both ends."""
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


def sigmoid(z: Tracked) -> Tracked:
    y = sigmoid_value(z.value)
    slope = y * sigmoid_value(-z.value)
    return Tracked(y, slope**2 * z.variance + FUNCTION * y**2 + UNDERFLOW**2)


def complement(z: Tracked | None, y: Tracked) -> np.ndarray:
    """1 - y for y = sigmoid(z): from z, which cancels nothing; of an engine's own y, without z, as it is."""
    return 1 - y.value if z is None else sigmoid_value(-z.value)


def sigmoid_gradient(z: Tracked | None, y: Tracked, dy: Tracked) -> Tracked:
    """dy y (1 - y), where the engine uses its own rounded y (Caffe2's SigmoidGradient). z: see `complement`."""
    slope = y.value * complement(z, y)
    dz = dy.value * slope
    from_y = (dy.value * (1 - 2 * y.value)) ** 2 * y.variance
    return Tracked(dz, slope**2 * dy.variance + from_y + 3 * ROUND * dz**2 + UNDERFLOW**2)
