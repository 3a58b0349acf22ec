"""Writing a bundle: a case as plain files, for programs that no Python reaches (BUNDLE.md)."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from conformance.bundle import CHECKSUM, FORMAT, MANIFEST, VERSION, sha256
from conformance.case import Case, make_case
from conformance.selection import without_kinks
from spec import toml
from spec.data import open_batches
from spec.errors import InputError
from spec.model import ModelSpec
from spec.parameters import Arrays, fixed_parameters, initial_state, is_sparse, parameter_shapes, state_shapes
from spec.reference import Evaluation, evaluate
from spec.rounding import C, Tracked, U
from spec.tensors import activations, trace_names
from spec.update import update

MOST_SAMPLES = 64
"""A bundle's batches are cut to this size unless another is asked for."""

_JUDGE = ("conformance/__init__.py", "conformance/bundle.py", "conformance/judge.py", "conformance/plain.py",
          "conformance/verdict.py", "spec/__init__.py", "spec/alike.py", "spec/errors.py", "spec/files.py",
          "spec/pooling.py", "spec/rounding.py")
"""All that the judge needs beside NumPy; `python BUNDLE/judge.py` runs these copies."""

_JUDGE_MAIN = '''"""Judge the results beside this bundle: python judge.py --help."""

import hashlib
import json
import sys
from pathlib import Path

BUNDLE = Path(__file__).resolve().parent
sys.dont_write_bytecode = True  # a bundle holds no file that its manifest does not list
sys.path.insert(0, str(BUNDLE / "judge"))

# The judge checks every file; its own, which are about to be imported, are checked here.
try:
    listed = json.loads((BUNDLE / "manifest.json").read_bytes())["files"]
except (OSError, ValueError, KeyError):
    listed = {}  # the judge says what is wrong with it
for name, facts in listed.items():
    if name.startswith("judge/"):
        path = BUNDLE / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != facts.get("sha256"):
            print(f"judge.py: {path}: is missing or was changed: fetch or write the bundle again", file=sys.stderr)
            sys.exit(2)

from conformance.judge import main  # noqa: E402

sys.exit(main(bundle=BUNDLE))
'''


def make_bundle_case(spec: ModelSpec, source: str, seed: int, batch_size: int | None, steps: int,
                     optimizers: tuple[str, ...]) -> tuple[Case, int]:
    """(a case whose batches have no kink, how many samples were passed over). Raises as `make_case`, and where
    every sample has one."""
    size = batch_size or min(spec.batch_size, MOST_SAMPLES)
    case = make_case(spec, source, seed, size, steps, optimizers)
    stream = open_batches(source, spec, size, seed)
    case.batches, passed = without_kinks(spec, case.parameters, stream, size, len(case.batches))
    return case, passed


def bundle_bytes(case: Case) -> int:
    """About how large the case's bundle becomes."""
    samples = case.batches[0].size
    parameters = sum(array.size for array in case.parameters.values())
    touched = sum(len(np.unique(indices)) for indices in case.batches[0].indices) * case.spec.embedding_dim
    dense = sum(array.size for name, array in case.parameters.items() if not is_sparse(name))
    wide = sum(2 * outputs for layers in case.spec.layer_sizes.values() for _, outputs in layers)
    wide += case.spec.embedding_dim * (2 * case.spec.interacting_vectors) + case.spec.interacting_vectors**2
    expected = 2 * samples * (wide + case.spec.interaction_width) + dense + touched
    total = 4 * parameters + 12 * expected
    for optimizer in case.optimizers:
        state = sum(np.prod(shape) for shape in state_shapes(case.under(optimizer)).values())
        share = 1 + state / parameters
        total += len(case.batches) * int(12 * share * (dense + touched) + 4 * state)
    return total


def write_bundle(case: Case, passed_over: int, folder: Path) -> dict[str, Any]:
    """Write the bundle; its manifest. The folder appears whole or not at all.

    Raises InputError where the folder exists and is not empty, and where it cannot be written or does not fit.
    """
    with _new_folder(folder) as temporary:
        free, needed = shutil.disk_usage(temporary).free, bundle_bytes(case)
        if needed > free:
            raise InputError(str(folder), f"a bundle that fits into {free / 1e6:,.0f} MB of free disk",
                             f"{needed / 1e6:,.0f} MB", "use --max-rows, a smaller --batch-size or fewer --steps")
        writer = _Writer(temporary)
        manifest = {
            "format": FORMAT, "version": VERSION, "product": f"dlrm-parity {version('dlrm-parity')}",
            "spec": case.spec.name, "digest": case.spec.digest, "data": case.source, "seed": case.seed,
            "samples": case.batches[0].size, "samples_passed_over": passed_over,
            "bound": {"rule": "abs(result - value) <= bound", "unit": "that of the value", "c": C, "u": U},
            "cases": writer.cases(case), "files": writer.files,
        }
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        (temporary / CHECKSUM).write_text(f"{sha256(temporary / MANIFEST)}  {MANIFEST}\n", encoding="utf-8")
    return manifest


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it on success and removed on failure."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(str(folder), "a new or an empty folder", "something in its place",
                             "name another folder, or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            yield temporary
            temporary.chmod(0o755)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(str(folder), "a folder that can be written", error.strerror or error,
                         "choose another folder, or free some space") from None


