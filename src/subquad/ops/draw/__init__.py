"""One token for every row of logits: the likeliest, or a draw with noise that belongs to the row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ops.backends import Backends
from subquad.ops.draw.noise import gumbel
from subquad.ops.draw.probabilities import among_all, probabilities

__all__ = ["agree", "among_all", "draw", "draw_residual", "guess_", "gumbel", "probabilities", "uniform"]

_backends = Backends(__name__)


def draw(
    logits_btv: Tensor,
    greedy_b: Tensor,
    seed_b: Tensor,
    step_b: Tensor,
    *,
    temperature_b: Tensor | None = None,
    draws: bool = True,
    stream: int = 0,
) -> Tensor:
    """The token of each column, int64 ``[b, t]``; -1 where logits hold a NaN or have no finite maximum.

    ``argmax(logits / temperature + Gumbel noise)`` is distributed as ``softmax(logits / temperature)``; of equal tokens
    the first is taken.

    Args:
        logits_btv: behind all processors. Column i of a row is drawn with the noise of step ``step_b + i``.
        greedy_b: bool, rows that take no noise.
        seed_b: int64 seeds of the rows.
        step_b: int64, tokens that each row has drawn.
        temperature_b: float32, what is still to divide by; None is 1.
        draws: False promises that all rows are greedy, without asking the device.
        stream: which of the rows' independent noises.
    """
    chosen = _backends.choose(logits_btv)
    return chosen.draw(logits_btv, greedy_b, seed_b, step_b, temperature_b, draws=draws, stream=stream)


def agree(
    logits_btv: Tensor,
    guesses_bk: Tensor,
    length_b: Tensor,
    greedy_b: Tensor,
    seed_b: Tensor,
    step_b: Tensor,
    *,
    temperature_b: Tensor | None = None,
    draws: bool = True,
) -> tuple[Tensor, Tensor]:
    """What `draw` gives, and how many tokens of a row count where guesses stand that equal them.

    One more than those before the first that does not: int64 ``[b]``, from 1 to ``1 + length``.

    Args:
        logits_btv: as in `draw`; column i is what guess i is held against.
        guesses_bk: int64, k from 0 to t.
        length_b: int64, how many of them there are.
        greedy_b, seed_b, step_b, temperature_b, draws: as in `draw`.
    """
    chosen = _backends.choose(logits_btv)
    noise = greedy_b, seed_b, step_b
    return chosen.agree(logits_btv, guesses_bk, length_b, *noise, temperature_b, draws=draws)


def guess_(
    tokens_bk: Tensor,
    q_bkm: Tensor | None,
    at: int,
    logits_bm: Tensor,
    greedy_b: Tensor,
    seed_b: Tensor,
    step_b: Tensor,
    *,
    ids_m: Tensor | None = None,
    temperature_b: Tensor | None = None,
    draws: bool = True,
    stream: int = 0,
) -> None:
    """Write column `at` of guesses, each as `draw` takes a token, and `probabilities`, which it was drawn from.

    Where logits hold a NaN or have no finite maximum the guess is any token, and its probabilities are NaN.

    Args:
        tokens_bk: int64, where the guesses are written.
        q_bkm: float32, or float64 as the logits, where their probabilities are written; None where nobody asks.
        at: the column, drawn with the noise of step ``step_b + at``.
        logits_bm: of the tokens `ids_m`, behind all processors.
        greedy_b, seed_b, step_b: as in `draw`.
        ids_m: int64, ascending: noise belongs to a token, whichever others there are. None is all tokens.
        temperature_b, draws, stream: as in `draw`.
    """
    chosen = _backends.choose(logits_bm)
    noise = greedy_b, seed_b, step_b
    chosen.guess_(tokens_bk, q_bkm, at, logits_bm, *noise, ids_m, temperature_b, draws=draws, stream=stream)


def draw_residual(rest_bv: Tensor, p_bv: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor) -> Tensor:
    """A token ``[b]`` in proportion to what is left of p where no guess stands, with the rows' own noise.

    Args:
        rest_bv: what is left, in any scale.
        p_bv: the distribution, for rows where rounding leaves nothing: there p and q are the same, and a draw from p is
            as good.
        greedy_b, seed_b, step_b: as in `draw`.
    """
    rest_bv = torch.where(rest_bv.sum(-1, keepdim=True) > 0, rest_bv, p_bv)
    return draw(rest_bv.log()[:, None], greedy_b, seed_b, step_b)[:, 0]


def uniform(seed_b: Tensor, step_b: Tensor, stream: int) -> Tensor:
    """A number ``[b]`` in [0, 1) for each row, float32, a function of seed, step and stream as in `gumbel`."""
    return _backends.choose(seed_b).uniform(seed_b, step_b, stream)
