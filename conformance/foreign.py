"""Results that foreign programs wrote beside a bundle, as the outcome of a run, for all the reports of one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conformance.bundle import RESULTS, Bundle
from conformance.case import Case
from conformance.judge import judge_results, read_result
from conformance.quota import Quota, enforce, trace_quota, training_quota
from conformance.replay import Fault, find_faults, judge_trace
from conformance.result import BackendResult, CaseResult, Section
from conformance.xfail import ExpectedFailures
from spec import toml
from spec.batch import Batch
from spec.parameters import is_sparse, parameter_shapes, trained_parameters
from spec.reference import evaluate
from spec.tensors import activations, batch_names, slice_names, trace_names


def run_bundle(bundle: Bundle, names: Sequence[str] = (), expected: ExpectedFailures | None = None) -> CaseResult:
    """Judge `results/NAME` for these names, or for every folder there is. Raises InputError where there is none."""
    folders = [bundle.folder / RESULTS / name for name in names] or bundle.result_folders()
    cases = {case["optimizer"]: case for case in bundle.manifest["cases"]}
    case = _case(bundle)
    results = []
    for folder in folders:
        judgement = judge_results(bundle, folder)
        sections = [Section(optimizer, cases[optimizer]["step"], cases[optimizer].get("learning_rate"), verdicts,
                            cases[optimizer].get("undecided", {}))
                    for optimizer, verdicts in judgement.sections.items()]
        for section in sections:
            enforce(section, _quota(case, section.optimizer))
            if section.optimizer is None and not all(verdict.conforms for verdict in section.tensors):
                section.faults = _replay(bundle, folder, case)
        result = BackendResult(judgement.name, "fails", engine="results in files", sections=sections)
        result.conclude(bundle.manifest["spec"], expected or ExpectedFailures())
        results.append(result)
    return CaseResult(case, results, [])


def _quota(case: Case, optimizer: str | None) -> Quota:
    """A bundle asks for no prediction besides the trace's, and a sparse gradient goes by its parameter's name."""
    quota = (training_quota(case.under(optimizer), case.batches) if optimizer
             else trace_quota(case.spec, case.batches[0], gradients=True))
    return quota._replace(elements={name.removesuffix("_values"): count for name, count in quota.elements.items()
                                    if name != "predict"})


def _replay(bundle: Bundle, folder: Path, case: Case) -> list[Fault]:
    """The steps at fault of forward and backward, from what of them is there."""
    spec, batch = case.spec, case.batches[0]
    parameters = {name: bundle.read(f"given/parameters/{name}.npy") for name in parameter_shapes(spec)}
    trace = {}
    for name in trace_names(spec):
        group = "forward" if name in activations(spec) else "backward"
        array = read_result(folder / group / f"{name}.npy")
        if isinstance(array, np.ndarray):
            trace[name] = array
    for parameter in filter(is_sparse, trained_parameters(spec)):
        dense = read_result(folder / "backward" / f"{parameter}_grad.npy")
        if isinstance(dense, np.ndarray) and dense.shape == parameters[parameter].shape:
            rows = np.unique(batch.indices[int(parameter.split(".")[1])])
            trace |= zip(slice_names(parameter), (rows, dense[rows]), strict=True)
    expected, replayed = (evaluate(spec, parameters, batch, engine=trace, replay=replay) for replay in (False, True))
    return find_faults(spec, judge_trace(spec, trace, expected, replayed, gradients=True), {})


def _case(bundle: Bundle) -> Case:
    """What the bundle was written from, but for the parameters."""
    facts = bundle.manifest
    spec = toml.loads((bundle.folder / "spec.toml").read_text(encoding="utf-8"), str(bundle.folder / "spec.toml"))
    optimizers = list(dict.fromkeys(case["optimizer"] for case in facts["cases"] if case["optimizer"]))
    folders = list(dict.fromkeys(case["batch"] for case in facts["cases"]))
    batches = [Batch.from_arrays(spec, {name: bundle.read(f"{folder}/{name}.npy") for name in batch_names(spec)})
               for folder in folders]
    return Case(spec, {}, batches, optimizers, f"bundle of {facts['data']} data", facts["seed"])
