"""Several chains of guesses a row, read side by side: which of them stands, and what it leaves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.mixer import Update
from subquad.core.state import State
from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler
from subquad.engine.verify import COIN_STREAM, DRAFT_STREAM
from subquad.ops.draw import draw_residual, uniform

# Halvings of [1, K] in the search for rho: more would let less than one guess in a thousand more stand.
HALVINGS = 12
# A noise of its own for each guess of a depth is so many streams behind that of the one before.
STREAMS = 2

U = TypeVar("U", bound=Update)


def draft_stream(at: int) -> int:
    """The noise that guess number `at` of its depth is drawn with."""
    return DRAFT_STREAM + STREAMS * at


def verify_chains(
    sampler: Sampler, history: History, logits_btv: Tensor, draft: Draft
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that follow each row's last, from the chains of each row: the guesses that stand, and one more.

    At each position the candidates are the guesses there of all chains whose earlier guesses are the tokens chosen so
    far, a guess that chains share counted once. One token is chosen, from p, the distribution behind all processors:
    a candidate by K-SEQ (arXiv 2310.15141, algorithm 2), or with no q what the row draws with its own noise. Chains
    that go on with this token remain, and where none does the row's tokens end.

    The tokens are distributed as in plain decoding. Which candidates there are at a position, and so their number K,
    follows from the guesses before it. Given these, all candidates are draws from the one q behind the chosen tokens,
    independent of each other, of what was chosen and of every coin so far, since each has its own noise, of its own
    step. So they are K independent draws from q, and K-SEQ of K such draws gives a token of p, for K = 0 too; two that
    are the same token are no exception. This holds at every position, whatever was chosen before, and even where the
    chosen token is not a candidate that stood but one that happens to be equal to it.

    Args:
        sampler: of the rows.
        history: behind the rows' last tokens; not changed.
        logits_btv: ``[b * c, t, v]`` of the model behind the last token and behind each guess, ``t = k + 1``.
        draft: the guesses.

    Returns:
        int64 ``tokens_bt`` and ``n_b``, how many of them count, at least 1, and ``at_b`` in ``[0, b * c)``, the chain
        that begins with all of them but the last. A token is -1 where logits are not finite.
    """
    rows, k = len(draft.length_b), draft.tokens_bk.shape[1]
    tokens_bck = draft.tokens_bk.unflatten(0, (rows, draft.chains))
    first_b = torch.arange(rows, device=draft.length_b.device) * draft.chains
    alive_bc = tokens_bck.new_ones(rows, draft.chains, dtype=torch.bool)
    n_b, at_b = torch.ones_like(draft.length_b), first_b
    tokens: list[Tensor] = []
    q_bkv = draft.q_bkv
    for i in range(k):
        logits_bv, alive_bc = logits_btv[at_b, i], alive_bc & (draft.length_b > i)[:, None]
        if q_bkv is None:
            token_b = sampler.sample(logits_bv, history)
        else:
            # Chains that share this guess and all before it stand in succession.
            every = math.prod(draft.branches[i + 1 :])
            guess_bm, there_bm = tokens_bck[:, ::every, i], alive_bc[:, ::every]
            token_b = k_seq(sampler, history, logits_bv, guess_bm, there_bm, q_bkv[at_b, i])
        tokens.append(token_b)
        alive_bc = alive_bc & (tokens_bck[..., i] == token_b[:, None])
        stands_b = alive_bc.any(1)
        n_b = n_b + stands_b
        at_b = torch.where(stands_b, first_b + alive_bc.to(torch.int64).argmax(1), at_b)
        history = history.after(token_b.clamp(min=0))
    tokens.append(sampler.sample(logits_btv[at_b, k], history))
    return torch.stack(tokens, dim=1), n_b, at_b


