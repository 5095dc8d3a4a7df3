"""Which guesses stand: one read of the model over all of them, and the same distribution as without."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler
from subquad.ops.draw import agree
from subquad.ops.rejection import rejection_sample

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
    if k == 0 or not sampler.penalises:
        return _judge(sampler, history, logits_btv, draft)
    # What is drawn behind a guess depends on it not through the model alone.
    open_b, n_b = torch.ones_like(draft.length_b, dtype=torch.bool), torch.zeros_like(draft.length_b)
    tokens: list[Tensor] = []
    for i in range(k + 1):
        n_b = n_b + open_b
        q_b1m = None if draft.q_bkm is None else draft.q_bkm[:, i : i + 1]
        one, there_b = draft.tokens_bk[:, i : i + 1], (draft.length_b - i).clamp(0, 1)
        guess = replace(draft, tokens_bk=one, length_b=there_b, q_bkm=q_b1m)
        token_b1, one_b = _judge(sampler, history, logits_btv[:, i : i + 1], guess)
        tokens.append(token_b1[:, 0])
        open_b = open_b & (one_b > 1)
        history = history.after(tokens[-1].clamp(min=0))
    return torch.stack(tokens, dim=1), n_b


def _judge(sampler: Sampler, history: History, logits_btv: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """All columns at once; there need not be one behind the last guess."""
    logits_btv, temperature_b = sampler.shaped(logits_btv, history)
    guesses, noise = (draft.tokens_bk, draft.length_b), sampler.noise(history)
    if draft.q_bkm is None or not draft.tokens_bk.shape[1]:
        return agree(logits_btv, *guesses, *noise, temperature_b=temperature_b, draws=sampler.draws)
    drawn = *guesses, draft.q_bkm, draft.place_v
    return rejection_sample(logits_btv, *drawn, *noise, coin=COIN_STREAM, temperature_b=temperature_b)
