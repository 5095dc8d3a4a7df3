"""Guesses that stand where they are merely good: faster than plain decoding, and another text. Not exact."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler


@dataclass(frozen=True)
class Relaxed:
    """What a guess may be beside the likeliest token (arXiv 2203.16487, top-beta and tau).

    **It changes what comes**: a text is then as the drafter would have it wherever the model has little against it. Of
    everything else in this library the tokens are those of plain decoding, or equal in distribution.

    Attributes:
        beta: a guess stands if fewer than so many tokens are likelier; with 1 nothing is relaxed.
        tau: and its log-probability is at most so far below that of the likeliest; with 0 nothing is relaxed.

    Raises:
        ConfigError: no token could stand.
    """

    beta: int = 3
    tau: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no rule."""
        if self.beta < 1 or not 0 <= self.tau < math.inf:
            raise ConfigError(f"relaxed: expected beta >= 1 and tau >= 0, got {self.beta} and {self.tau}; change them")

    @property
    def exact(self) -> bool:
        """Whether only the likeliest token stands, so that nothing changes."""
        return self.beta == 1 or self.tau == 0

    @staticmethod
    def parse(text: str) -> Relaxed:
        """As ``beta=3,tau=1`` describes it; what is left out is usual.

        Raises:
            ConfigError: another key, no number, or as in `Relaxed`.
        """
        values: dict[str, float] = {}
        for pair in text.split(","):
            key, _, value = pair.partition("=")
            if key not in ("beta", "tau") or key in values:
                raise ConfigError(f"relaxed: expected beta=3,tau=1, got {text!r}; correct it")
            try:
                values[key] = int(value) if key == "beta" else float(value)
            except ValueError as error:
                raise ConfigError(f"relaxed: expected a number for {key}, got {value!r}; correct it") from error
        return Relaxed(int(values.get("beta", Relaxed.beta)), values.get("tau", Relaxed.tau))

    def accepts(self, logits_bv: Tensor, guess_b: Tensor) -> Tensor:
        """Bool ``[b]``; False where logits hold a NaN or have no finite maximum.

        Args:
            logits_bv: behind all processors; they differ from log-probabilities by a number for each row.
            guess_b: int64.
        """
        guess_b1 = logits_bv.gather(1, guess_b[:, None])
        likelier_b = (logits_bv > guess_b1).sum(-1)
        return (likelier_b < self.beta) & (logits_bv.amax(-1) - guess_b1[:, 0] <= self.tau)


def verify_relaxed(
    sampler: Sampler, history: History, logits_btv: Tensor, draft: Draft, relaxed: Relaxed
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that follow each row's last: the guesses that are accepted, and the likeliest token behind them.

    Args:
        sampler: of the rows, all of them greedy.
        history, logits_btv: as in `subquad.engine.verify.verify`.
        draft: one chain of guesses; what it was drawn from does not matter.
        relaxed: which guesses are accepted.

    Returns:
        int64 ``tokens_bt`` and ``n_b``, as in `verify`, and bool ``loose_bt``, which tokens are not the likeliest.
    """
    k = draft.tokens_bk.shape[1]
    there_bk = torch.arange(k, device=draft.length_b.device) < draft.length_b[:, None]
    tokens: list[Tensor] = []
    loose: list[Tensor] = []
    for i in range(k):
        own_b, guess_b = sampler.sample(logits_btv[:, i], history), draft.tokens_bk[:, i]
        accepted_b = there_bk[:, i] & relaxed.accepts(sampler.process(logits_btv[:, i], history), guess_b)
        tokens.append(torch.where(accepted_b, guess_b, own_b))
        loose.append(tokens[i] != own_b)
        history = history.after(tokens[i].clamp(min=0))
    tokens.append(sampler.sample(logits_btv[:, k], history))
    loose.append(torch.zeros_like(tokens[k], dtype=torch.bool))
    tokens_bt = torch.stack(tokens, dim=1)
    stands_bk = there_bk & (tokens_bt[:, :k] == draft.tokens_bk)
    return tokens_bt, 1 + stands_bk.to(torch.int64).cumprod(1).sum(1), torch.stack(loose, dim=1)