def k_seq(
    sampler: Sampler, history: History, logits_bv: Tensor, guess_bm: Tensor, there_bm: Tensor, q_bv: Tensor
) -> Tensor:
    """A token of p from K draws of q: K-SEQ (arXiv 2310.15141, algorithm 2).

    One after the other, a candidate x stands with probability ``min(1, p(x) / (rho q(x)))``. Each does with probability
    ``beta = sum min(p / rho, q)``, so that ``n = 1 + (1 - beta) + ... + (1 - beta)^(K - 1)`` of them are judged on
    average, and x comes from them with probability ``n min(p(x) / rho, q(x))``. What p has more than that is drawn
    where none stands. It is never negative for ``rho >= n``.

    Args:
        sampler, history, logits_bv: as in `verify_chains`, at one position.
        guess_bm: candidates.
        there_bm: which of them there are, K of a row.
        q_bv: the distribution that they were drawn from.

    Returns:
        int64 ``[b]``, -1 where logits are not finite.
    """
    p_bv = sampler.probabilities(logits_bv, history)
    q_bv, k_b = q_bv.to(p_bv.dtype), there_bm.sum(1)
    rho_b = least_rho(p_bv, q_bv, k_b, guess_bm.shape[1])
    p_bm, q_bm = p_bv.gather(1, guess_bm), q_bv.gather(1, guess_bm)
    greedy_b, seed_b, step_b = sampler.noise(history)
    coins = [uniform(seed_b, step_b, COIN_STREAM + STREAMS * j) for j in range(guess_bm.shape[1])]
    stands_bm = there_bm & (torch.stack(coins, dim=1) * rho_b[:, None] * q_bm < p_bm)
    first_b1 = stands_bm.to(torch.int64).argmax(1, keepdim=True)
    taken_bv = torch.minimum(p_bv / rho_b[:, None], q_bv)
    rest_bv = (p_bv - _judged(taken_bv.sum(-1), k_b)[:, None] * taken_bv).clamp(min=0)
    rest_bv = torch.where((k_b > 0)[:, None], rest_bv, p_bv)
    drawn_b = draw_residual(rest_bv, p_bv, greedy_b, seed_b, step_b)
    token_b = torch.where(stands_bm.any(1), guess_bm.gather(1, first_b1)[:, 0], drawn_b)
    return torch.where(p_bv.sum(-1).isfinite(), token_b, -1)


def least_rho(p_bv: Tensor, q_bv: Tensor, k_b: Tensor, most: int) -> Tensor:
    """The least rho of each row in [1, K] that is not below the number of candidates judged, from above.

    There ``1 - (1 - beta)^K = rho beta``, and most candidates stand (arXiv 2310.15141). The right side grows
    with rho and the left one falls, so halving the interval finds it.

    Args:
        p_bv, q_bv: target and draft distributions.
        k_b: int64, K.
        most: the largest K there may be; with 1 there is nothing to search.
    """
    low_b, high_b = torch.ones_like(p_bv[:, 0]), k_b.clamp(min=1).to(p_bv.dtype)
    # Where p is nearly q both sides are equal but for rounding, and far from the least rho too.
    slack = 1 + 8 * torch.finfo(p_bv.dtype).eps
    for _ in range(HALVINGS if most > 1 else 0):
        rho_b = (low_b + high_b) / 2
        enough_b = rho_b * slack >= _judged(torch.minimum(p_bv / rho_b[:, None], q_bv).sum(-1), k_b)
        low_b, high_b = torch.where(enough_b, low_b, rho_b), torch.where(enough_b, rho_b, high_b)
    return high_b


def _judged(beta_b: Tensor, k_b: Tensor) -> Tensor:
    """``(1 - (1 - beta)^K) / beta``, how many of K candidates are judged on average; K where beta is 0."""
    beta_b = beta_b.clamp(torch.finfo(beta_b.dtype).tiny, 1)
    return -torch.expm1(k_b.clamp(min=1) * torch.log1p(-beta_b)) / beta_b


def select(update: U, rows: Tensor) -> U:
    """The update of some rows of a block, as if no others had been read: what chains that fell would change is gone.

    Args:
        update: a dataclass of tensors, states, layouts and further updates, batch first.
        rows: int64, as in `State.select`.
    """

    def visit(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, rows)
        if isinstance(value, State):
            return value.select(rows)
        if isinstance(value, tuple):
            return tuple(visit(v) for v in cast("tuple[Any, ...]", value))
        if isinstance(value, (Update, Layout)):
            fields = dataclasses.fields(cast("Any", value))
            return type(value)(**{f.name: visit(getattr(value, f.name)) for f in fields if f.init})
        return value

    return visit(update)
