"""Log-probabilities of given tokens: the one place where evaluation meets logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.state import precise
from subquad.models.stack import Stack

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""

LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class TokenScores:
    """What the model gave each target token, in nats.

    Attributes:
        logprob_n: float64 ``[n]`` on the CPU.
        greedy_n: bool ``[n]``, whether the target was the most likely token.
    """

    logprob_n: Tensor
    greedy_n: Tensor


def logit_chunks(model: Stack, hidden_nd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of `hidden_nd` in float32 or better, a slice of tokens at a time, so that [n, vocab] never exists."""
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(hidden_nd), step):
        part = slice(start, min(start + step, len(hidden_nd)))
        logits_cv = model.head(hidden_nd[None, part])[0]
        yield part, logits_cv.to(precise(logits_cv.dtype))


@torch.no_grad()
def score_hidden(model: Stack, hidden_nd: Tensor, targets_n: Tensor) -> TokenScores:
    """Score target ``i`` against the logits of hidden ``i``.

    ``logprob_i = logits_i[target_i] - logsumexp(logits_i)``
    """
    logprob_n = torch.empty(len(targets_n), dtype=torch.float64, device=hidden_nd.device)
    greedy_n = torch.empty(len(targets_n), dtype=torch.bool, device=hidden_nd.device)
    for part, logits_cv in logit_chunks(model, hidden_nd):
        targets_c1 = targets_n[part, None]
        logprob_n[part] = (logits_cv.gather(1, targets_c1)[:, 0] - logits_cv.logsumexp(1)).double()
        greedy_n[part] = logits_cv.argmax(1) == targets_n[part]
    return TokenScores(logprob_n.cpu(), greedy_n.cpu())


@torch.no_grad()
def score_continuations(
    model: Stack,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[TokenScores]:
    """Score each request's continuation after its context, in ragged batches of similar length.

    Requests that share all but their last token, such as the letters of a multiple-choice question, are read once.

    Args:
        model: the model.
        requests: ``(context tokens, continuation tokens)``, neither empty.
        batch_tokens: padded tokens in a batch.
        progress: called after each batch.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(i)
    order = sorted(rows, key=len, reverse=True)
    results: dict[int, TokenScores] = {}
    done, total, start = 0, sum(map(len, order)), 0
    while start < len(order):
        batch = order[start : start + max(1, batch_tokens // len(order[start]))]
        start += len(batch)
        lengths_b = torch.tensor([len(row) for row in batch])
        tokens_bt = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        at: list[int] = []
        targets: list[int] = []
        for b, row in enumerate(batch):
            tokens_bt[b, : len(row)] = torch.tensor(row)
            for i in rows[row]:
                continuation = requests[i][1]
                first = b * len(batch[0]) + len(row) - len(continuation)
                at += range(first, first + len(continuation))
                targets += continuation
        layout = Layout.ragged(lengths_b.to(model.device), tokens_bt.shape[1])
        hidden_btd = model.hidden(tokens_bt.to(model.device), layout)
        hidden_nd = hidden_btd.flatten(0, 1)[torch.tensor(at, device=model.device)]
        scores = score_hidden(model, hidden_nd, torch.tensor(targets, device=model.device))
        taken = 0
        for row in batch:
            for i in rows[row]:
                mine = slice(taken, taken + len(requests[i][1]))
                results[i] = TokenScores(scores.logprob_n[mine], scores.greedy_n[mine])
                taken = mine.stop
        done += int(lengths_b.sum())
        if progress is not None:
            progress(done, total)
    return [results[i] for i in range(len(requests))]