class _Writer:
    """Writes the files of a bundle and keeps their facts for the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    def cases(self, case: Case) -> list[dict[str, Any]]:
        """Write everything; the manifest's list of cases.

        Every step starts from the initial parameters, which are stored once; its state is what the reference makes
        of the batches before it. So no case rests on the result of another.
        """
        self._write("spec.toml", toml.dumps(case.spec).encode())
        self._write("BUNDLE.md", files("conformance").joinpath("BUNDLE.md").read_bytes())
        self._write("judge.py", _JUDGE_MAIN.encode())
        for name in _JUDGE:
            package, _, module = name.partition("/")
            self._write(f"judge/{name}", files(package).joinpath(module).read_bytes())
        self._arrays("given/parameters", case.parameters)
        states = {optimizer: initial_state(case.under(optimizer)) for optimizer in case.optimizers}
        cases = []
        for step, batch in enumerate(case.batches, start=1):
            self._arrays(f"given/batch.{step}", batch.arrays())
            evaluation = evaluate(case.spec, case.parameters, batch)
            assert not evaluation.kinks, "the batches were selected to have none"
            if step == 1:
                cases += [self._trace(case.spec, evaluation, group) for group in ("forward", "backward")]
            for optimizer, state in states.items():
                self._arrays(f"given/{optimizer}.{step}", state)
                cases.append(self._step(case, optimizer, step, state, evaluation))
        return cases

    def _trace(self, spec: ModelSpec, evaluation: Evaluation, group: str) -> dict[str, Any]:
        forward = activations(spec)
        tensors = []
        for name in trace_names(spec):
            if (name in forward) != (group == "forward") or name.endswith("_grad_indices"):
                continue
            if name.endswith("_grad_values"):
                parameter = name.removesuffix("_grad_values")
                gradient = evaluation.rows[parameter]
                tensors.append(self._expected(
                    group, f"{parameter}_grad", "backward", "slice", gradient.gradient, gradient.rows,
                    shape=list(parameter_shapes(spec)[parameter])))
            else:
                tensors.append(self._expected(group, name, group, "whole", evaluation.tensors[name]))
        return {"name": group, "group": group, "optimizer": None, "step": 1, "parameters": "given/parameters",
                "batch": "given/batch.1", "state": None, "tensors": tensors}

    def _step(self, case: Case, optimizer: str, step: int, state: Arrays, evaluation: Evaluation) -> dict[str, Any]:
        """One case; `state` becomes that after the step, rounded to float32."""
        spec, name = case.under(optimizer), f"{optimizer}.{step}"
        tensors = [self._expected(name, "loss", "forward", "whole", evaluation.tensors["loss"])]
        undecided = {}
        for tensor, new in update(spec, case.parameters, state, evaluation).items():
            given = "parameters" if tensor in case.parameters else name
            tensors.append(self._expected(name, tensor, "update", "update", new.new, new.rows,
                                          before=f"given/{given}/{tensor}.npy"))
            if new.kinks:
                undecided[tensor] = new.kinks
            if tensor in state:
                state[tensor][slice(None) if new.rows is None else new.rows] = new.new.value
        tensors += [{"name": fixed, "phase": "update", "kind": "fixed", "before": f"given/parameters/{fixed}.npy"}
                    for fixed in sorted(fixed_parameters(spec))]
        rule = {"learning_rate": float(np.float32(spec.optimizer.learning_rate))}
        if optimizer != "sgd":
            rule["eps"] = float(np.float32(spec.optimizer.eps))
        return {"name": name, "group": optimizer, "optimizer": optimizer, "step": step, **rule,
                "parameters": "given/parameters", "batch": f"given/batch.{step}",
                "state": f"given/{name}" if state else None, "undecided": undecided, "tensors": tensors}

    def _expected(self, case: str, name: str, phase: str, kind: str, expected: Tracked, rows: np.ndarray | None = None,
                  **more: Any) -> dict[str, Any]:
        """The manifest's entry of a tensor. The bound is float32, rounded up."""
        bound = expected.reach.astype(np.float32)
        bound = np.where(bound < expected.reach, np.nextafter(bound, np.float32(np.inf)), bound)
        entry = {"name": name, "phase": phase, "kind": kind, "rows": None, **more}
        arrays = {"value": expected.value.astype(np.float64), "bound": bound.astype(np.float32)}
        for part, array in (arrays | ({} if rows is None else {"rows": rows})).items():
            entry[part] = f"expected/{case}/{name}.{part}.npy"
            self._array(entry[part], array)
        return entry

    def _arrays(self, folder: str, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self._array(f"{folder}/{name}.npy", array)

    def _array(self, name: str, array: np.ndarray) -> None:
        path = self._place(name)
        np.save(path, np.ascontiguousarray(array) if array.ndim else array)
        self._note(name, {"dtype": array.dtype.str, "shape": list(array.shape),
                          "offset": path.stat().st_size - array.nbytes})

    def _write(self, name: str, content: bytes) -> None:
        self._place(name).write_bytes(content)
        self._note(name, {})

    def _place(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _note(self, name: str, facts: dict[str, Any]) -> None:
        path = self.folder / name
        self.files[name] = {"sha256": sha256(path), "bytes": path.stat().st_size, **facts}
