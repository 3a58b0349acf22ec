"""Before a backend is timed it is judged, in the process, with the threads and on the spec that will be timed."""

from typing import Any

from conformance.case import make_case
from conformance.run import run_case
from conformance.verdict import judge
from spec.backend import Backend, Model
from spec.batch import Batch
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.reference import evaluate
from spec.rounding import Tracked

STEPS = 2
VERIFIED = 512
"""Float64 takes its time."""


def judge_backend(backend: Backend, spec: ModelSpec, batch_size: int, training: bool, seed: int) -> dict[str, Any]:
    """The suite's verdict on every tensor of a forward and backward pass and, for training, of STEPS steps."""
    case = make_case(spec, seed=seed, batch_size=batch_size, steps=STEPS if training else 0,
                     optimizers=[spec.optimizer.kind])
    (result,) = run_case(case, [backend]).backends
    worst = result.worst
    return {"conforms": result.status == "conforms", "tensors": len(result.verdicts), "elements": result.elements,
            "worst": worst.worst if worst else None, "rows": max(table.rows for table in spec.tables),
            "batch_size": batch_size, "reason": result.reason or (worst.summary() if worst else "nothing to compare")}


def expected_probability(spec: ModelSpec, parameters: Arrays, batch: Batch) -> Tracked:
    """What any backend predicts for the first VERIFIED samples of a batch, within float32's rounding."""
    return evaluate(spec, parameters, _first(batch, VERIFIED), gradients=False).tensors["probability"]


def judge_prediction(model: Model, batch: Batch, expected: Tracked) -> str:
    """Why the model that is timed is wrong on a batch of full size; empty where it is right."""
    probability = model.predict(batch)
    if probability.shape != (batch.size, 1):
        return f"probability: expected shape [{batch.size}, 1], found {list(probability.shape)}"
    verdict = judge("probability", "forward", probability[:len(expected.value)], expected)
    return "" if verdict.conforms else verdict.summary()


def _first(batch: Batch, samples: int) -> Batch:
    lengths = tuple(lengths[:samples] for lengths in batch.lengths)
    indices = tuple(indices[:each.sum()] for indices, each in zip(batch.indices, lengths, strict=True))
    return Batch(batch.dense[:samples], indices, lengths, batch.label[:samples])
