import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from subquad.evals import report
from subquad.evals.figures import STANDINS, Chart, draw, short, svg
from subquad.evals.needle import NeedleResult
from subquad.evals.perplexity import Perplexity
from subquad.evals.report import Answers, Dialogue, HeatMap, Report, Said, Section, Table, render, write_report

CONTEXTS = [1024, 8192, 32768]


def measured(nll):
    return Perplexity(64, 3, torch.full((3, 63), nll, dtype=torch.float64), torch.full((3,), 200), 1.0)


@pytest.fixture
def page():
    needles = NeedleResult("generation", (300,) * 4, (0.1, 0.1, 0.9, 0.9), torch.tensor([True, True, True, False]))
    sections = [
        Section("Training", [report.loss_chart("Align", {"loss": [(0, 1.0), (1e6, 0.25)]}, y_label="error")]),
        Section("Layers", [report.alignment_chart({"before": {3: 0.5, 7: 0.25}, "after": {3: 0.2, 7: 0.1}})]),
        Section("Quality", [report.position_chart({"teacher": measured(2.0), "student": measured(2.5)})]),
        Section("Needles", [report.needle_map("teacher", needles)], "Hay & <needles>."),
        Section("Cost", [report.memory_chart({"teacher": {c: c * 2**20 for c in CONTEXTS}})]),
        Section("Said", [Answers("What <is> it?", {"teacher": "a & b\nc"})]),
        Section("Figures", [Table("T", ["model", "n", "x"], [["teacher", 12345, 1.23456], ["none", None, 2.0]])]),
    ]
    headline = [("perplexity", "1.04 x", "the teacher's")]
    return Report(
        "A <title>", "What was done.", "subquad eval a && b", headline, sections, {"a": {"b": [1, 2]}, "c": 0.5}
    )


class Structure(HTMLParser):
    """Fails on tags that don't nest, and keeps ids and text."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.words, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_one_valid_file(page, tmp_path):
    write_report(page, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    structure = Structure()
    structure.feed(html)
    assert structure.open == []
    assert len(set(structure.ids)) == len(structure.ids)
    # Nothing is fetched, and everything referred to is there.
    assert all(link.startswith("#") and link[1:] in structure.ids for link in structure.links)
    assert all(name in structure.ids for name in re.findall(r"url\(#([^)]+)\)", html))
    assert "<script" not in html and "@import" not in html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    text = " ".join(structure.words)
    for words in (
        "A <title>",
        "Hay & <needles>.",
        "What <is> it?",
        "a & b\nc",
        "subquad eval a && b",
        "12,345",
        "1.235",
    ):
        assert words in text
    assert "a.b" in text and "1, 2" in text
    images = [attrs for tag, attrs in structure.tags if tag == "svg"]
    assert len(images) == 4
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 60 for attrs in images)


def test_what_was_not_measured_does_not_appear():
    html = render(Report("T", "S", "c"))
    assert html.count("<h2>") == 1
    assert "<svg" not in html and "Settings" not in html and "headline>" not in html


def test_colours_come_from_the_page(page):
    html = render(page)
    assert not any(standin in html for standin in STANDINS)
    style = html[html.index("<style>") : html.index("</style>")]
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html)) - {"--share"}
    for scheme in re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL):
        assert used <= set(re.findall(r"(--[a-z0-9-]+):", scheme))


def test_charts_carry_the_values_they_are_given():
    chart = report.position_chart({"teacher": measured(2.0), "student": measured(2.5)})
    for name, nll in (("teacher", 2.0), ("student", 2.5)):
        assert [y for _, y in chart.series[name]] == pytest.approx([math.exp(nll)] * 4)
    assert [name for _, name in chart.ticks] == ["4", "8", "16", "32"]
    lines = draw(chart).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[y for _, y in p] for p in chart.series.values()]
    memory = report.memory_chart({"m": {1024: 2**20, 2048: 3 * 2**20}})
    assert list(memory.series["m"]) == [(1024.0, 1.0), (2048.0, 3.0)]
    assert [name for _, name in memory.ticks] == ["1k", "2k"]
    bars = draw(report.alignment_chart({"before": {3: 0.5, 7: 0.25}, "after": {3: 0.2, 7: 0.1}})).axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.5, 0.25, 0.2, 0.1]
    assert len({round(bar.get_x(), 6) for bar in bars}) == 4


def test_a_chart_is_well_formed_and_says_what_it_shows():
    chart = Chart("Speed", "context", "tokens/s", {"a & b": [(1, 10.0), (2, 30.0), (4, 20.0)]}, log_x=True)
    root = ElementTree.fromstring(svg(chart, "k"))
    assert "a & b: 10 at 1, 20 at 4, lowest 10, highest 30" in root.attrib["aria-label"]
    assert "width" not in root.attrib and "viewBox" in root.attrib
    assert svg(chart, "k") == svg(chart, "k")


def test_answers_stand_side_by_side_with_the_first_difference_marked():
    said = {
        "teacher": Said("one <two> three", "3 tokens"),
        "student": Said("one <tow> three", "3 tokens, loops from token 1", 6),
        "short": Said("one", "", 3),
        "longer": Said("one <two> three & four", "", 15),
        "same": Said("one <two> three"),
    }
    html = render(Report("T", "S", "c", sections=[Section("D", [Dialogue([("Count <b>", said)])])]))
    structure = Structure()
    structure.feed(html)
    assert structure.open == []
    assert "<blockquote>Count &lt;b&gt;</blockquote>" in html
    answers = re.findall(r"<dd>(.*?)</dd>", html)
    assert answers == [
        "one &lt;two&gt; three",
        "one &lt;t<mark>ow&gt;</mark> three",
        "one<mark>(ends)</mark>",
        "one &lt;two&gt; three<mark> &amp;</mark> four",
        "one &lt;two&gt; three",
    ]
    assert "student<span>3 tokens, loops from token 1</span>" in html


def test_heat_map_shows_the_share_of_each_cell():
    needles = NeedleResult("likelihood", (300, 300, 600, 600), (0.5,) * 4, torch.tensor([True, False, True, True]))
    heat = report.needle_map("m", needles)
    assert heat == HeatMap(heat.title, "length", "depth", ["300", "600"], ["50%"], [[0.5], [1.0]], heat.note)
    html = render(Report("T", "S", "c", sections=[Section("N", [heat])]))
    assert '--share:0.500">50%' in html


@pytest.mark.parametrize(
    ("n", "text"), [(900, "900"), (1024, "1k"), (32768, "32k"), (1000, "1k"), (1.5e6, "1.5M"), (0.25, "0.25"), (0, "0")]
)
def test_short_counts(n, text):
    assert short(n) == text
