"""The command line: instant help, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import subquad
from subquad import cli
from subquad.core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "rich", "safetensors", "tokenizers"}


def imported_by(*args: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported when the command has run."""
    code = (
        "import contextlib, io, json, sys\n"
        "from subquad.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    assert main({list(args)!r}) == 0\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(json.loads(out))


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("--help") & HEAVY == set()


@pytest.mark.parametrize("command", cli.commands())
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: subquad {command} ")
    assert text.splitlines()[2].strip()
    assert "Options:" in text


def test_no_command_module_imports_anything_heavy() -> None:
    code = "import importlib, json, sys\nfrom subquad.cli import commands\n"
    code += "for c in commands(): importlib.import_module('subquad.cli.' + c.replace('-', '_'))\n"
    code += "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))\n"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(json.loads(out)) & HEAVY == set()


def test_help_lists_every_command_with_the_first_line_of_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    assert {"generate", "ls", "new"} <= set(cli.commands())
    for name, source in cli.commands().items():
        line = source.read_text(encoding="utf-8").splitlines()[0]
        assert line.startswith('"""')
        assert line.endswith('."""'), f"{source}: the first line is the help in `subquad --help`: one sentence"
        assert name + "".join(line.strip('"').split()) in text
    assert cli.main([]) == 0
    assert "".join(capsys.readouterr().out.split()) == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"subquad {subquad.__version__}\n"


def test_installed_script_and_module_run_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("subquad")
    commands = [[sys.executable, "-m", "subquad.cli"], *([[str(script)]] if script.exists() else [])]
    for command in commands:
        done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: unknown command 'nonsense'")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat", "x"], "unknown command 'generat'; did you mean 'generate'?"),
        (["zzzz"], "unknown command 'zzzz'; known: "),
        (["--versoin"], "No such option: --versoin"),
        (["ls", "--jsn"], "No such option: --jsn"),
        (["ls", "mixer"], "unknown family 'mixer'; did you mean 'mixers'?"),
        (["generate"], "Missing argument"),
        (["generate", "m", "--top-k", "many", "hi"], "Invalid value for '--top-k'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`subquad ls` replaced by a command that raises what it is told to."""
    from subquad.cli import ls

    told = SimpleNamespace(error=None)

    def run() -> None:
        raise told.error

    monkeypatch.setattr(ls, "run", run)
    return told


def test_an_error_of_ours_hides_its_traceback_unless_asked(
    broken: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.error = DataError("expected text,\n  got none")
    assert cli.main(["ls"]) == 2
    assert capsys.readouterr().err == "error: expected text, got none\n"
    for args, variable in ((["--traceback", "ls"], None), (["ls"], "1")):
        if variable:
            monkeypatch.setenv("SUBQUAD_TRACEBACK", variable)
        assert cli.main(args) == 2
        text = capsys.readouterr().err
        assert text.startswith("Traceback (most recent call last)")
        assert text.endswith("\nerror: expected text, got none\n")


def test_a_bug_is_not_dressed_as_an_error(broken: SimpleNamespace) -> None:
    broken.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["ls"])


def test_interrupting_exits_with_130(broken: SimpleNamespace) -> None:
    broken.error = KeyboardInterrupt()
    assert cli.main(["ls"]) == 130


def test_a_new_file_is_a_new_command(tmp_path: Path) -> None:
    """In a copy of the package: nothing else is edited."""
    package = tmp_path / "subquad"
    for folder in ("cli", "core"):
        (package / folder).mkdir(parents=True)
        for source in (ROOT / "src/subquad" / folder).glob("*.py"):
            (package / folder / source.name).write_bytes(source.read_bytes())
    (package / "__init__.py").write_bytes((ROOT / "src/subquad/__init__.py").read_bytes())
    (package / "cli/say_it.py").write_text(
        '"""Say it."""\n\ndef run(what: str, times: int = 1) -> None:\n    print(what * times)\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "subquad.cli", "say-it", "ho", "--times", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (0, "hohoho\n"), done.stderr


def test_ls_prints_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    from subquad.core.registry import methods

    assert cli.main(["ls", "mixers", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"mixers"}
    assert {slug: card["gives"] for slug, card in printed["mixers"].items()} == {
        slug: card.gives for slug, card in methods("mixers").items()
    }
    assert cli.main(["ls", "mixers"]) == 0
    text = capsys.readouterr().out
    assert all(f"mixers/{slug}" in text for slug in methods("mixers"))
