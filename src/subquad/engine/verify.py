"""Which guesses stand: one read of the model over all of them, and the same distribution as without."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler
from subquad.ops.draw import draw, uniform
from subquad.ops.slots import agree

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
        q_b1v = None if draft.q_bkv is None else draft.q_bkv[:, i : i + 1]
        guess = Draft(draft.tokens_bk[:, i : i + 1], (draft.length_b - i).clamp(0, 1), q_b1v)
        token_b1, one_b = _judge(sampler, history, logits_btv[:, i : i + 1], guess)
        tokens.append(token_b1[:, 0])
        open_b = open_b & (one_b > 1)
        history = history.after(tokens[-1].clamp(min=0))
    return torch.stack(tokens, dim=1), n_b


def _judge(sampler: Sampler, history: History, logits_btv: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """All columns at once; there need not be one behind the last guess."""
    if draft.q_bkv is not None and draft.tokens_bk.shape[1]:
        return _exchange(sampler, history, logits_btv, draft, draft.q_bkv)
    tokens_bt = sampler.sample_block(logits_btv, history)
    if not draft.tokens_bk.shape[1]:
        return tokens_bt, torch.ones_like(draft.length_b)
    return tokens_bt, agree(tokens_bt, draft.tokens_bk, draft.length_b)


def _exchange(
    sampler: Sampler, history: History, logits_btv: Tensor, draft: Draft, q_bkv: Tensor
) -> tuple[Tensor, Tensor]:
    """Guesses drawn from q; only where they end a token is drawn."""
    (b, t), k = logits_btv.shape[:2], draft.tokens_bk.shape[1]
    p_btv = sampler.probabilities(logits_btv, history)
    q_bkv, at_bk1 = q_bkv.to(p_btv.dtype), draft.tokens_bk[..., None]
    step_bk = history.step_b[:, None] + torch.arange(k, device=at_bk1.device)
    coin_bk = uniform(sampler.seed_b[:b].repeat_interleave(k), step_bk.flatten(), COIN_STREAM).view(b, k)
    # Where logits are broken p is NaN, and nothing stands.
    taken_bk = coin_bk * q_bkv.gather(2, at_bk1)[..., 0] < p_btv[:, :k].gather(2, at_bk1)[..., 0]
    n_b = _run(taken_bk & _there(draft))
    row_b = torch.arange(b, device=n_b.device)
    p_bv, q_bv = p_btv[row_b, n_b.clamp(max=t - 1)], q_bkv[row_b, n_b.clamp(max=k - 1)]
    rest_bv = torch.where((n_b < draft.length_b)[:, None], (p_bv - q_bv).clamp(min=0), p_bv)
    drawn_b = draw_rest(sampler, replace(history, step_b=history.step_b + n_b), rest_bv, p_bv)
    drawn_b = torch.where(p_bv.sum(-1).isfinite(), drawn_b, -1)
    tokens_bt = F.pad(draft.tokens_bk, (0, t - k))
    return torch.where(torch.arange(t, device=n_b.device) == n_b[:, None], drawn_b[:, None], tokens_bt), 1 + n_b


def _there(draft: Draft) -> Tensor:
    """bool ``[b, k]``: which guesses count."""
    return torch.arange(draft.tokens_bk.shape[1], device=draft.length_b.device) < draft.length_b[:, None]


def _run(holds_bk: Tensor) -> Tensor:
    """int64 ``[b]``: in how many columns it holds from the first on without a break."""
    return holds_bk.to(torch.int64).cumprod(1).sum(1)


def draw_rest(sampler: Sampler, history: History, rest_bv: Tensor, p_bv: Tensor) -> Tensor:
    """A token ``[b]`` in proportion to what is left of p where no guess stands, drawn with the rows' own noise."""
    # Where rounding leaves nothing, p and q are the same, and a draw from p is as good.
    rest_bv = torch.where(rest_bv.sum(-1, keepdim=True) > 0, rest_bv, p_bv)
    rows = len(rest_bv)
    return draw(rest_bv.log()[:, None], sampler.greedy_b[:rows], sampler.seed_b[:rows], history.step_b)[:, 0]
