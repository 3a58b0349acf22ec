"""One step of a backend under the glass: what it read, what it made of it, and what float64 makes of the same."""

from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from conformance.case import Case
from conformance.replay import judge_trace, own_gradients
from conformance.training import operators, unusable
from conformance.verdict import TensorVerdict, complete_rows, judge_update, missing, ratio
from spec.backend import Backend, Model
from spec.errors import InputError
from spec.graph import steps, update_steps
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.reference import Evaluation, evaluate
from spec.rounding import Tracked
from spec.tensors import slice_names
from spec.update import update

MOST_ELEMENTS = 8


@dataclass
class Element:
    """`own` and `inherited` are errors: value - replayed, and replayed - reference; `ratio` is |own| / bound."""

    place: list[int]
    value: float
    replayed: float
    bound: float
    own: float
    inherited: float
    ratio: float


@dataclass
class Examination:
    """One tensor's step. `inputs` are the backend's own, by name; `elements` the worst ones by own error / bound."""

    tensor: str
    operator: str
    engine: str
    optimizer: str | None
    step: int
    inputs: Arrays
    verdict: TensorVerdict
    elements: list[Element]

    @property
    def conforms(self) -> bool:
        """No error of its own; what it has inherited is another step's."""
        return not self.verdict.problem and (self.verdict.own is None or self.verdict.own.worst <= 1)


def examine(case: Case, backend: Backend, tensor: str, optimizer: str | None = None, step: int = 1,
            device: str = "cpu") -> Examination:
    """Replay the step that makes `tensor` in training step `step` (from 1), under `optimizer` or the spec's own.

    Raises InputError for a tensor that the model does not compute, EngineError where the engine fails.
    """
    spec = case.under(optimizer or case.spec.optimizer.kind)
    known = steps(spec, backend.trains) | (update_steps(spec) if backend.trains else {})
    if tensor not in known:
        near = get_close_matches(tensor, known, 4) or list(known)[:4]
        raise InputError(f"tensor '{tensor}'", f"one that '{spec.name}' computes under {spec.optimizer.kind}",
                         "no such tensor", f"name one of {', '.join(near)}, ... (SPEC.md, 2)")
    model = backend.create(spec, case.parameters, device)
    try:
        for batch in case.batches[:step - 1]:
            model.train_step(batch)
        return _examine(spec, case, model, backend.trains, tensor, known[tensor], optimizer, step)
    finally:
        model.close()


def _examine(spec: ModelSpec, case: Case, model: Model, trains: bool, tensor: str, sources: tuple[str, ...],
             optimizer: str | None, step: int) -> Examination:
    batch = case.batches[step - 1]
    before, state = model.parameters(), model.optimizer_state() if trains else {}
    trace = model.trace(batch)
    held = before | state | batch.arrays() | trace
    result = Examination(tensor, operators(model).get(tensor, ""), model.engine, optimizer, step,
                         {name: held[name] for name in sources if name in held}, missing(tensor, ""), [])
    wrong = unusable(spec, before | state) if trains else []
    if wrong and (tensor in update_steps(spec) or step > 1):
        result.verdict = next((verdict for verdict in wrong if verdict.tensor == tensor), wrong[0])
        return result
    before = case.parameters if wrong or not trains else before
    expected = evaluate(spec, before, batch, trains, engine=trace, same_run=tensor not in update_steps(spec))
    replayed = evaluate(spec, before, batch, trains, engine=trace, replay=True)
    verdicts = {verdict.tensor: verdict for verdict in judge_trace(spec, trace, expected, replayed, trains)}
    if tensor in update_steps(spec):
        own = update(spec, before, state, own_gradients(expected, trace, verdicts.values()))[tensor]
        expected = update(spec, before, state, expected)[tensor]
        model.train_step(batch)
        after = (model.parameters() | model.optimizer_state()).get(tensor)
        if after is None:
            return result
        result.verdict = judge_update(tensor, held[tensor], after, expected, step, own)
        if result.verdict.own:
            result.elements = _worst(after if own.rows is None else after[own.rows], expected.new, own.new, own.rows)
        return result
    indices = tensor.replace("_grad_values", "_grad_indices")
    result.verdict = verdicts[tensor] if tensor in verdicts else verdicts[indices]
    if result.verdict.own:
        result.elements = _worst(*_traced(tensor, trace, expected, replayed))
    return result


def _traced(tensor: str, trace: Arrays, expected: Evaluation,
            replayed: Evaluation) -> tuple[np.ndarray, Tracked, Tracked, np.ndarray | None]:
    if not tensor.endswith("_grad_values"):
        return trace[tensor], expected.tensors[tensor], replayed.tensors[tensor], None
    parameter = tensor.removesuffix("_grad_values")
    indices, values = slice_names(parameter)
    rows = expected.rows[parameter].rows
    return (complete_rows(rows, trace[indices], trace[values]), expected.rows[parameter].gradient,
            replayed.rows[parameter].gradient, rows)


def _worst(value: np.ndarray, expected: Tracked, replayed: Tracked, rows: np.ndarray | None) -> list[Element]:
    own = value - replayed.value
    ratios = ratio(np.abs(own), replayed.reach)
    elements = []
    for flat in np.argsort(-ratios, axis=None, kind="stable")[:MOST_ELEMENTS]:
        place = np.unravel_index(int(flat), ratios.shape)
        named = [int(i) if axis or rows is None else int(rows[i]) for axis, i in enumerate(place)]
        elements.append(Element(named, float(value[place]), float(replayed.value[place]), float(replayed.reach[place]),
                                float(own[place]), float(replayed.value[place] - expected.value[place]),
                                float(ratios[place])))
    return elements
