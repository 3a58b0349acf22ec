"""Results that foreign programs wrote beside a bundle, as the outcome of a run, for all the reports of one."""

from collections.abc import Sequence

from conformance.bundle import RESULTS, Bundle
from conformance.case import Case
from conformance.judge import judge_results
from conformance.run import BackendResult, CaseResult, Section
from conformance.xfail import ExpectedFailures
from spec import toml
from spec.batch import Batch
from spec.tensors import batch_names


def run_bundle(bundle: Bundle, names: Sequence[str] = (), expected: ExpectedFailures | None = None) -> CaseResult:
    """Judge `results/NAME` for these names, or for every folder there is. Raises InputError where there is none."""
    folders = [bundle.folder / RESULTS / name for name in names] or bundle.result_folders()
    cases = {case["optimizer"]: case for case in bundle.manifest["cases"]}
    results = []
    for folder in folders:
        judgement = judge_results(bundle, folder)
        sections = [Section(optimizer, cases[optimizer]["step"], cases[optimizer].get("learning_rate"), verdicts,
                            cases[optimizer].get("undecided", {}))
                    for optimizer, verdicts in judgement.sections.items()]
        result = BackendResult(judgement.name, "fails", engine="results in files", sections=sections)
        result.conclude(bundle.manifest["spec"], expected or ExpectedFailures())
        results.append(result)
    return CaseResult(_case(bundle), results, [])


def _case(bundle: Bundle) -> Case:
    """What the bundle was written from, but for the parameters."""
    facts = bundle.manifest
    spec = toml.loads((bundle.folder / "spec.toml").read_text(encoding="utf-8"), str(bundle.folder / "spec.toml"))
    optimizers = list(dict.fromkeys(case["optimizer"] for case in facts["cases"] if case["optimizer"]))
    folders = list(dict.fromkeys(case["batch"] for case in facts["cases"]))
    batches = [Batch.from_arrays(spec, {name: bundle.read(f"{folder}/{name}.npy") for name in batch_names(spec)})
               for folder in folders]
    return Case(spec, {}, batches, optimizers, f"bundle of {facts['data']} data", facts["seed"])
