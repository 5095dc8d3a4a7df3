"""A server in a process of its own, the same engine without one, and what the benches of serving compare them by."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from subquad.bench.drafting import rounding
from subquad.core.errors import SubquadError
from subquad.engine.draft import parse_drafter
from subquad.engine.engine import Engine
from subquad.engine.request import Limits, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.load import LoadedModel
from subquad.models.stack import Stack
from subquad.serve.served import Room, Served

NAME = "model"
START_SECONDS = 300.0


@dataclass(frozen=True)
class Setup:
    """How a server is set up, so that another process can do the same.

    Attributes:
        make: loads or builds the model; a function of a module, or a partial one.
        room: for its rows.
        draft: what guesses tokens, as in ``subquad serve --draft``.
    """

    make: Callable[[], LoadedModel]
    room: Room
    draft: str

    def served(self) -> Served:
        """The model with its engine; nothing runs yet."""
        loaded = self.make()
        drafter = None if self.draft == "none" else parse_drafter([self.draft], lambda _: loaded.model)
        return Served.build(loaded, NAME, self.room, drafter=drafter)


class ServerProcess:
    """A context in which a server listens at `port`.

    Args:
        setup: of the server.
        log: where it logs, as ``subquad serve`` does on stderr.

    Raises:
        SubquadError: it does not start; the log says why.
    """

    def __init__(self, setup: Setup, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._mine, self._theirs = context.Pipe()
        args = (setup, log, self._theirs, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=args, daemon=True)
        self._log, self.port = log, 0

    def __enter__(self) -> Self:
        """Wait until it is ready."""
        self._process.start()
        # So that its end is seen here.
        self._theirs.close()
        try:
            if not self._mine.poll(START_SECONDS):
                raise EOFError
            self.port = self._mine.recv()
        except EOFError as error:
            self._process.kill()
            log = self._log.read_text() if self._log.exists() else ""
            raise SubquadError(
                f"server: expected it to be ready, got none; its log ends with {log[-2000:]!r}"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self._mine.send("stop")
        self._process.join(30)
        self._process.kill()

    @property
    def resident(self) -> int:
        """Bytes of memory that it holds, as Linux counts them."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self._process.pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0


def _serve(setup: Setup, log: Path, pipe: Connection, threads: int) -> None:
    from subquad.serve.app import create_app
    from subquad.serve.bounds import Bounds
    from subquad.serve.server import JsonLines, make_server
    from subquad.serve.site import Site

    handler = logging.FileHandler(log)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    torch.set_num_threads(threads)
    try:
        served = setup.served()
        site = Site([served], Bounds())
        server = make_server(create_app(site), site, "127.0.0.1", 0)
        served.start()
    except Exception:
        logging.exception("the server does not start")
        raise

    def attend() -> None:
        while not (server.started and served.worker.ready):
            time.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        # It also ends with who asked for it.
        with contextlib.suppress(EOFError):
            pipe.recv()
        server.should_exit = True

    threading.Thread(target=attend, daemon=True).start()
    server.run()


@dataclass(frozen=True)
class Run:
    """What an engine without a server gave.

    Attributes:
        answers: tokens of each request.
        arrivals: how many tokens came at which second.
    """

    answers: list[list[int]]
    arrivals: list[tuple[float, float]]


def answer_alone(engine: Engine, bodies: Sequence[dict[str, Any]], ends: Sequence[int]) -> Run:
    """Answer the requests that clients would send with these fields, all asked at once."""
    numbers: dict[int, int] = {}
    for i, body in enumerate(bodies):
        limits = Limits(body["max_tokens"], end_tokens=ends)
        numbers[engine.submit(Request(body["prompt"], limits, SamplingConfig()))] = i
    answers: list[list[int]] = [[] for _ in bodies]
    arrivals: list[tuple[float, float]] = []
    while engine.busy:
        pieces = engine.step()
        arrivals.append((time.perf_counter(), len(pieces)))
        for piece in pieces:
            answers[numbers[piece.row]].append(piece.token)
    return Run(answers, arrivals)


def steady_rate(arrivals: Sequence[tuple[float, float]]) -> float:
    """Tokens a second while the middle three quarters of all tokens came."""
    arrivals = sorted(arrivals)
    total, given = sum(n for _, n in arrivals), 0.0
    inside: list[tuple[float, float]] = []
    for at, n in arrivals:
        given += n
        if total / 8 <= given <= total * 7 / 8:
            inside.append((at, n))
    if len(inside) < 2 or inside[-1][0] == inside[0][0]:
        return 0.0
    # What came at the first moment was made before it.
    return sum(n for _, n in inside[1:]) / (inside[-1][0] - inside[0][0])


def told(model: Stack, tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], text: str) -> bool:
    """Whether a text is that of greedy `tokens` up to the first near-tie, as `same` has it, for who sees no tokens.

    A near-tie is another token that fits the text where that parts from the tokens'. The same text may be written by
    other tokens, so the last few before are tried as well.
    """
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if decode(list(tokens)) == text:
        return True
    fits = [text.startswith(decode(list(tokens[:n])).rstrip("\N{REPLACEMENT CHARACTER}")) for n in range(len(tokens))]
    parted = fits.index(False) - 1 if False in fits else len(tokens) - 1
    with torch.no_grad():
        hidden_btd = model.hidden(torch.tensor([[*prompt, *tokens[:parted]]], device=model.device))
        logits_tv = model.head(hidden_btd[0, len(prompt) - 1 :]).float()
    special = set(tokenizer.all_special_ids)
    for at in range(max(parted - 3, 0), parted + 1):
        logits_v = logits_tv[at]
        near_v = (logits_v - logits_v[tokens[at]]).abs() < rounding(model, logits_v)
        for token in near_v.nonzero()[:, 0].tolist():
            written = decode([*tokens[:at], token]).rstrip("\N{REPLACEMENT CHARACTER}")
            if token != tokens[at] and (text == written if token in special else text.startswith(written)):
                return True
    return False


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The median, and what 95 of 100 do not exceed."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


def gauge(page: bytes, name: str, **labels: str) -> float:
    """A figure of ``/metrics``; of several the one with these labels."""
    for line in page.decode().splitlines():
        if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rpartition(" ")[2])
    raise SubquadError(f"metrics: expected {name} {labels}, got none; mend the server")
