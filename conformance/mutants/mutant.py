"""A seeded fault, and a backend that has it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np

from conformance.case import Case
from spec.backend import Availability, Backend, Model
from spec.batch import Batch
from spec.graph import steps
from spec.model import ModelSpec
from spec.parameters import Arrays
from spec.pooling import coalesce
from spec.tamper import Change, Tamper, find_tamper
from spec.tensors import slice_names

Setting = Callable[[ModelSpec], ModelSpec]


@dataclass
class Step:
    """A training step as an update fault sees it.

    Attributes:
        spec: of the case.
        before, after: parameters and optimizer state.
        gradients: of the trace before the step; of a sparse parameter whole, zero for other rows.
        slices: of each sparse parameter its gradient as the trace has it: indices, values.
        memory: kept from step to step.
    """

    spec: ModelSpec
    before: Arrays
    after: Arrays
    gradients: Arrays
    slices: dict[str, tuple[np.ndarray, np.ndarray]]
    memory: dict[str, np.ndarray]


@dataclass(frozen=True)
class Mutant:
    """One fault. Exactly one of `step`, `spec`, `batch`, `update` and `behaviour` says what it does.

    Attributes:
        phase: "forward", "backward", "update", "data" or "precision".
        what: one line on what is wrong.
        tensor: what the wrong operator makes; empty where the fault is in no single operator. `{last}` and
            `{top}` are the numbers of the last layers of bottom and top.
        named: what localisation may name, besides; patterns.
        setting: the spec that the fault is tried on, from the one that was asked for: it must have such an operator.
        step: (y, *sources) -> y: the operator's right output, and what it reads, in the order of `spec.graph`; of a
            sparse gradient the indices of its values last.
        spec: the spec that the backend is given, in place of the right one.
        batch: the batch that the backend is given.
        update: what the step leaves behind, where that is wrong.
        behaviour: wraps a model; its second argument makes another one like it.
        optimizer: what to train with; None compares forward and backward alone.
        corner: parameters on which the fault shows, where random ones would only by chance.
        equivalent: why the fault makes no difference in this case; "" where it does.
    """

    name: str
    phase: str
    what: str
    tensor: str = ""
    named: tuple[str, ...] = ()
    setting: Setting | None = None
    step: Callable[..., np.ndarray] | None = None
    spec: Setting | None = None
    batch: Callable[[ModelSpec, Batch], Batch] | None = None
    update: Callable[[Step], Arrays] | None = None
    behaviour: Callable[[Model, Callable[[], Model]], Model] | None = None
    optimizer: str | None = None
    corner: Callable[[Arrays], Arrays] | None = None
    equivalent: Callable[[Case], str] | None = None

    def at(self, spec: ModelSpec) -> str:
        return self.tensor.format(last=len(spec.bottom.widths) - 1, top=len(spec.top.widths) - 1)

    def names(self, spec: ModelSpec, tensor: str) -> bool:
        """Whether localisation that names this tensor is right."""
        return tensor == self.at(spec) or any(fnmatchcase(tensor, pattern) for pattern in self.named)

    def change(self, spec: ModelSpec) -> Change:
        """What `step` does, for a Tamper."""
        tensor = self.at(spec)
        reads = (tensor, *steps(spec)[tensor])
        if tensor.endswith("_grad_values"):
            reads += (slice_names(tensor.removesuffix("_grad_values"))[0],)

        def make(arrays: Arrays) -> np.ndarray:
            with np.errstate(all="ignore"):
                made = np.asarray(self.step(*(arrays[name] for name in reads)), np.float32)
            return made.reshape(arrays[tensor].shape)

        return Change(tensor, reads, make)


@dataclass
class Mutated:
    """A Backend with one fault: inside, where it has a Tamper that reaches the operator; else in what it returns."""

    backend: Backend
    mutant: Mutant
    tamper: Tamper | None = field(init=False)

    def __post_init__(self) -> None:
        self.tamper = find_tamper(self.backend.name)

    @property
    def name(self) -> str:
        return f"{self.backend.name}+{self.mutant.name}"

    @property
    def trains(self) -> bool:
        return self.backend.trains

    def available(self) -> Availability:
        return self.backend.available()

    def create(self, spec: ModelSpec, parameters: Arrays, device: str = "cpu") -> Model:
        mutant, backend, change = self.mutant, self.backend, None
        if mutant.step:
            change = mutant.change(spec)
            inside = self.tamper and self.tamper.tampered(backend, change)
            backend, change = (inside, None) if inside else (backend, change)
        model = backend.create(mutant.spec(spec) if mutant.spec else spec, parameters, device)
        if mutant.behaviour:
            model = mutant.behaviour(model, lambda: self.backend.create(spec, parameters, device))
        return _MutatedModel(model, mutant, spec, change, self.tamper)


class _MutatedModel:
    """A Model that is given a wrong batch, or leaves something wrong behind, or returns it."""

    def __init__(self, model: Model, mutant: Mutant, spec: ModelSpec, change: Change | None,
                 tamper: Tamper | None) -> None:
        self._model, self._mutant, self._spec, self._change, self._tamper = model, mutant, spec, change, tamper
        self._memory: dict[str, np.ndarray] = {}
        self._left: Arrays = {}
        """Results of wrong updates, where the model itself can't be written to."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def predict(self, batch: Batch) -> np.ndarray:
        return self._model.predict(self._given(batch))

    def trace(self, batch: Batch) -> Arrays:
        given = self._given(batch)
        return self._changed(self._model.trace(given), given)

    def train_step(self, batch: Batch) -> float:
        given = self._given(batch)
        if self._mutant.update is None:
            wrong = self.trace(batch)["loss"] if self._change and self._change.tensor == "loss" else None
            loss = self._model.train_step(given)
            return loss if wrong is None else float(wrong)
        before, trace = self.parameters() | self.optimizer_state(), self._model.trace(given)
        loss = self._model.train_step(given)
        after = self._model.parameters() | self._model.optimizer_state()
        step = Step(self._spec, before, after, *_gradients(trace, before), self._memory)
        left = {name: np.asarray(array, np.float32) for name, array in self._mutant.update(step).items()}
        if self._tamper:
            self._tamper.write(self._model, left)
        else:
            self._left |= left
        return loss

    def parameters(self) -> Arrays:
        return self._with_left(self._model.parameters())

    def optimizer_state(self) -> Arrays:
        return self._with_left(self._model.optimizer_state())

    def _with_left(self, arrays: Arrays) -> Arrays:
        return arrays | {name: array.copy() for name, array in self._left.items() if name in arrays}

    def _given(self, batch: Batch) -> Batch:
        return self._mutant.batch(self._spec, batch) if self._mutant.batch else batch

    def _changed(self, trace: Arrays, batch: Batch) -> Arrays:
        if self._change is None or self._change.tensor not in trace:
            return trace
        held = self._model.parameters() | batch.arrays() | trace
        return trace | {self._change.tensor: self._change.make({name: held[name] for name in self._change.reads})}


def _gradients(trace: Mapping[str, np.ndarray],
               before: Arrays) -> tuple[Arrays, dict[str, tuple[np.ndarray, np.ndarray]]]:
    gradients, slices = {}, {}
    for name, parameter in before.items():
        indices, values = slice_names(name)
        if f"{name}_grad" in trace:
            gradients[name] = trace[f"{name}_grad"]
        elif values in trace:
            slices[name] = trace[indices], trace[values]
            rows, sums = coalesce(*slices[name])
            gradients[name] = np.zeros_like(parameter)
            gradients[name][rows] = sums
    return gradients, slices
