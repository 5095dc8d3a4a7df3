"""Tables come from result files, and the committed ones are up to date."""

from pathlib import Path

import pytest
import torch

from subquad.bench.results import Result, environment, make_row
from subquad.bench.tables import refresh, terminal_table
from subquad.cli import main
from subquad.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def results(tmp_path):
    rows = [
        make_row("a.b.fwd.t1024", 2.0, "ms", "lower", baseline="SDPA", baseline_value=5.0, limit_share=0.314),
        make_row("a.b.state", 123456, "bytes", "lower"),
    ]
    env = environment(torch.device("cpu"), torch.float32)
    Result("a.b", "subquad bench a/b", env, rows).save(tmp_path / "a.b.cpu.json")
    return tmp_path


def test_table_holds_the_figures(results):
    page = results / "page.md"
    page.write_text("before\n<!-- bench: a.b.cpu.json -->\nold\n<!-- end bench -->\nafter\n")
    assert refresh(page, results, write=True)
    text = page.read_text()
    assert "| `fwd.t1024` | 2 ms | SDPA: 5 ms | 2.50 | 31% |" in text
    assert "| `state` | 123,456 bytes |  |  |  |" in text
    assert "`subquad bench a/b` on" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert not refresh(page, results, write=True)


def test_patterns_choose_rows_and_empty_columns_go(results):
    page = results / "page.md"
    page.write_text("<!-- bench: a.b.cpu.json st* -->\n<!-- end bench -->\n")
    refresh(page, results, write=True)
    assert "| what | value |\n| --- | ---: |\n| `state` | 123,456 bytes |\n" in page.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench: a.b.cpu.json nothing -->\n<!-- end bench -->\n", "correct the pattern"),
        ("<!-- bench: c.json -->\n<!-- end bench -->\n", "no such file"),
        ("<!-- bench: a.b.cpu.json -->\n", "close it"),
    ],
)
def test_a_table_that_cannot_be_made_is_an_error(results, text, message):
    page = results / "page.md"
    page.write_text(text)
    with pytest.raises(ConfigError, match=message):
        refresh(page, results, write=True)


def test_terminal_table_aligns(results):
    from subquad.bench.results import load_result

    _, head, *rows = terminal_table(load_result(results / "a.b.cpu.json")).splitlines()
    assert rows[0].index("SDPA") == head.index("baseline")


def test_command_checks_and_rewrites(results, monkeypatch, capsys):
    monkeypatch.chdir(results)
    (results / "README.md").write_text("<!-- bench: a.b.cpu.json -->\n<!-- end bench -->\n")
    assert main(["bench", "--tables", "--check", "--out", "."]) == 2
    assert "out of date: README.md" in capsys.readouterr().out
    assert main(["bench", "--tables", "--out", "."]) == 0
    assert main(["bench", "--tables", "--check", "--out", "."]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_committed_tables_are_up_to_date(page):
    assert not refresh(page, ROOT / "bench/results", write=False), "run `subquad bench --tables`"
