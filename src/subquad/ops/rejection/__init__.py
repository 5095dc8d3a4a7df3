"""Which drawn guesses stand, and the token behind them: speculative sampling of several rows at once."""

from __future__ import annotations

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.ops.backends import Backends

__all__ = ["rejection_sample"]

_backends = Backends(__name__)


def rejection_sample(
    logits_btv: Tensor,
    guesses_bk: Tensor,
    length_b: Tensor,
    q_bkm: Tensor,
    place_v: Tensor | None,
    greedy_b: Tensor,
    seed_b: Tensor,
    step_b: Tensor,
    *,
    coin: int,
    temperature_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The guesses that stand and a token behind them, distributed as p (arXiv 2211.17192, algorithm 1).

    A guess d stands where ``u q(d) < p(d)``, u uniform, and those before it do. Behind them a token is drawn from
    ``max(p - q, 0)``, renormalised, or from p where no guess is left; p is `subquad.ops.draw.probabilities` of logits.

    Args:
        logits_btv: of the model, behind all processors: column i is what guess i is held against.
        guesses_bk: int64, k from 1 to t.
        length_b: int64, how many of them there are.
        q_bkm: what they were drawn from.
        place_v: int64, the place of each token in q, m where it has none; None is a q of all tokens.
        greedy_b, seed_b, step_b: as in `subquad.ops.draw.draw`; coin and token of column i are those of step
            ``step_b + i``.
        coin: stream of u; the token's is 0.
        temperature_b: as in `subquad.ops.draw.draw`.

    Returns:
        int64 ``tokens_bt`` and ``n_b``, how many of them count, at least 1. A token is -1 where logits are not finite.

    Raises:
        ConfigError: no column of guesses, or more of them than of logits.
    """
    k, t = guesses_bk.shape[1], logits_btv.shape[1]
    if not 1 <= k <= t:
        raise ConfigError(f"guesses_bk: expected from 1 to t={t} guesses a row, got {k}; draw where there are none")
    chosen = _backends.choose(logits_btv, q_bkm)
    guesses = guesses_bk, length_b, q_bkm, place_v
    return chosen.rejection_sample(logits_btv, *guesses, greedy_b, seed_b, step_b, temperature_b, coin)
