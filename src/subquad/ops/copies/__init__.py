"""Where a row's last tokens stood before, by an index of all runs of a few tokens, and what came behind them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from subquad.ops.backends import Backends
from subquad.ops.copies.on_torch import bucket

__all__ = ["bucket", "enter_", "find"]

_backends = Backends(__name__)


def find(
    tokens_bn: Tensor, length_b: Tensor, table_gbm: Tensor, gammas: Sequence[int], k: int, stretch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k tokens behind the last run like each row's last tokens, int64 ``[b, k]``, and k, or 0 where there is none.

    Third comes how many of them have a ground: `stretch` for each token in which the text before that run's end and
    the row's last tokens agree, backwards up to the first in which they do not; at most k.

    Lengths of runs are tried in the order of `gammas`. The run itself is compared, so that a collision finds nothing
    and no more. Where the copy reaches the end of the text it goes on in itself, as text that repeats does.

    Args:
        tokens_bn: the rows' texts; one column more than is ever filled.
        length_b: int64, their lengths.
        table_gbm: int64, for each of `gammas` the position behind the last run of each `bucket`, -1 for none; the last
            bucket takes what is no run.
        gammas: tokens of a run.
        k, stretch: at least 1.
    """
    return _backends.choose(tokens_bn, length_b, table_gbm).find(tokens_bn, length_b, table_gbm, gammas, k, stretch)


def enter_(
    tokens_bn: Tensor, length_b: Tensor, table_gbm: Tensor, gammas: Sequence[int], new_bt: Tensor, n_b: Tensor
) -> None:
    """Append tokens to the texts and enter the runs that are no longer the last, all in place.

    Args:
        tokens_bn, length_b, table_gbm, gammas: as in `find`.
        new_bt: int64, new tokens.
        n_b: int64, how many of them count.
    """
    _backends.choose(tokens_bn, length_b, table_gbm).enter_(tokens_bn, length_b, table_gbm, gammas, new_bt, n_b)
