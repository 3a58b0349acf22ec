"""What is made of a benchmark: comparison, page, tables. All from numbers made up here."""

import copy
import io
import json
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from spec import toml
from tools.bench import plots, report
from tools.bench.compare import compare
from tools.bench.console import milliseconds, print_report
from tools.bench.floor import Work
from tools.bench.group import Result, Timing
from tools.bench.html import write_html
from tools.bench.plan import Group, Point, Setting
from tools.bench.quiet import Meter, wait_until_quiet
from tools.cli import main

MACHINE = {"cpu": "A processor <1>", "cores": 2, "memory_bytes": 2**34, "system": "Linux x86_64", "kernel": "6",
           "python": "3.11", "environment": {"MKL_CBWR": "AVX2"}, "load_before": 0.1, "load_after": 0.9,
           "date": "2026-01-01T00:00:00+00:00"}
OPTIONS = {"rounds": 9, "data": "random", "seed": 0, "distinct_batches": 4, "verified": 512,
           "judged": {"rows": 100, "samples": 10}}
VERDICT = {"conforms": True, "worst": 0.4, "tensors": 100}


def timing(name, seconds, seed=0, **changes):
    rounds = list(seconds * np.random.default_rng(seed).lognormal(0, 0.02, 9))
    operators = {"FC": seconds / 2, "embedding/aten.x": seconds / 4, "mystery": seconds / 8}
    return Timing(name, engine=f"engine & version of {name}", verdict=VERDICT, rounds=rounds, others=[0.01] * 9,
                  cores=1.9, memory=2**28, operators=operators, **changes)


def made(factor=1.0, sizes=(64,), point=None):
    """A report in which `slow` takes twice as long as `fast`, and one backend is missing."""
    spec = toml.load("tiny")
    results = []
    for size in sizes:
        timings = [timing("fast", 1e-4 * size), timing("slow", 2e-4 * size * factor, seed=1),
                   Timing("absent", "missing", "its engine is not installed", "dlrm engine install")]
        setting = Setting("training", size)
        results.append(Result(Group(spec, 2, (setting,), point and Point("batch", size)), setting, Work(1e6, 1e5),
                              timings, 0.0))
    ceilings = [{"threads": 2, "rows": 40, "width": 8, "spec": spec.digest, "gemm": 1e11, "gather": 1e10, "libraries": [
        {"library": "NumPy", "gemm": 1e11, "gather": 1e10}, {"library": "absent", "reason": "not here"}]}]
    return json.loads(json.dumps(report.as_dict(results, "fast", MACHINE, OPTIONS, ceilings)))


def test_a_report_has_ratios_floor_and_breakdown():
    (result,) = made()["results"]
    fast, slow, absent = result["backends"]
    assert result["floor"] == pytest.approx(1e6 / 1e11 + 1e5 / 1e10)
    assert fast["ratio"] == [1, 1, 1] and slow["ratio"][1] < 2 < slow["ratio"][2]
    assert fast["over_floor"] == pytest.approx(fast["median"] / result["floor"])
    assert slow["samples_per_second"] == pytest.approx(64 / slow["median"])
    assert slow["unmapped"] == ["mystery"] and slow["breakdown"]["other"] == pytest.approx(64 * 2e-4 / 8)
    assert absent["median"] is None and absent["ratio"] is None and absent["breakdown"] is None


@pytest.mark.parametrize("factor, verdict", [(1.0, "same"), (1.03, "same"), (1.3, "slower"), (0.7, "faster")])
def test_a_change_is_told_beyond_noise_and_threshold(factor, verdict):
    changes = {change.backend: change for change in compare(made(), made(factor), threshold=0.05)}
    assert changes.keys() == {"fast", "slow"} and changes["fast"].verdict == "same"
    assert changes["slow"].verdict == verdict and changes["slow"].ratio.value == pytest.approx(factor, rel=1e-6)


def test_noise_hides_a_small_change():
    before, after = made(), made(1.1)
    for content, seed in ((before, 5), (after, 6)):
        slow = content["results"][0]["backends"][1]
        slow["rounds"] = list(np.median(slow["rounds"]) * np.random.default_rng(seed).lognormal(0, 0.5, 9))
    assert {change.verdict for change in compare(before, after, 0.05)} == {"same"}


def test_a_backend_that_lost_its_time_is_a_regression():
    after = made()
    after["results"][0]["backends"][1] |= {"status": "does not conform"}
    (gone,) = [change for change in compare(made(), after, 0.05) if change.regressed]
    assert (gone.backend, gone.verdict, gone.reason) == ("slow", "gone", "does not conform")


def run_compare(folder, before, after, *options):
    paths = []
    for name, content in (("A.json", before), ("B.json", after)):
        paths.append(folder / name)
        paths[-1].write_text(json.dumps(content))
    return CliRunner().invoke(main, ["bench", "--compare", *map(str, paths), *options])


