"""A conformance report as JUnit XML, which CI systems show.

A suite for each backend on each case, a test for each tensor. What was expected to fail, and a backend that is not
installed, is skipped, with the reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from spec.files import write_text


def write_junit(report: dict[str, Any], path: Path) -> None:
    """Of `conformance.report.as_dict`'s dictionary. Raises InputError where the file cannot be written."""
    document = JUnitXml(report["product"])
    for case in report["cases"]:
        for backend in case["backends"]:
            document.add_testsuite(_suite(f"{case['spec']}.{backend['backend']}", backend))
        if case["pairs"]:
            document.add_testsuite(_pairs(f"{case['spec']}.pairs", case["pairs"]))
    if report["xfail"]["strict"]:
        document.add_testsuite(_unexpected(report["xfail"]["entries"]))
    document.update_statistics()
    write_text(path, document.tostring().decode() + "\n")


def _suite(name: str, backend: dict[str, Any]) -> TestSuite:
    suite = TestSuite(name)
    if backend["status"] == "missing":
        suite.add_testcase(_test(name, "available", skipped=f"{backend['reason']}; to add it: {backend['remedy']}"))
        return suite
    suite.add_property("engine", backend["engine"])
    for group, tensors in _groups(backend):
        for verdict in tensors:
            suite.add_testcase(_test(f"{name}.{group or verdict['phase']}", verdict["tensor"],
                                     "" if verdict["conforms"] or verdict["xfail"] else verdict["summary"],
                                     verdict["xfail"]))
    if repeat := backend["repeat"]:
        failure = repeat["difference"] or "nothing was compared"
        suite.add_testcase(_test(name, "repeats its bits", failure if repeat["broken"] else "",
                                 "" if repeat["broken"] or not repeat["difference"] else f"not promised: {failure}"))
    return suite


def _groups(backend: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for section in backend["sections"]:
        yield section["optimizer"], section["tensors"]
    for section in backend["trajectories"]:
        yield f"{section['optimizer']}.trajectory", section["tensors"]


def _pairs(name: str, pairs: list[dict[str, Any]]) -> TestSuite:
    suite = TestSuite(name)
    for pair in pairs:
        suite.add_testcase(_test(name, f"{pair['first']} against {pair['second']}", "" if pair["conforms"] else (
            f"{pair['tensor']} differs by {float(pair['worst']):.3g} of what both may be off" if pair["elements"]
            else "nothing to compare")))
    return suite


def _unexpected(entries: list[dict[str, Any]]) -> TestSuite:
    suite = TestSuite("xfail")
    for entry in entries:
        suite.add_testcase(_test(f"xfail.{entry['backend']}", entry["tensor"], f"XPASS: {entry['reason']}"
                                 if entry["passes"] else ""))
    return suite


def _test(group: str, name: str, failure: str = "", skipped: str = "") -> TestCase:
    test = TestCase(name, group)
    test.result = [Failure(failure)] if failure else [Skipped(skipped)] if skipped else []
    return test
