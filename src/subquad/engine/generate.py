"""Generation for a batch of ragged prompts: read, sample, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError, DataError, DivergenceError, UnsupportedError
from subquad.core.registry import methods
from subquad.engine.detokenize import Detokenizer
from subquad.engine.sampler import History, Sampler, SamplingConfig
from subquad.models.stack import Stack, StackState


@dataclass(frozen=True)
class Piece:
    """What one step gave one row.

    Attributes:
        row: index of the prompt.
        token: the token chosen; an end token is given too.
        text: what may be shown now: no half characters, and nothing of a stop string or an end token.
        logprob: log-probability of the token under the model itself, before any processor; NaN unless asked for.
        finish: why the row ends with this piece: ``end`` (an end token), ``stop`` (a stop string), ``length``; or None.
    """

    row: int
    token: int
    text: str
    logprob: float
    finish: str | None


@dataclass
class Generation:
    """All that was generated for one prompt; the attributes are those of its pieces."""

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[float] = field(default_factory=list[float])
    finish: str = ""


@dataclass(frozen=True)
class Limits:
    """When to stop, and how much to read at once.

    Attributes:
        max_new_tokens: most tokens of a row.
        end_tokens: token ids that end a row; None takes the model's own.
        stop: strings that end a row; need a tokenizer.
        allow_long: go beyond the context the model was trained for.
        chunk: columns of the prompts read in one forward pass, which bounds the memory of long prompts.
    """

    max_new_tokens: int = 128
    end_tokens: Sequence[int] | None = None
    stop: Sequence[str] = ()
    allow_long: bool = False
    chunk: int = 1024


def generate(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Limits | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    tokenizer: Any = None,
    logprobs: bool = False,
    on_piece: Callable[[Piece], None] | None = None,
) -> list[Generation]:
    """Continue every prompt, and return what came, in the prompts' order; see `stream`.

    Args:
        model: the model.
        prompts: token ids, each prompt at least one.
        limits: when to stop.
        sampling: one for every row, or one a row; greedy by default.
        tokenizer: gives the text; without it the text stays empty.
        logprobs: also return the log-probability of each token.
        on_piece: called with every piece as it comes.
    """
    results = [Generation() for _ in prompts]
    for piece in stream(model, prompts, limits=limits, sampling=sampling, tokenizer=tokenizer, logprobs=logprobs):
        result = results[piece.row]
        result.tokens.append(piece.token)
        result.text += piece.text
        result.finish = piece.finish or ""
        if logprobs:
            result.logprobs.append(piece.logprob)
        if on_piece is not None:
            on_piece(piece)
    return results


@torch.no_grad()
def stream(
    model: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Limits | None = None,
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    tokenizer: Any = None,
    logprobs: bool = False,
) -> Iterator[Piece]:
    """The pieces of every row as they come, one a row and step.

    A row gets what it would get alone: its padding is read by nobody, its noise depends on its own seed only, and
    finished rows keep their place (commit n = 0) until half of the batch has finished and leaves. One configuration
    for several rows means seeds ``seed``, ``seed + 1``, ... The state is allocated once.

    Raises:
        DataError: no prompt, an empty one, or a token that is not in the vocabulary.
        ConfigError: a limit that can't be kept, among them the model's context.
        DivergenceError: logits that are not finite.
        UnsupportedError: a layer that looks ahead or can't be read in pieces.
    """
    limits = limits or Limits()
    capacity = check_request(model, prompts, limits, tokenizer)
    configs = row_configs(sampling, len(prompts))
    ends = set(model.config.eos_tokens if limits.end_tokens is None else limits.end_tokens)
    texts = [Detokenizer(tokenizer, p, limits.stop) for p in prompts] if tokenizer is not None else []
    lengths = [0] * len(prompts)

    rows = list(range(len(prompts)))  # the prompt that each row of the batch continues
    alive = [True] * len(prompts)  # whether it still does
    alive_b = torch.ones(len(prompts), dtype=torch.int64, device=model.device)
    sampler = Sampler(configs, model.device)
    history = History.start(prompts, model.config.vocab_size if any(c.penalises for c in configs) else 0, model.device)
    pool = model.init_state(len(prompts), capacity)
    hidden_bd = prefill(model, prompts, pool, limits.chunk)
    while True:
        logits_bv = model.head(hidden_bd)
        drawn_b = sampler.sample(logits_bv, history)
        tokens_b = drawn_b.clamp(min=0)
        history.observe_(tokens_b, alive_b)
        chosen = drawn_b.tolist()  # the one wait for the device
        scores = _logprobs(logits_bv, tokens_b).tolist() if logprobs else [float("nan")] * len(chosen)
        changed = False
        for at, (row, token, score) in enumerate(zip(rows, chosen, scores, strict=True)):
            if not alive[at]:
                continue
            if token < 0:
                raise diverged(row, lengths[row])
            lengths[row] += 1
            text = texts[row].push(token) if texts and token not in ends else ""
            finish = None
            if token in ends:
                finish = "end"
            elif texts and texts[row].stopped:
                finish = "stop"
            elif lengths[row] == limits.max_new_tokens:
                finish = "length"
            if finish is not None:
                alive[at], changed = False, True
                text += texts[row].finish() if texts else ""
            yield Piece(row, token, text, score, finish)
        if not any(alive):
            return
        if changed:
            if 2 * sum(alive) <= len(alive):
                keep = [at for at, lives in enumerate(alive) if lives]
                keep_b = torch.tensor(keep, device=model.device)
                rows, alive = [rows[at] for at in keep], [True] * len(keep)
                pool, history, tokens_b = pool.select(keep_b), history.select(keep_b), tokens_b[keep_b]
                sampler = Sampler([configs[row] for row in rows], model.device)
            alive_b = torch.tensor(alive, dtype=torch.int64, device=model.device)
        hidden_btd, update = model.read(tokens_b[:, None], pool)
        update.commit_(pool, None, alive_b)
        hidden_bd = hidden_btd[:, 0]


@torch.no_grad()
def prefill(model: Stack, prompts: Sequence[Sequence[int]], pool: StackState, chunk: int) -> Tensor:
    """Read the prompts into the empty `pool` in chunks of columns; return the stream ``[b, d]`` at each last token.

    A chunk is read by the rows that still have tokens in it, so that one long prompt costs the others nothing.
    """
    device = model.device
    last_bd: Tensor | None = None
    for start in range(0, max(map(len, prompts)), chunk):
        blocks = {row: list(p[start : start + chunk]) for row, p in enumerate(prompts) if len(p) > start}
        lengths, width = [len(block) for block in blocks.values()], max(map(len, blocks.values()))
        tokens_bt = torch.tensor([block + [0] * (width - len(block)) for block in blocks.values()], device=device)
        lengths_b = torch.tensor(lengths, device=device)
        everyone = len(blocks) == len(prompts)
        rows_b = torch.tensor(list(blocks), device=device)
        state = pool if everyone else pool.select(rows_b)
        if start == 0:  # nothing to look at costs less than an empty buffer
            state = model.init_state(len(prompts))
        hidden_btd, update = model.read(tokens_bt, state, lengths_b if min(lengths) < width else None)
        update.commit_(pool, None if everyone else rows_b, lengths_b)
        # A row's last chunk is its last write here.
        ends_bd = hidden_btd[torch.arange(len(blocks), device=device), lengths_b - 1]
        last_bd = ends_bd if last_bd is None else last_bd.index_copy(0, rows_b, ends_bd)
    assert last_bd is not None
    return last_bd


def diverged(row: int, tokens: int) -> DivergenceError:
    """What is raised for a prompt whose logits are not finite."""
    return DivergenceError(
        f"prompt {row}: expected finite logits, got NaN or infinity after {tokens} new tokens; "
        "try float32, or check the weights"
    )


def _logprobs(logits_bv: Tensor, tokens_b: Tensor) -> Tensor:
    logits_bv = logits_bv.float()
    return logits_bv.gather(1, tokens_b[:, None])[:, 0] - logits_bv.logsumexp(-1)


def row_configs(sampling: SamplingConfig | Sequence[SamplingConfig] | None, batch: int) -> list[SamplingConfig]:
    """One configuration for each of `batch` rows."""
    if sampling is None or isinstance(sampling, SamplingConfig):
        one = sampling or SamplingConfig()
        return [replace(one, seed=one.seed + row) for row in range(batch)]
    if len(sampling) != batch:
        raise ConfigError(f"sampling: expected one configuration for {batch} prompts, or {batch}, got {len(sampling)}")
    return list(sampling)


def check_request(model: Stack, prompts: Sequence[Sequence[int]], limits: Limits, tokenizer: Any) -> int:
    """Refuse what can't be generated; return the most tokens that a row commits."""
    cards = methods("mixers")
    for i, layer in enumerate(model.config.layers):
        card = cards[layer["mixer"]]
        if not (card.causal and card.splittable):
            raise UnsupportedError(
                f"layer {i}: expected a causal mixer that can be read in pieces, got {layer['mixer']}; "
                "score whole texts with it instead"
            )
    if not prompts:
        raise DataError("prompts: expected at least one, got none; give a prompt")
    if limits.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {limits.max_new_tokens}; ask for a token")
    if limits.chunk < 1:
        raise ConfigError(f"chunk: expected at least 1, got {limits.chunk}; 1024 is usual")
    if limits.stop and tokenizer is None:
        raise ConfigError("stop: expected a tokenizer to find strings with, got none; pass one, or use end_tokens")
    vocab_size, context = model.config.vocab_size, model.config.max_positions
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {row}: expected at least one token, got none; begin with the start token")
        wrong = next((t for t in prompt if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise DataError(
                f"prompt {row}: expected token ids from 0 to {vocab_size - 1}, got {wrong}; use the model's tokenizer"
            )
        # The last token is never read again.
        if len(prompt) + limits.max_new_tokens - 1 > context and not limits.allow_long:
            room = context - len(prompt) + 1
            remedy = f"ask for at most {room} new tokens" if room > 0 else f"drop {1 - room} tokens"
            raise ConfigError(
                f"prompt {row}: expected at most {context} tokens of context, got {len(prompt)} and "
                f"{limits.max_new_tokens} new ones; {remedy}, or allow long contexts (--allow-long)"
            )
    return max(map(len, prompts)) + limits.max_new_tokens - 1
