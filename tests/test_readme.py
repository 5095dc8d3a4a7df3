"""What the README and the pages tell a reader to type exists, and the README's example runs."""

import ast
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from subquad.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Every ``subquad ...`` of the shell blocks, as arguments; a line may go on behind a backslash."""
    for block in blocks(text, "(?:bash|sh|shell|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part.removeprefix("$ "), comments=True)
                if words and words[0] == "subquad":
                    yield words[1:]


def check(words):
    """Parse a command line as the program would, without running it."""
    group = get_command(app)
    name, command, rest = group.resolve_command(None, words)
    command.make_context(name, rest)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_parses(page):
    for words in commands(page.read_text(encoding="utf-8")):
        if words and words[0] not in ("--help", "--version"):
            check(words)


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="--devise"):
        check(["bench", "--devise", "cpu"])


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_import_in_an_example_is_there(page):
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "subquad":
                module = importlib.import_module(node.module)
                for name in node.names:
                    # A module that nobody has imported yet is no attribute of its package.
                    there = hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}") is not None
                    assert there, f"{node.module} has no {name.name}"


def test_readme_is_short_and_names_the_two_commands_that_ci_runs():
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    shell = "\n".join(blocks(README, "bash")).splitlines()
    assert len(README.splitlines()) <= 150
    install, quickstart = "pip install . -c constraints/cpu.txt", "subquad quickstart"
    install_tests, tests = 'pip install ".[test]" -c constraints/cpu.txt', "pytest -n auto"
    assert {f"{install} && {quickstart}", f"{install_tests} && {tests}"} <= set(shell)
    for command in (install, quickstart, install_tests, tests):
        assert re.search(rf"^[^#\n]*{re.escape(command)}( |$)", ci, re.MULTILINE), f".ci/run does not run {command}"


def test_the_readme_example_runs(smollm2_file, tmp_path, monkeypatch):
    (example,) = blocks(README, "python")
    assert len(example.strip().splitlines()) <= 14
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
