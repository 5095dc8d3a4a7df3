"""Perplexity of a text at a context length, by position, paired between models."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from subquad.core.errors import ConfigError, DataError
from subquad.evals.scoring import Progress, score_hidden
from subquad.evals.stats import Interval, Paired, bootstrap_mean, bootstrap_ratio, paired_difference
from subquad.evals.text import TextTokens
from subquad.models.stack import Stack


@dataclass(frozen=True)
class Bucket:
    """Mean loss of the tokens at positions ``[start, stop)`` of their window, in nats."""

    start: int
    stop: int
    nll: float


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text cut into windows.

    Attributes:
        context: tokens of a window.
        windows: how many.
        nll_wt: float64 ``[windows, context - 1]``, loss of every scored token in nats: all but a window's first.
        bytes_w: UTF-8 bytes of each window's scored tokens.
        seconds: wall time.
    """

    context: int
    windows: int
    nll_wt: Tensor
    bytes_w: Tensor
    seconds: float

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.nll_wt.numel()

    @property
    def nll_total(self) -> float:
        """Loss of the whole text, in nats."""
        return float(self.nll_wt.sum())

    @property
    def nll(self) -> Interval:
        """Loss per token in nats, over windows."""
        return bootstrap_mean(self.nll_wt.mean(1))

    @property
    def perplexity(self) -> Interval:
        """``exp(nll)``."""
        return self.nll.map(math.exp)

    @property
    def bits_per_byte(self) -> Interval:
        """``nll_total / (ln 2 · bytes)``, over windows: comparable between tokenizers."""
        return bootstrap_ratio(self.nll_wt.sum(1) / math.log(2), self.bytes_w)

    def nll_w(self, start: int, stop: int) -> Tensor:
        """Mean loss of the tokens at positions ``[start, stop)``, of each window.

        Raises:
            ConfigError: no scored position there.
        """
        if not 1 <= start < stop <= self.context:
            raise ConfigError(
                f"positions: expected 1 <= start < stop <= {self.context}, got {start} and {stop}; "
                "a window's first token is not scored"
            )
        # Column t holds the loss of the token at position t + 1.
        return self.nll_wt[:, start - 1 : stop - 1].mean(1)

    def by_position(self) -> list[Bucket]:
        """Loss over the position in the window, in buckets that double: 1, 2-3, 4-7, ..."""
        edges = [2**i for i in range(self.context.bit_length()) if 2**i < self.context] + [self.context]
        return [Bucket(a, b, float(self.nll_w(a, b).mean())) for a, b in pairwise(edges)]


def spread_windows(text: TextTokens, context: int, windows: int) -> TextTokens:
    """So many windows of a text, evenly spread over it, one behind the other; all where there are no more.

    Raises:
        ConfigError, DataError: see `windows_of`.
    """
    tokens_wt = windows_of(text, context)
    there = len(tokens_wt)
    if windows < 1:
        raise ConfigError(f"windows: expected at least 1, got {windows}; a window is what is measured")
    pick = [i * there // windows for i in range(windows)] if windows < there else list(range(there))
    bytes_wt = text.bytes_n[: there * context].view(there, context)
    return TextTokens(tokens_wt[pick].flatten(), bytes_wt[pick].flatten())


def windows_of(text: TextTokens, context: int) -> Tensor:
    """The tokens of a text as windows ``[w, context]``; what remains after the last whole one is left out.

    Raises:
        ConfigError: a context below 2.
        DataError: text shorter than one window.
    """
    if context < 2:
        raise ConfigError(f"context: expected at least 2 tokens, got {context}; the first of a window is not scored")
    windows = len(text.ids_n) // context
    if windows == 0:
        raise DataError(
            f"expected a text of at least one window of {context} tokens, got {len(text.ids_n)}; "
            "give more text or a smaller --context"
        )
    return text.ids_n[: windows * context].view(windows, context)


@torch.no_grad()
def perplexity(
    model: Stack, text: TextTokens, context: int, *, batch: int = 4, progress: Progress | None = None
) -> Perplexity:
    """The loss of a text in non-overlapping windows of `context` tokens.

    ``nll = -log p(token_t | tokens of the window before t)`` for t from 1: a window's first token has nothing before
    it and is not scored, and what remains after the last whole window is left out.

    Args:
        model: the model.
        text: from `subquad.evals.text`.
        context: tokens of a window, at least 2; a warning where the model was not made for as many.
        batch: windows read at once.
        progress: called with tokens done and in all.

    Raises:
        ConfigError, DataError: see `windows_of`.
    """
    tokens_wt = windows_of(text, context)
    windows = len(tokens_wt)
    bytes_wt = text.bytes_n[: windows * context].view(windows, context)
    if context > model.config.max_positions:
        warnings.warn(
            f"context {context} is beyond the {model.config.max_positions} positions the model was made for",
            stacklevel=2,
        )
    nll_wt = torch.empty(windows, context - 1, dtype=torch.float64)
    began = time.perf_counter()
    for start in range(0, windows, batch):
        tokens_bt = tokens_wt[start : start + batch].to(model.device)
        hidden_btd = model.hidden(tokens_bt)[:, :-1]
        scores = score_hidden(model, hidden_btd.flatten(0, 1), tokens_bt[:, 1:].flatten())
        nll_wt[start : start + batch] = -scores.logprob_n.view(len(tokens_bt), context - 1)
        if progress is not None:
            progress(min(start + batch, windows) * context, windows * context)
    return Perplexity(context, windows, nll_wt, bytes_wt[:, 1:].sum(1), time.perf_counter() - began)


def perplexity_ratio(student: Perplexity, teacher: Perplexity) -> Interval:
    """``exp(nll_student - nll_teacher)`` with an interval over windows, each scored by both.

    Raises:
        ConfigError: the two were not measured on the same windows.
    """
    return compare_perplexity(student, teacher).interval


def compare_perplexity(first: Perplexity, second: Perplexity) -> Paired:
    """`perplexity_ratio` with the p-value of equal losses, by random signs over windows."""
    if first.nll_wt.shape != second.nll_wt.shape or not torch.equal(first.bytes_w, second.bytes_w):
        raise ConfigError(
            f"expected the same windows for both, got {tuple(first.nll_wt.shape)} and "
            f"{tuple(second.nll_wt.shape)}; measure both on one tokenized text at one context"
        )
    return paired_difference(first.nll_wt.mean(1), second.nll_wt.mean(1)).map(math.exp, "ratio")