def test_the_command_compares(tmp_path):
    assert run_compare(tmp_path, made(), made()).exit_code == 0
    slower = run_compare(tmp_path, made(), made(1.3))
    assert slower.exit_code == 1 and "slower" in slower.stdout and "1.30" in slower.stdout
    assert "1 of 2 are slower" in slower.stdout
    assert run_compare(tmp_path, made(), made(1.3), "--threshold", "0.5").exit_code == 0
    busy = made()
    busy["results"][0]["backends"][0]["disturbed"] = 0.4
    assert "warning: " in run_compare(tmp_path, made(), busy).stderr


@pytest.mark.parametrize("change, message", [
    (lambda content: content["machine"].update(cpu="another"), "expected a run on the machine of"),
    (lambda content: content["options"].update(data="criteo:x"), "expected the batches of"),
    (lambda content: content["results"][0].update(batch_size=1), "expected a setting that"),
    (lambda content: content.update(format=99), "expected a benchmark of format 1"),
])
def test_what_cannot_be_compared_is_refused(tmp_path, change, message):
    after = copy.deepcopy(made())
    change(after)
    result = run_compare(tmp_path, made(), after)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_other_files_are_refused(tmp_path):
    for text in ("", "[]", "{}"):
        path = tmp_path / "other.json"
        path.write_text(text)
        result = CliRunner().invoke(main, ["bench", "--compare", str(path), str(path)])
        assert result.exit_code == 2 and str(path) in result.stderr
    result = CliRunner().invoke(main, ["bench", "--compare", "nowhere.json", "nowhere.json"])
    assert result.exit_code == 2 and "nowhere.json" in result.stderr


@pytest.mark.parametrize("content", [made(), made(sizes=(64, 128, 256)), made(sizes=(64, 128, 256), point=True)])
def test_the_page_is_whole_and_self_contained(tmp_path, content):
    path = tmp_path / "page.html"
    write_html(content, path)
    page = path.read_text()
    assert "A processor &lt;1&gt;" in page and "<1>" not in page and "engine &amp; version" in page
    assert "its engine is not installed" in page and "mystery" in page and "dlrm engine install" in page
    assert not any(word in page for word in ("http:", "https:", "src=", "@import", "url("))
    assert len(page) < 100_000
    drawings = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]
    assert len(drawings) >= 2 and ("Growth" in page) == (len(content["results"]) > 1)
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_the_page_says_what_was_disturbed(tmp_path):
    content = made()
    write_html(content, tmp_path / "quiet.html")
    content["results"][0]["backends"][1]["disturbed"] = 0.4
    write_html(content, tmp_path / "busy.html")
    text = "other programs took up to 40 % of the cores"
    assert text in (tmp_path / "busy.html").read_text() and text not in (tmp_path / "quiet.html").read_text()


def test_bars_are_as_long_as_their_times():
    (result,) = made()["results"]
    drawn = plots.bars(result)
    fast, slow = drawn.bars
    assert (slow.x - plots.LEFT) / (fast.x - plots.LEFT) == pytest.approx(
        slow.backend["median"] / fast.backend["median"])
    stacked = plots.bars(result, stacked=True)
    for bar in stacked.bars:
        widths = {part: width for part, _, width, _ in bar.segments}
        assert widths["fc"] / widths["embedding"] == pytest.approx(2, rel=0.01) and "loss" not in widths
        assert sum(widths.values()) == pytest.approx(bar.x - plots.LEFT, abs=0.1) and bar.x <= plots.WIDTH


def test_curves_find_linear_growth():
    (plot,) = plots.growth_plots(made(sizes=(64, 128, 256))["results"])
    assert plot.unit == plots.UNITS["batch"] and [curve.name for curve in plot.curves] == ["fast", "slow"]
    for curve in plot.curves:
        assert curve.growth.exponent == pytest.approx(1, abs=0.02) and curve.growth.deviation < 0.05
    assert plots.growth_plots(made()["results"]) == []


@pytest.mark.parametrize("longest", [1e-6, 0.00123, 0.5, 1, 9.99, 123])
def test_ticks_are_few_and_within(longest):
    ticks = plots.nice_ticks(longest)
    assert 4 <= len(ticks) <= 9 and ticks[0] == 0 and ticks[-1] <= longest * 1.0001
    assert len(plots.log_ticks(longest, longest * 300)) <= 9


def test_tables_say_what_is_timed_and_what_is_not():
    console = Console(width=160, record=True, file=io.StringIO(), markup=False)
    print_report(made(), console)
    text = console.export_text()
    assert "tiny, training with sgd, batch 64, 2 threads" in text and "ratio to fast" in text
    assert "absent: missing: its engine is not installed; dlrm engine install" in text and "WARNING" not in text
    assert [milliseconds(s) for s in (1.2e-5, 1.234e-3, 0.01234, 0.1234, 1.2344)] == [
        "0.012", "1.23", "12.3", "123", "1,234"]


def test_what_others_do_is_measured():
    busy = Meter(own=lambda: 0.0)
    end = busy._start[0] + 0.3
    while time.perf_counter() < end:
        pass
    assert busy.others() > 0.1  # this very loop, which was not declared to be our own
    start = time.perf_counter()
    assert wait_until_quiet(lambda: 0.0, 0.0) == 0.0 and time.perf_counter() - start < 0.1
