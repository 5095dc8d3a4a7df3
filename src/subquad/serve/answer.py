"""From a request's fields to the engine's requests, and from pieces to choices; the same for chats and plain texts."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from subquad.engine.detokenize import Detokenizer
from subquad.engine.grammar import Grammar
from subquad.engine.request import Limits, Piece, Request
from subquad.engine.sampler import SamplingConfig
from subquad.serve.errors import ApiError
from subquad.serve.schemas import MOST_CHOICES, Generate
from subquad.serve.served import Served
from subquad.serve.tools import Call, ToolText

# Of the endpoints that stream, for the OpenAPI page.
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
FINISH = {"end": "stop", "stop": "stop", "length": "length"}


def sampling(body: Generate, seed: int) -> SamplingConfig:
    """How to choose, by OpenAI's meaning: the temperature is 1 where none is asked for."""
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingConfig(
        # Colder than this is greedy.
        temperature=temperature if temperature >= 1e-6 else 0.0,
        # None of the mass is the likeliest token.
        top_p=1.0 if body.top_p is None else max(body.top_p, 1e-9),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): float(bias) for token, bias in (body.logit_bias or {}).items()},
        seed=seed % 2**63,
    )


def make_requests(
    served: Served,
    body: Generate,
    prompts: Sequence[Sequence[int]],
    most: int | None,
    grammar: Grammar | None = None,
    scores: int | None = None,
) -> list[Request]:
    """The requests of ``n`` choices of each prompt, of seeds that count up.

    Only where there are stop strings does the engine make the text: else a `Reader` does, for many tokens at once.

    Args:
        served: the model.
        body: the fields.
        prompts: token ids.
        most: tokens to write; None is all that there is room for.
        grammar: what holds them to a form.
        scores: log-probabilities of the likeliest tokens, so many; None gives not even the chosen one's.

    Raises:
        ApiError: no room, or too many.
    """
    if len(prompts) * (body.n or 1) > MOST_CHOICES:
        text = f"n: expected at most {MOST_CHOICES} choices together, got {len(prompts)} times {body.n}; ask for fewer"
        raise ApiError(400, text, "n")
    capacity, seed = served.worker.engine.capacity, body.seed
    if seed is None:
        seed = secrets.randbelow(2**62)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    requests: list[Request] = []
    for prompt in prompts:
        room = capacity - len(prompt) + 1
        if room < 1 or (most or 1) > room:
            raise ApiError(
                400,
                f"expected at most {capacity} tokens together, got {len(prompt)} of the prompt and {most or 1} to "
                "write; shorten it",
                param="max_tokens" if room >= 1 else "prompt",
                code="context_length_exceeded",
            )
        limits = Limits(max_new_tokens=most or room, end_tokens=served.ends, stop=stop)
        for _ in range(body.n or 1):
            config = sampling(body, seed + len(requests))
            requests.append(Request(prompt, limits, config, served.decoder if stop else None, grammar, scores))
    return requests


class Delta(NamedTuple):
    """What came of one choice: text, calls of tools, the tokens, and why it ended."""

    text: str
    calls: list[Call]
    pieces: list[Piece]
    finish: str | None


class Reader:
    """Turns the pieces of one choice into deltas.

    Args:
        served: the model.
        request: of the choice.
        tools: names that may be called.
    """

    def __init__(self, served: Served, request: Request, tools: Sequence[str] = ()) -> None:
        self._ends = set(served.ends)
        self._text = Detokenizer(served.decoder, request.prompt) if request.tokenizer is None else None
        self._tools = ToolText(tools) if tools else None

    def take(self, pieces: Sequence[Piece]) -> Delta:
        """What came.

        Raises:
            ApiError: the model's numbers broke down, or nothing may be written.
        """
        last = pieces[-1].finish
        if last == "diverged":
            raise ApiError(500, "the model's logits are not finite; serve it in float32", code="diverged")
        if last == "exhausted":
            raise ApiError(400, "expected a form that something can follow; change it, or logit_bias", code="exhausted")
        shown = [piece for piece in pieces if piece.token not in self._ends]
        if self._text is None:
            text = "".join(piece.text for piece in pieces)
        else:
            text = self._text.push(*(piece.token for piece in shown))
            text += self._text.finish() if last is not None else ""
        calls: list[Call] = []
        finish = None if last is None else FINISH[last]
        if self._tools is not None:
            text, calls = self._tools.push(text)
            if last is not None:
                rest, more = self._tools.finish()
                text, calls = text + rest, calls + more
                finish = "tool_calls" if self._tools.called and last != "length" else finish
        return Delta(text, calls, shown, finish)


def finite(logprob: float) -> float:
    """A log-probability as OpenAI writes it: JSON knows no infinity."""
    return max(logprob, -9999.0)
