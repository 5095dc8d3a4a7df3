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
"""Called with what is done and what there is in all, in tokens unless said otherwise."""

Request = tuple[Sequence[int], Sequence[int]]
"""Context and continuation, as tokens."""

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


@dataclass(frozen=True)
class Batch:
    """Ragged rows to read, and what is to be scored of them.

    Attributes:
        tokens_bt: right-padded rows.
        layout: where they stand.
        at_n: index into the flattened ``[b t]`` of each position whose logits are wanted.
        targets_n: the token that follows there.
        owners: index of the request and number of its targets, in the order of `at_n`.
    """

    tokens_bt: Tensor
    layout: Layout
    at_n: Tensor
    targets_n: Tensor
    owners: tuple[tuple[int, int], ...]

    def hidden_nd(self, model: Stack) -> Tensor:
        """The model's hidden states where something is scored."""
        return model.hidden(self.tokens_bt, self.layout).flatten(0, 1)[self.at_n]


def make_batches(requests: Sequence[Request], batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """Rows of similar length, longest first, each for one or more requests.

    Requests that share all but their last token, such as the letters of a multiple-choice question, share a row.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(i)
    order = sorted(rows, key=len, reverse=True)
    start = 0
    while start < len(order):
        width = len(order[start])
        batch = order[start : start + max(1, batch_tokens // width)]
        start += len(batch)
        tokens_bt = torch.zeros(len(batch), width, dtype=torch.int64)
        at: list[int] = []
        targets: list[int] = []
        owners: list[tuple[int, int]] = []
        for b, row in enumerate(batch):
            tokens_bt[b, : len(row)] = torch.tensor(row)
            for i in rows[row]:
                continuation = requests[i][1]
                last = b * width + len(row)
                at += range(last - len(continuation), last)
                targets += continuation
                owners.append((i, len(continuation)))
        lengths_b = torch.tensor([len(row) for row in batch], device=device)
        yield Batch(
            tokens_bt.to(device),
            Layout.ragged(lengths_b, width),
            torch.tensor(at, device=device),
            torch.tensor(targets, device=device),
            tuple(owners),
        )


@torch.no_grad()
def score_continuations(
    model: Stack, requests: Sequence[Request], *, batch_tokens: int = 8192, progress: Progress | None = None
) -> list[TokenScores]:
    """Score each request's continuation after its context, in ragged batches of similar length.

    Args:
        model: the model.
        requests: ``(context tokens, continuation tokens)``, neither empty.
        batch_tokens: padded tokens in a batch.
        progress: called after each batch with requests done and in all.
    """
    results: dict[int, TokenScores] = {}
    for batch in make_batches(requests, batch_tokens, model.device):
        scores = score_hidden(model, batch.hidden_nd(model), batch.targets_n)
        sizes = [size for _, size in batch.owners]
        parts = zip(batch.owners, scores.logprob_n.split(sizes), scores.greedy_n.split(sizes), strict=True)
        results |= {i: TokenScores(logprob_n, greedy_n) for (i, _), logprob_n, greedy_n in parts}
        if progress is not None:
            progress(len(results), len(requests))
    return [results[i] for i in range(len(requests))]
