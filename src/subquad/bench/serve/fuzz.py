"""What a server answers to requests made from its own OpenAPI, and to clients that mean harm.

Ids are ``serve.fuzz``: ``.5xx`` counts answers with which a server blames itself, of schemathesis' and of hostile
clients together, ``.other`` answers that the OpenAPI does not describe; ``.hostile.<name>.seconds``, ``.memory`` and
``.stall`` are how long an attack was borne, what it cost at most, and the longest that another client's
``GET /health`` took meanwhile; ``.keys.spread`` is how much the medians of wrong keys' answers differ.
"""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from subquad.bench.harness import Bench
from subquad.bench.hostile import QUICK, SLOW, Attack, pulse
from subquad.bench.tiny_server import Process, save_tiny, started

CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"
KEY = "sk-the-only-key-that-opens-this-server"
# Of its length with a wrong end, with a wrong beginning, too short, and empty.
WRONG = {"end": KEY[:-1] + "x", "beginning": "x" + KEY[1:], "short": KEY[:3], "long": KEY * 20}
GENERATING = {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"}
OPTIONS = ("--rows", "4", "--max-tokens", "2048")
# Packages that the room runs, and what brings each.
NEEDS = {"schemathesis": '"subquad[fuzz]"'}


def fuzz(url: str, examples: int, seed: int, folder: Path, *phases: str) -> tuple[Counter[tuple[str, int]], list[str]]:
    """Have schemathesis ask what a server's OpenAPI describes, and what it does not.

    Args:
        url: of the server.
        examples: most of each operation and phase.
        seed: of the requests.
        folder: for its report.
        phases: of schemathesis; all of them where none is named.

    Returns:
        How often each operation answered with each status; and what failed, in words.
    """
    report = folder / "report.ndjson"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS]
    command += ["--seed", str(seed), "--max-examples", str(examples), "--continue-on-failure", "--no-color"]
    # Many choices of full rows take longer than its usual 10 seconds.
    command += ["--request-timeout", "60"]
    command += ["--generation-database", "none", "--report", "ndjson", "--report-ndjson-path", str(report)]
    command += ["--phases", ",".join(phases)] if phases else []
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ran.returncode not in (0, 1) or not report.exists():
        raise RuntimeError(f"schemathesis ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-2000:]}")
    statuses, failed = Counter[tuple[str, int]](), list[str]()
    for line in report.read_text(encoding="utf-8").splitlines():
        recorder: dict[str, Any] = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for id, one in recorder.get("interactions", {}).items():
            if one.get("response") is None:
                failed.append(f"{recorder['label']}: no answer")
                continue
            status = one["response"]["status_code"]
            statuses[recorder["label"], status] += 1
            wrong = [check["name"] for check in recorder["checks"].get(id, ()) if check["status"] == "failure"]
            if wrong:
                text = base64.b64decode((one["response"].get("content") or {}).get("$base64", ""))[:200]
                failed.append(f"{recorder['label']}: {status}, {', '.join(wrong)}: {text!r}")
    return statuses, failed


def attack(server: Process, act: Attack) -> tuple[str, dict[str, float]]:
    """The answer to one attack, and what it cost."""
    server.forget_peak()
    before = server.memory
    with pulse(server.url) as innocent:
        began = time.monotonic()
        answer = act((server.host, server.port))
        seconds = time.monotonic() - began
    cost = {"seconds": seconds, "memory": float(max(server.peak - before, 0)), "stall": innocent.worst}
    return answer, cost


def time_keys(url: str, reps: int) -> dict[str, list[float]]:
    """Seconds of each refusal of each wrong key, in turns."""
    times: dict[str, list[float]] = {name: [] for name in WRONG}
    with httpx.Client(base_url=url) as client:
        for rep in range(reps):
            # Alternating who goes first keeps a drifting clock from favouring one.
            for name in times if rep % 2 else reversed(times):
                began = time.perf_counter()
                answer = client.get("/v1/models", headers={"Authorization": f"Bearer {WRONG[name]}"})
                times[name].append(time.perf_counter() - began)
                assert answer.status_code == 401
    return times


def run(bench: Bench) -> None:
    """schemathesis, hostile clients and wrong keys, on servers of a tiny model."""
    bench.name = "serve.fuzz"
    examples, reps, phases = bench.size((50, 2000, ()), smoke=(5, 20, ("fuzzing",)))
    attacks = bench.size(QUICK | SLOW, smoke={name: QUICK[name] for name in ("body_100mb", "deep_json", "quotes")})
    blamed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny(folder)
        with started(folder, *OPTIONS) as server:
            statuses, failed = fuzz(server.url, examples, 1, folder, *phases)
            cases = sum(statuses.values())
            bench.say(f"schemathesis: {cases} cases, {len(failed)} failed")
            for what in sorted(set(failed)):
                bench.say(what)
            blamed += sum(n for (_, status), n in statuses.items() if status >= 500)
            silent = {label for label, _ in statuses} - {label for label, status in statuses if status == 200}
            for label in sorted(silent):
                bench.say(f"{label}: nothing that was right was asked")
            zero = torch.zeros(())
            unheard = torch.tensor(float(len(silent & bench.size(GENERATING, smoke=set[str]()))))
            bench.gate("what generates was also asked for what is right", unheard, zero, rtol=0.0)
        costs: dict[str, dict[str, float]] = {}
        with started(folder, *OPTIONS) as server:
            for name, (act, expected) in attacks.items():
                answer, costs[name] = attack(server, act)
                told = ", ".join(f"{what} {x:.3g}" for what, x in costs[name].items())
                bench.say(f"{name}: {answer}, {told}")
                blamed += answer.startswith("5")
                bench.gate(f"{name}: refused", torch.tensor(float(answer not in expected)), zero, rtol=0.0)
        with started(folder, *OPTIONS, "--api-key", KEY) as server:
            time_keys(server.url, reps // 10)
            times = time_keys(server.url, reps)
    shape = {"cases": cases, "attacks": len(attacks), "seed": 1}
    bench.value("5xx", float(blamed), "answers", "lower", shape=shape)
    bench.value("other", float(len(failed)), "answers", "lower", shape=shape)
    units = {"seconds": "s", "memory": "bytes", "stall": "s"}
    for name, cost in costs.items():
        for what, unit in units.items():
            bench.value(f"hostile.{name}.{what}", cost[what], unit, "lower")
    medians = {name: statistics.median(some) * 1e6 for name, some in times.items()}
    quarters = statistics.quantiles([x * 1e6 for some in times.values() for x in some], n=4)
    spread = max(medians.values()) - min(medians.values())
    baseline = "the middle half of all answers' times"
    shape = {"each": reps, **{name: round(x, 1) for name, x in medians.items()}}
    bench.value(
        "keys.spread", spread, "us", "lower", baseline=baseline, baseline_value=quarters[2] - quarters[0], shape=shape
    )
