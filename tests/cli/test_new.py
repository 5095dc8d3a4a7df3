"""`subquad new` lays out rooms that stand at once: lint, contract and bench pass before the author writes a line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from subquad import cli
from subquad.cli.new import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """What `subquad new` takes for a checkout."""
    (tmp_path / "src/subquad").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def test_the_four_rooms_of_any_family(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(bare)
    args = ["new", "decode", "look_ahead", "--title", "Break the Sequential Dependency", "--arxiv", "2402.02057"]
    assert cli.main([*args, "--root", str(bare)]) == 0
    rooms = {
        "src/subquad/decode/look_ahead.py",
        "tests/decode/test_look_ahead.py",
        "src/subquad/bench/decode/look_ahead.py",
        "docs/methods/decode/look_ahead.md",
    }
    assert files(bare) - before == rooms | {"src/subquad/decode/__init__.py", "src/subquad/bench/decode/__init__.py"}
    assert set(capsys.readouterr().out.split()) == rooms
    for room in rooms:
        text = (bare / room).read_text()
        assert "$" not in text
        assert "look_ahead" in text
    assert 'arxiv="2402.02057"' in (bare / "src/subquad/decode/look_ahead.py").read_text()


def test_nothing_is_overwritten(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = bare / "docs/methods/mixers/mine.md"
    page.parent.mkdir(parents=True)
    page.write_text("# Mine\n")
    before = files(bare)
    assert cli.main(["new", "mixers", "mine", "--root", str(bare)]) == 2
    assert capsys.readouterr().err.startswith(f"error: mixers/mine: expected nothing there, got {page}")
    assert files(bare) == before
    (bare / "src/subquad/mixers/folder").mkdir(parents=True)
    assert cli.main(["new", "mixers", "folder", "--root", str(bare)]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["mixer", "mine"], "unknown family 'mixer'; did you mean 'mixers'?"),
        (["mixers", "Mine"], "slug: expected lower-case words"),
        (["mixers", "../mine"], "slug: expected"),
        (["mixers", "my-mixer"], "slug: expected"),
        (["mixers", "lambda"], "slug: expected"),
        (["mixers", "contract"], "slug: expected"),
        (["mixers", "mine", "--arxiv", "arxiv.org/abs/2401.00001"], "arxiv: expected an id"),
        (["mixers", "mine", "--title", 'a "b"'], "title: expected one line"),
    ],
)
def test_names_that_do_not_serve_are_refused(
    bare: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(bare)
    assert cli.main(["new", *args, "--root", str(bare)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert files(bare) == before


def test_without_a_checkout_there_is_nothing_to_write_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subquad.cli.new.PACKAGE", tmp_path / "lib" / "site-packages" / "subquad")
    assert cli.main(["new", "mixers", "mine"]) == 2
    assert capsys.readouterr().err.startswith("error: expected a source checkout of subquad, got ")
    assert files(tmp_path) == set()


def test_every_template_is_of_a_room() -> None:
    assert {p.parent.name for p in TEMPLATES.rglob("*.txt")} == {"mixers", "method"}
    for kind in ("mixers", "method"):
        assert {p.stem for p in (TEMPLATES / kind).iterdir()} == {"source", "test", "bench", "page"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the package with a fresh mixer and a fresh method in it."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    contract = (f"tests/mixers/{name}.py" for name in ("conftest", "test_contract", "test_contract_pools"))
    for name in ("pyproject.toml", "tests/conftest.py", *contract):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    assert cli.main(["new", "mixers", "my_probe", "--arxiv", "2401.00001", "--root", str(root)]) == 0
    assert cli.main(["new", "decode", "my_draft", "--root", str(root)]) == 0
    return root


def run(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=root, env=environment, capture_output=True, text=True)


def test_a_new_mixer_passes_the_contract_and_a_new_method_fails_until_it_is_written(copy: Path) -> None:
    done = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "my_probe or my_draft", "tests")
    assert done.returncode == 1
    assert "NotImplementedError: decode/my_draft is laid out and not written yet" in done.stdout
    summary = done.stdout.splitlines()[-1]
    # Its guesses, and its guesses under a grammar.
    assert summary.startswith("2 failed, ")
    assert int(summary.split(" passed")[0].split()[-1]) > 15


def test_a_new_mixer_has_a_bench_that_runs(copy: Path) -> None:
    done = run(copy, "-m", "subquad.cli", "bench", "mixers/my_probe", "--smoke")
    assert done.returncode == 0, done.stderr
    assert "continuing from a state equals reading at once" in done.stdout


def test_new_rooms_pass_the_linter(copy: Path) -> None:
    pytest.importorskip("ruff")
    rooms = [str(p) for p in copy.rglob("*my_probe.py")] + [str(p) for p in copy.rglob("*my_draft.py")]
    assert len(rooms) == 6
    for check in (["check"], ["format", "--check"]):
        done = run(copy, "-m", "ruff", *check, "--no-cache", *rooms)
        assert done.returncode == 0, done.stdout
