"""Continue prompts: at once, as they come, or many through few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from subquad.core.errors import ConfigError, DataError
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.masks import Constraint
from subquad.engine.relax import Relaxed
from subquad.engine.request import Generation, Limits, Piece, Request, check_model, check_request, diverged, row_configs
from subquad.engine.sampler import SamplingConfig
from subquad.engine.trace import Look
from subquad.models.stack import Stack

__all__ = ["Generation", "Limits", "Piece", "generate", "generate_many", "stream"]


def generate(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Limits | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    tokenizer: Any = None,
    grammar: Constraint | None = None,
    logprobs: bool = False,
    drafter: Drafter | None = None,
    draft_tokens: int | None = None,
    on_piece: Callable[[Piece], None] | None = None,
    on_look: Callable[[Look], None] | None = None,
    relaxed: Relaxed | None = None,
) -> list[Generation]:
    """Continue every prompt, and return what came, in the prompts' order; see `stream`.

    Args:
        model: the model.
        prompts: token ids, each prompt at least one.
        limits: when to stop.
        sampling: one for every row, or one a row; greedy by default.
        tokenizer: gives the text; without it the text stays empty.
        grammar: what every text must be, such as a `subquad.engine.grammar.Grammar`.
        logprobs: also return the log-probability of each token.
        drafter: guesses tokens, which the model verifies: faster, and the same distribution.
        draft_tokens: guesses a row and round; None chooses by what they bring.
        on_piece: called with every piece as it comes.
        on_look: called with what each look at the device found.
        relaxed: let guesses stand that are merely good; the results are then not `exact`.
    """
    results = [Generation(exact=relaxed is None or relaxed.exact) for _ in prompts]
    pieces = stream(
        model,
        prompts,
        limits=limits,
        sampling=sampling,
        tokenizer=tokenizer,
        grammar=grammar,
        logprobs=logprobs,
        drafter=drafter,
        draft_tokens=draft_tokens,
        on_look=on_look,
        relaxed=relaxed,
    )
    for piece in pieces:
        result = results[piece.row]
        result.text += piece.text
        result.finish = piece.finish or ""
        if piece.token >= 0:
            result.tokens.append(piece.token)
        if logprobs and piece.token >= 0:
            result.logprobs.append(piece.logprob)
        if on_piece is not None:
            on_piece(piece)
    return results


def stream(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Limits | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    tokenizer: Any = None,
    grammar: Constraint | None = None,
    logprobs: bool = False,
    drafter: Drafter | None = None,
    draft_tokens: int | None = None,
    on_look: Callable[[Look], None] | None = None,
    relaxed: Relaxed | None = None,
) -> Iterator[Piece]:
    """The pieces of every row as they come.

    A row gets what it would get alone: its padding is read by nobody, its noise depends on its own seed only, and
    finished rows keep their place (commit n = 0) until half of the batch has finished and leaves. One configuration
    for several rows means seeds ``seed``, ``seed + 1``, ... The state is allocated once.

    Raises:
        DataError: no prompt, an empty one, or a token that is not in the vocabulary.
        ConfigError: a limit that can't be kept, among them the model's context; relaxed guesses of sampled rows.
        DivergenceError: logits that are not finite.
        UnsupportedError: a layer that looks ahead or can't be read in pieces.
    """
    requests = _requests(model, prompts, limits, sampling, tokenizer, grammar)
    engine = Engine(
        model,
        rows=len(requests),
        capacity=max(request.tokens for request in requests),
        drafter=drafter,
        draft_tokens=draft_tokens,
        chunk=requests[0].limits.chunk,
        rounds=1,
        logprobs=logprobs,
        on_look=on_look,
        relaxed=relaxed,
    )
    for request in requests:
        engine.submit(request)
    counts = [0] * len(requests)
    while engine.busy:
        for piece in engine.step():
            if piece.finish == "diverged":
                raise diverged(piece.row, counts[piece.row])
            counts[piece.row] += 1
            yield piece


def generate_many(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    limits: Limits | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    rounds: int | None = None,
    drafter: Drafter | None = None,
    grammar: Constraint | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Continue many prompts with `rows` of them side by side, and give each, with its index, when it is done.

    For throughput: a row that ends makes room for the next prompt, which is looked for every few rounds, and between
    two looks nothing waits for the device; on a GPU a round is one CUDA graph. A prompt gets what `stream` gives it:
    ``tokens`` and ``finish``, without text. Prompts begin in their order; those of like length cost least.

    Args:
        model: the model.
        prompts: token ids, each prompt at least one.
        rows: most prompts at a time; they bound the memory.
        limits: when to stop; without stop strings, since there is no text.
        sampling: as in `stream`.
        rounds: between two looks; see `Engine`.
        drafter, grammar: as in `generate`.

    Raises:
        ConfigError, DataError, DivergenceError, UnsupportedError: as in `stream`.
    """
    requests = _requests(model, prompts, limits, sampling, None, grammar)
    if rows < 1:
        raise ConfigError(f"rows: expected at least 1, got {rows}; give more")
    engine = Engine(
        model,
        rows=min(rows, len(requests)),
        capacity=max(request.tokens for request in requests),
        drafter=drafter,
        chunk=requests[0].limits.chunk,
        rounds=16 if rounds is None and model.device.type == "cuda" else rounds,
    )
    for request in requests:
        engine.submit(request)
    results: dict[int, Generation] = {}
    while engine.busy:
        for piece in engine.step():
            result = results.setdefault(piece.row, Generation())
            if piece.finish == "diverged":
                raise diverged(piece.row, len(result.tokens))
            if piece.token >= 0:
                result.tokens.append(piece.token)
            if piece.finish is not None:
                result.finish = piece.finish
                yield piece.row, results.pop(piece.row)


def _requests(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    limits: Limits | None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None,
    tokenizer: Any,
    grammar: Constraint | None,
) -> list[Request]:
    """One request a prompt, all of them checked before any work."""
    check_model(model)
    if not prompts:
        raise DataError("prompts: expected at least one, got none; give a prompt")
    configs = row_configs(sampling, len(prompts))
    requests = [
        Request(prompt, limits or Limits(), config, tokenizer, grammar)
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    for i, request in enumerate(requests):
        check_request(model, request, f"prompt {i}")
    return requests
