"""What is asked of an engine, what comes back, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple

from subquad.core.errors import ConfigError, DataError, DivergenceError, UnsupportedError
from subquad.core.registry import methods
from subquad.engine.masks import Constraint
from subquad.engine.sampler import SamplingConfig
from subquad.engine.scores import MOST_TOP
from subquad.models.stack import Stack


@dataclass(frozen=True)
class Limits:
    """When to stop, and how much to read at once.

    Attributes:
        max_new_tokens: most tokens of a row.
        end_tokens: token ids that end a row; None takes the model's own.
        stop: strings that end a row; need a tokenizer.
        allow_long: go beyond the context the model was trained for.
        chunk: columns of the prompts read in one forward pass, which bounds the memory of long prompts.
        min_new_tokens: an end token can't come before so many others; stop strings still end a row.
    """

    max_new_tokens: int = 128
    end_tokens: Sequence[int] | None = None
    stop: Sequence[str] = ()
    allow_long: bool = False
    chunk: int = 1024
    min_new_tokens: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it.

    Attributes:
        prompt: token ids, at least one.
        limits: when to stop.
        sampling: how to choose.
        tokenizer: gives the text, and finds stop strings; without it the text stays empty.
        grammar: what the text must be, such as a `subquad.engine.grammar.Grammar`. An end token comes only where it
            may end, and where nothing can follow the row ends at once. `max_new_tokens` and stop strings may cut it.
        logprobs: give the log-probability of each token, and so many of the likeliest tokens at its place with theirs,
            at most 20; None gives neither.
    """

    prompt: Sequence[int]
    limits: Limits = field(default_factory=Limits)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tokenizer: Any = None
    grammar: Constraint | None = None
    logprobs: int | None = None

    @property
    def tokens(self) -> int:
        """Most tokens that its row commits: the last one is never read."""
        return len(self.prompt) + self.limits.max_new_tokens - 1

    def ends(self, model: Stack) -> set[int]:
        """Token ids that end its row."""
        asked = self.limits.end_tokens
        return set(model.config.eos_tokens if asked is None else asked)


class Piece(NamedTuple):
    """A token of a row, as it comes.

    Attributes:
        row: index of the prompt, or what `Engine.submit` returned.
        token: the token chosen; an end token is given too.
        text: what may be shown now: no half characters, and nothing of a stop string or an end token.
        logprob: log-probability of the token under the model itself, before any processor; NaN unless asked for.
        finish: why the row ends with this piece: ``end`` (an end token, or a grammar behind whose text nothing can
            follow), ``stop`` (a stop string), ``length``, ``diverged`` (logits that are not finite; the token is -1),
            ``exhausted`` (grammar and other settings leave no token; the token is -1); or None.
        top: the likeliest tokens at its place with their log-probabilities under the model itself, likeliest first, as
            many as were asked for and there are.
    """

    row: int
    token: int
    text: str
    logprob: float
    finish: str | None
    top: Sequence[tuple[int, float]] = ()


@dataclass
class Generation:
    """All that was generated for one prompt.

    Attributes:
        tokens, text, logprobs, finish: those of its pieces.
        exact: whether the tokens are those of plain decoding, or equal in distribution; see `Relaxed`.
    """

    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[float] = field(default_factory=list[float])
    finish: str = ""
    exact: bool = True


def row_configs(sampling: SamplingConfig | Sequence[SamplingConfig] | None, batch: int) -> list[SamplingConfig]:
    """One configuration for each of `batch` rows."""
    if sampling is None or isinstance(sampling, SamplingConfig):
        one = sampling or SamplingConfig()
        return [replace(one, seed=one.seed + row) for row in range(batch)]
    if len(sampling) != batch:
        raise ConfigError(f"sampling: expected one configuration for {batch} prompts, or {batch}, got {len(sampling)}")
    return list(sampling)


def check_model(model: Stack) -> None:
    """Refuse a model that can't be read in pieces.

    Raises:
        UnsupportedError: a layer that looks ahead or can't be read in pieces.
    """
    cards = methods("mixers")
    for i, layer in enumerate(model.config.layers):
        card = cards[layer["mixer"]]
        if not (card.causal and card.splittable):
            raise UnsupportedError(
                f"layer {i}: expected a causal mixer that can be read in pieces, got {layer['mixer']}; "
                "score whole texts with it instead"
            )


def check_request(model: Stack, request: Request, name: str) -> None:
    """Refuse what can't be generated.

    Raises:
        DataError: an empty prompt, or a token that is not in the vocabulary.
        ConfigError: a limit that can't be kept, among them the model's context.
    """
    prompt, limits = request.prompt, request.limits
    if limits.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected at least 1, got {limits.max_new_tokens}; ask for a token")
    if not 0 <= limits.min_new_tokens <= limits.max_new_tokens:
        raise ConfigError(
            f"min_new_tokens: expected 0 to max_new_tokens={limits.max_new_tokens}, got {limits.min_new_tokens}; "
            "0 lets a row end at once"
        )
    if limits.chunk < 1:
        raise ConfigError(f"chunk: expected at least 1, got {limits.chunk}; 1024 is usual")
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_TOP:
        raise ConfigError(f"logprobs: expected 0 to {MOST_TOP} likeliest tokens, got {request.logprobs}; ask for fewer")
    if limits.stop and request.tokenizer is None:
        raise ConfigError("stop: expected a tokenizer to find strings with, got none; pass one, or use end_tokens")
    vocab_size, context = model.config.vocab_size, model.config.max_positions
    if not len(prompt):
        raise DataError(f"{name}: expected at least one token, got none; begin with the start token")
    # Long prompts of plain integers, the usual ones, are looked through without a loop.
    plain = set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) < vocab_size
    odd = () if plain else prompt
    wrong = next((t for t in odd if not isinstance(t, Integral) or not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise DataError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {wrong}; use the model's tokenizer"
        )
    wrong = next((t for t in limits.end_tokens or () if not isinstance(t, Integral) or not 0 <= t < 2**63), None)
    if wrong is not None:
        raise ConfigError(f"end_tokens: expected token ids of at least 0, got {wrong}; use the model's tokenizer")
    beyond = next((t for t in request.sampling.logit_bias if t >= vocab_size), None)
    if beyond is not None:
        raise ConfigError(f"logit_bias: expected token ids below {vocab_size}, got {beyond}; use the model's tokenizer")
    beyond = next((t for word in request.sampling.bad_words_ids for t in word if t >= vocab_size), None)
    if beyond is not None:
        raise ConfigError(
            f"bad_words_ids: expected token ids below {vocab_size}, got {beyond}; use the model's tokenizer"
        )
    if request.tokens > context and not limits.allow_long:
        room = context - len(prompt) + 1
        remedy = f"ask for at most {room} new tokens" if room > 0 else f"drop {1 - room} tokens"
        raise ConfigError(
            f"{name}: expected at most {context} tokens of context, got {len(prompt)} and "
            f"{limits.max_new_tokens} new ones; {remedy}, or allow long contexts (--allow-long)"
        )


def diverged(row: int, tokens: int) -> DivergenceError:
    """What is raised for a prompt whose logits are not finite."""
    return DivergenceError(
        f"prompt {row}: expected finite logits, got NaN or infinity after {tokens} new tokens; "
        "try float32, or check the weights"
    )
