"""Which guesses stand: one read of the model over all of them, and the same distribution as without."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.engine.draft import Draft
from subquad.engine.sampler import History, Sampler, gumbel, uniform

# The rows' independent noises beside that of the model's own tokens: what drafters draw with, and an accept's coin.
DRAFT_STREAM, COIN_STREAM = 1, 2


def verify(sampler: Sampler, history: History, logits_btv: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """The tokens that follow each row's last: the guesses that stand, and one more.

    A guess d drawn from q stands with probability ``min(1, p(d) / q(d))``; the first that does not is replaced by a
    draw from ``max(p - q, 0)``, renormalised (arXiv 2211.17192, algorithm 1), p being the distribution behind all
    processors. With no q a guess stands where it equals what the row draws from p with its own noise: for a certain
    guess that is as likely, and all tokens are those of plain decoding; greedy rows are its limit.

    Args:
        sampler: of the rows.
        history: behind the rows' last tokens; not changed.
        logits_btv: of the model behind the last token and behind each guess, ``t = k + 1``.
        draft: the guesses.

    Returns:
        int64 ``tokens_bt`` and ``n_b``, how many of them count, at least 1. A token is -1 where logits are not finite.
    """
    k = draft.tokens_bk.shape[1]
    open_b = torch.ones_like(draft.length_b, dtype=torch.bool)
    n_b = torch.zeros_like(draft.length_b)
    tokens: list[Tensor] = []
    for i in range(k + 1):
        n_b = n_b + open_b
        if i == k:
            tokens.append(sampler.sample(logits_btv[:, i], history))
            break
        guess_b, there_b = draft.tokens_bk[:, i], draft.length_b > i
        if draft.q_bkv is None:
            token_b = sampler.sample(logits_btv[:, i], history)
            stands_b = there_b & (token_b == guess_b)
        else:
            token_b, stands_b = _exchange(sampler, history, logits_btv[:, i], guess_b, there_b, draft.q_bkv[:, i])
        tokens.append(token_b)
        open_b = open_b & stands_b
        history = history.after(token_b.clamp(min=0))
    return torch.stack(tokens, dim=1), n_b


def _exchange(
    sampler: Sampler, history: History, logits_bv: Tensor, guess_b: Tensor, there_b: Tensor, q_bv: Tensor
) -> tuple[Tensor, Tensor]:
    """The guess, or what takes its place, and whether it stands."""
    rows = len(logits_bv)
    p_bv = sampler.probabilities(logits_bv, history)
    sound_b = p_bv.sum(-1).isfinite()
    q_bv = q_bv.to(p_bv.dtype)
    at_b1 = guess_b[:, None]
    p_b, q_b = p_bv.gather(1, at_b1)[:, 0], q_bv.gather(1, at_b1)[:, 0]
    coin_b = uniform(sampler.seed_b[:rows], history.step_b, COIN_STREAM)
    stands_b = there_b & (coin_b * q_b < p_b)
    rest_bv = torch.where(there_b[:, None], (p_bv - q_bv).clamp(min=0), p_bv)
    token_b = torch.where(stands_b, guess_b, draw_rest(sampler, history, rest_bv, p_bv))
    return torch.where(sound_b, token_b, -1), stands_b & sound_b


def draw_rest(sampler: Sampler, history: History, rest_bv: Tensor, p_bv: Tensor) -> Tensor:
    """A token ``[b]`` in proportion to what is left of p where no guess stands, drawn with the rows' own noise."""
    # Where rounding leaves nothing, p and q are the same, and a draw from p is as good.
    rest_bv = torch.where(rest_bv.sum(-1, keepdim=True) > 0, rest_bv, p_bv)
    noise_bv = gumbel(sampler.seed_b[: len(rest_bv)], history.step_b, rest_bv.shape[1])
    return (rest_bv.log() + noise_bv).argmax(-1)
