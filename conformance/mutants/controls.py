"""Right results by other ways: what the suite must let pass."""

import numpy as np

from conformance.mutants import settings
from conformance.mutants.data import Behaviour
from conformance.mutants.mutant import Mutant
from spec.batch import Batch
from spec.parameters import Arrays
from spec.pooling import segment_sum
from spec.tensors import activations


def _reversed_sum(terms: np.ndarray) -> np.ndarray:
    """Over the first axis, one after another in float32, the last first."""
    total = np.zeros(terms.shape[1:], np.float32)
    for term in terms[::-1]:
        total = total + term
    return total


def _running_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b with the sum over K one product at a time, the last first: the longest chain of roundings there is."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in reversed(range(a.shape[1])):
        total += a[:, k, None] * b[None, k]
    return total


def _split_matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In four parts of K, summed afterwards, as split-K kernels do."""
    parts = np.array_split(np.arange(a.shape[1]), 4)
    return sum((a[:, part] @ b[part] for part in parts), np.float32(0))


def _wide(function):
    """In float64, rounded once."""
    return lambda y, *sources: function(*(x.astype(np.float64) if x.dtype == np.float32 else x for x in sources))


def _mean_rows(y, weight, indices, lengths):
    """Each row divided by n, then summed."""
    n = np.repeat(np.maximum(lengths, 1), lengths)[:, None].astype(np.float32)
    return segment_sum(weight[indices] / n, lengths)


class _OtherOrder(Behaviour):
    """The samples of every batch in another order, and what it returns of each put back."""

    def _order(self, batch: Batch) -> np.ndarray:
        return np.random.default_rng(batch.size).permutation(batch.size)

    def _reordered(self, batch: Batch) -> Batch:
        order, indices, lengths = self._order(batch), [], []
        for its, n in zip(batch.indices, batch.lengths, strict=True):
            bags = np.split(its, np.cumsum(n)[:-1])
            indices.append(np.concatenate([bags[sample] for sample in order]))
            lengths.append(n[order])
        return Batch(batch.dense[order], tuple(indices), tuple(lengths), batch.label[order])

    def _put_back(self, batch: Batch, array: np.ndarray) -> np.ndarray:
        back = np.empty_like(array)
        back[self._order(batch)] = array
        return back

    def predict(self, batch: Batch) -> np.ndarray:
        return self._put_back(batch, self._model.predict(self._reordered(batch)))

    def trace(self, batch: Batch) -> Arrays:
        trace = self._model.trace(self._reordered(batch))
        samples = {name for name in activations(self._model.spec) if name != "loss"}
        return {name: self._put_back(batch, array) if name.removesuffix("_grad") in samples else array
                for name, array in trace.items()}

    def train_step(self, batch: Batch) -> float:
        return self._model.train_step(self._reordered(batch))


CONTROLS: tuple[Mutant, ...] = (
    Mutant("fc-reversed", "correct", "a product's sum one term at a time, the last first", "top.0.preactivation",
           step=lambda y, x, w, b: _running_matmul(x, w.T) + b),
    Mutant("fc-split", "correct", "a product in four parts of K", "top.0.preactivation",
           step=lambda y, x, w, b: b + _split_matmul(x, w.T)),
    Mutant("fc-float64", "correct", "a product in float64, rounded once", "bottom.1.preactivation",
           step=_wide(lambda x, w, b: x @ w.T + b)),
    Mutant("sigmoid-float64", "correct", "the sigmoid in float64, rounded once", "probability",
           step=_wide(lambda z: 1 / (1 + np.exp(-z)))),
    Mutant("pool-reversed", "correct", "a bag's rows summed one by one", "tables.0.pooled",
           setting=settings.RAGGED_SUM,
           step=lambda y, weight, indices, lengths: np.stack([
               _reversed_sum(weight[bag]) for bag in np.split(indices, np.cumsum(lengths)[:-1])])),
    Mutant("pool-mean-of-quotients", "correct", "rows divided by n before they are summed", "tables.1.pooled",
           setting=settings.RAGGED_MEAN, step=_mean_rows),
    Mutant("interaction-split", "correct", "dot products by einsum", "interaction.products",
           setting=settings.interaction(kind="dot"), step=lambda y, z: np.einsum("bfe,bge->bfg", z, z)),
    Mutant("loss-reversed", "correct", "squares, not expanded, summed one by one", "loss", setting=settings.MSE,
           step=lambda y, p, label: _reversed_sum(np.square(p - label)) / np.float32(len(p))),
    Mutant("grad-weight-reversed", "correct", "the sum over the batch one sample at a time, the last first",
           "top.0.weight_grad", step=lambda y, x, dz: _running_matmul(dz.T, x)),
    Mutant("grad-weight-split", "correct", "the batch in four parts", "bottom.0.weight_grad",
           step=lambda y, x, dz: _split_matmul(dz.T, x)),
    Mutant("grad-bias-reversed", "correct", "the sum over the batch one by one", "top.0.bias_grad",
           step=lambda y, dz: _reversed_sum(dz)),
    Mutant("grad-input-float64", "correct", "a product in float64, rounded once", "bottom.0.activation_grad",
           step=_wide(lambda w, dz: dz @ w)),
    Mutant("grad-features-once", "correct", "(dP + dP^T) Z as one product", "interaction.features_grad",
           setting=settings.interaction(kind="dot"), step=lambda y, z, dp: (dp + dp.transpose(0, 2, 1)) @ z),
    *(Mutant(f"batch-order-{optimizer}", "correct", "the samples of each batch in another order",
             behaviour=_OtherOrder, optimizer=optimizer) for optimizer in ("sgd", "adagrad", "rowwise_adagrad")),
)
