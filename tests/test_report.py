"""The HTML page: complete, self-contained, safe, and loud where something fails."""

import copy
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rounded import Rounded

from conformance.case import make_case
from conformance.figure import distributions
from conformance.flow import flows
from conformance.html import write_html
from conformance.matrix import without_number
from conformance.report import as_dict
from conformance.run import run_case
from spec import toml
from spec.backend import load_backend
from spec.errors import InputError
from spec.model import ModelSpec

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Rows of all tables as [(tag, class, text, data-d)], every tag with its attributes, and all visible text."""

    def __init__(self, text):
        super().__init__()
        self.source, self.rows, self.tags, self.text, self._open, self._cell = text, [], [], "", [], None
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = [tag, dict(attrs).get("class", ""), "", dict(attrs).get("data-d", "")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(tuple(self._cell))
            self._cell = None

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not set(self._open) & {"script", "style"}:
            self.text += " ".join(data.split()) + " "
        if self._cell:
            self._cell[2] += data.strip()

    def cells(self, tensor):
        """Cells of the rows that a tensor heads, one list for each row."""
        return [row[1:] for row in self.rows if row and row[0][2] == tensor]


def report_of(*backends, spec=None, batch_size=8, steps=2, optimizers=("sgd", "adagrad")):
    case = make_case(spec or toml.load("tiny"), batch_size=batch_size, steps=steps, optimizers=optimizers)
    return as_dict([run_case(case, backends)])


@pytest.fixture
def page(tmp_path):
    def render(report):
        write_html(report, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    return render


@pytest.fixture(scope="module")
def wide():
    """26 tables, so that they are folded."""
    return report_of(Rounded(), spec=toml.load("criteo-kaggle").capped(10), batch_size=4, steps=1, optimizers=("sgd",))


def tensors(report):
    return {verdict["tensor"] for case in report["cases"] for backend in case["backends"]
            for section in backend["sections"] for verdict in section["tensors"]}


def first_verdict(report):
    return report["cases"][0]["backends"][0]["sections"][0]["tensors"][0]


def test_a_pass_on_real_backends(page):
    pytest.importorskip("torch")
    report = report_of(load_backend("torch"), Rounded(), Rounded("ahead", trains=False))
    assert report["conforms"]
    found = page(report)
    assert "✓ conforms" in found.text and "✗ does not" not in found.text
    assert report["product"] in found.text and report["machine"] in found.text
    assert report["environment"]["cpu"] in found.text and f"NumPy {np.__version__}" in found.text
    assert "PyTorch" in found.text and "forward only" in found.text
    assert not any(cell[1] == "fail" for row in found.rows for cell in row)
    assert report["cases"][0]["digest"] in found.text
    assert "8 (published: 32)" in found.text


@pytest.mark.parametrize("spec", ["tiny", "wide"])
def test_every_tensor_appears_with_its_worst_ratio(page, wide, spec):
    report = wide if spec == "wide" else report_of(Rounded())
    found = page(report)
    assert len(tensors(report)) > 40
    for section in report["cases"][0]["backends"][0]["sections"]:
        for verdict in section["tensors"]:
            shown = [cells[0] for cells in found.cells(verdict["tensor"])]
            text = "exact" if not verdict["tightness"] else None
            assert any(
                cell[2] == text if text else float(cell[2]) == pytest.approx(verdict["worst"], rel=0.06)
                for cell in shown), (verdict, shown)


def test_many_tables_fold_into_their_worst(page, wide):
    report = copy.deepcopy(wide)
    backend = report["cases"][0]["backends"][0]
    broken = next(v for v in backend["sections"][0]["tensors"] if v["tensor"] == "tables.7.pooled_grad")
    broken.update(worst=123.0, conforms=False)
    found = page(report)
    (folded,) = found.cells("tables.*.pooled_grad26")
    assert folded[0][1:3] == ("fail", "✗ 123") and folded[0][3].startswith("tables.7.pooled_grad[")
    opened = [attrs for tag, attrs in found.tags if tag == "button" and "data-open" in attrs]
    assert len(opened) == 1
    assert opened[0]["aria-controls"] in {attrs.get("id") for tag, attrs in found.tags if tag == "tbody"}
    assert page(wide).source.count("data-open") == 0


def test_capped_cases_say_so(page, wide):
    case = wide["cases"][0]
    assert f"capped: {case['rows']:,} of {case['published_rows']:,} rows" in page(wide).text
    assert "capped:" not in page(report_of(Rounded())).text


def test_a_failure_is_named_everywhere(page):
    report = report_of(Rounded(), Rounded("wrong", faults={"top.0.weight_grad": np.negative}))
    assert not report["conforms"]
    found = page(report)
    assert "✗ does not conform" in found.text
    (cells,) = found.cells("top.0.weight_grad")
    assert cells[0][1] != "fail" and cells[1][1] == "fail"
    assert "expected" in cells[1][3] and "bound" in cells[1][3] and "elements" in cells[1][3]
    worst = report["cases"][0]["backends"][1]["worst"]
    assert f"First: tiny on wrong, top.0.weight_grad{worst['place']}" in found.text
    assert "rounded against wrong : top.0.weight_grad differs" in found.text


def test_a_missing_tensor_and_a_wrong_shape(page):
    report = report_of(Rounded("wrong", faults={"probability": lambda value: value[:-1]}))
    found = page(report)
    (cells,) = found.cells("probability")
    assert cells[0][1:3] == ("fail", "✗")
    assert "expected float32[8, 1], found float32[7, 1]" in cells[0][3]
    assert "expected float32[8, 1], found float32[7, 1]" in found.text


def test_a_missing_backend_is_reported_with_its_remedy(page):
    found = page(report_of(Rounded(), Rounded("away", absent=True)))
    assert "its engine is not installed; to add it: dlrm engine install away" in found.text


@pytest.mark.parametrize("backends", [[], [Rounded("away", absent=True)]])
def test_comparing_nothing_does_not_conform(page, backends):
    found = page(report_of(*backends))
    assert "✗ does not conform" in found.text and "✓" not in found.text
    assert "✗ does not conform" in page(as_dict([])).text


def test_numbers_that_json_lacks(page):
    def spoil(value):
        value = value.copy()
        value.flat[3] = np.nan
        return value

    report = report_of(Rounded(faults={"interaction.output": spoil}))
    bad = report["cases"][0]["backends"][0]["worst"]
    assert (bad["worst"], bad["value"]) == ("inf", "nan")
    (cells,) = page(report).cells("interaction.output")
    assert cells[0][1:3] == ("fail", "✗ ∞") and "value\tnan" in cells[0][3]


def test_bounds_that_mean_nothing_are_flagged(page):
    result = run_case(make_case(toml.load("tiny"), steps=2), [Rounded()])
    assert "where a null result would conform" not in page(as_dict([result])).text
    verdict = result.backends[0].sections[0].tensors[0]
    verdict.worst, verdict.tightness, verdict.null_ratio = 2e-5, 0.5, 0.25
    found = page(as_dict([result]))
    assert "1 tensors where a null result would conform" in found.text
    suspicious = re.search(r"(\d+) suspiciously good tensors", found.text)
    assert suspicious and verdict.tensor in found.text[suspicious.end():]
    doubts = re.search(r"doubtful bounds: (\d+)", found.text)
    assert doubts and int(doubts[1]) == int(suspicious[1]) + 1
    (cells,) = found.cells(verdict.tensor)
    assert cells[0][1:3] == ("r0", "2.0e-5") and cells[-1][1:3] == ("n bad", "0.25") and cells[-2][2] == "0.50"


def test_kinks_are_counted(page):
    report = report_of(Rounded())
    report["cases"][0]["backends"][0]["sections"][0]["kinks"] = {"top.0.preactivation": 1234}
    assert "within reach of a kink, rounded: top.0.preactivation 1,234" in page(report).text


def test_hostile_names_stay_text(page):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&"
    report = report_of(Rounded(), Rounded("away", absent=True))
    ordinary = page(report)
    case = report["cases"][0]
    for backend in case["backends"]:
        for key in ("engine", "reason", "remedy", "summary", "backend"):
            backend[key] += evil
    for key in ("spec", "data", "digest"):
        case[key] += evil
    first_verdict(report).update(tensor=evil, problem=evil, conforms=False)
    case["backends"][0]["status"] = "fails"
    report["machine"] = report["product"] = evil
    found = page(report)
    assert [tag for tag, _ in found.tags if tag in ("script", "img")] == ["script", "script"]
    assert sorted({tag for tag, _ in found.tags}) == sorted({tag for tag, _ in ordinary.tags} | {"ol", "li"})
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert "<script>alert(1)</script>" in found.text and "<script>alert" not in found.source


def test_the_page_loads_nothing(page, wide):
    found = page(wide)
    assert not [tag for tag, _ in found.tags if tag in ("link", "img", "iframe", "object", "embed", "base", "form")]
    links = [attrs[name] for _, attrs in found.tags for name in ("src", "href", "srcset", "action") if name in attrs]
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", found.source)


def test_three_large_cases_stay_small(page, wide):
    report = copy.deepcopy(wide)
    case = report["cases"][0]
    sections = case["backends"][0]["sections"]
    sections += [dict(sections[1], optimizer=name) for name in ("adagrad", "rowwise_adagrad")]
    case["optimizers"] += ["adagrad", "rowwise_adagrad"]
    case["backends"] = [dict(case["backends"][0], backend=f"backend{number}") for number in range(4)]
    report["cases"] = [case] * 3
    assert len(page(report).source) < 2e6


def drawn(found):
    """State of every tensor on every graph, and the names of the nodes that are marked as first at fault."""
    states = [(attrs["data-t"], attrs["class"].split()[1]) for _, attrs in found.tags if "data-t" in attrs]
    marked = sum(tag == "circle" for tag, _ in found.tags)
    return states, marked


@pytest.mark.parametrize("loss", ["bce", "bce_logits"])
@pytest.mark.parametrize("interaction", ["dot", "cat"])
def test_the_graph_has_every_step_once_and_apart(interaction, loss):
    given = toml.load("tiny").model_dump()
    given["interaction"], given["loss"] = {"kind": interaction}, {"kind": loss}
    report = report_of(Rounded(), spec=ModelSpec.model_validate(given), steps=1, optimizers=("rowwise_adagrad",))
    (case,) = report["cases"]
    (flow,) = flows(case, report["histogram_edges"])
    cells = [cell for node in flow.nodes for cell in node.cells]
    assert [cell.tensor for cell in cells if cell.state == "missing"] == []
    assert sorted(cell.tensor for cell in cells) == sorted(case["graph"])
    boxes = [(node.x, node.y, node.x + node.width, node.y + node.height) for node in flow.nodes]
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2)
                if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
    assert all(x0 >= 0 and x1 <= flow.width and y1 <= flow.height for x0, _, x1, y1 in boxes)
    columns = {node.name: node.column for node in flow.nodes}
    forward = [name for name in case["graph"] if not name.endswith(("_grad", "_grad_values", "weight", "bias",
                                                                    "moment", "pooling"))]
    for name in forward:
        for source in set(case["graph"][name]) & set(forward):
            assert columns[without_number(source)] < columns[without_number(name)]


def test_a_conforming_run_has_one_calm_graph(page):
    found = page(report_of(Rounded(), Rounded("again"), Rounded("ahead", trains=False), steps=1,
                           optimizers=("adagrad",)))
    states, marked = drawn(found)
    assert len(states) == len(dict(states)) > 60 and marked == 0
    assert not {"own", "inherited", "missing"} & set(dict(states).values())
    assert not [attrs for tag, attrs in found.tags if tag == "path" and "hot" in attrs["class"]]


def test_the_path_of_an_error_is_on_the_graph(page):
    """A wrong lookup goes on through a real engine: all behind it is wrong, and of that only the lookup by itself."""
    pytest.importorskip("torch")
    report = report_of(Rounded(), load_backend("faulty:OFFSET"), batch_size=32, steps=1, optimizers=("sgd",))
    report["cases"][0]["backends"][1]["command"] = "dlrm conform tiny --only tables.1.pooled"
    found = page(report)
    states, marked = drawn(found)
    state = dict(states)
    assert marked == 1 and len(states) == len(state)
    assert "First at fault: tables.1.pooled[" in found.text and "made by EmbeddingBag tables.1" in found.text
    assert "dlrm conform tiny --only tables.1.pooled" in found.text
    # The backward pass of that lookup reads the shifted bags too.
    assert {name for name, of in state.items() if of == "own"} == {"tables.1.pooled", "tables.1.weight_grad_values"}
    assert {state[name] for name in ("interaction.output", "loss", "top.0.weight_grad", "bottom.0.bias",
                                     "tables.0.weight")} == {"inherited"}
    before = {"bottom.0.preactivation", "bottom.1.activation", "tables.0.pooled", "tables.2.pooled"}
    assert not {state[name] for name in before} & {"own", "inherited"}
    graph, hot = report["cases"][0]["graph"], [attrs for tag, attrs in found.tags if "hot" in attrs.get("class", "")]
    assert hot and all(any(state[source] in ("own", "inherited") for source in graph[name] if source in graph)
                       for name, of in state.items() if of == "inherited" and name != "tables.1.weight")


def test_distributions_count_every_element():
    (case,) = report_of(Rounded(), Rounded("ahead", trains=False), steps=1, optimizers=("sgd",))["cases"]
    spread = distributions(case)
    for column, backend in enumerate(case["backends"]):
        assert backend["elements"] == sum(count for _, row in spread.rows for count, _ in row[column])
    assert max(height for _, row in spread.rows for columns in row for _, height in columns) == 1


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        write_html(as_dict([]), tmp_path / "file" / "report.html")
