"""The fuzzing room: a short run of each of its parts, and what schemathesis' report is read for."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from subquad.bench.hostile import QUICK
from subquad.bench.serve.fuzz import OPTIONS, WRONG, attack, fuzz, time_keys
from subquad.bench.tiny_server import Process, save_tiny, started

ATTACKS = ["body_100mb", "chunk_of_exabytes", "deep_json", "invalid_utf8", "escaped_quotes", "schema_all_of"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    with started(folder, *OPTIONS) as server:
        yield server


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs schemathesis: the extra fuzz")
def test_schemathesis_finds_nothing(server: Process, tmp_path: Path) -> None:
    statuses, failed = fuzz(server.url, 3, 1, tmp_path, "fuzzing")
    assert failed == [] and max(status for _, status in statuses) < 500
    asked = Counter(label for label, _ in statuses.elements())
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"} <= set(asked)


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_clients_are_refused(server: Process, name: str) -> None:
    act, expected = QUICK[name]
    answer, cost = attack(server, act)
    assert answer in expected
    assert cost["seconds"] < 5 and cost["stall"] < 5 and cost["memory"] < 2**28


def test_wrong_keys_are_timed(server: Process) -> None:
    with pytest.raises(AssertionError):  # a server without keys refuses nobody
        time_keys(server.url, 1)
    assert len(WRONG) == 4
