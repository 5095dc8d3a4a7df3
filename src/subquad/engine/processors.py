"""What changes logits before a token is drawn, one function each; `subquad.engine.sampler` has their order."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.engine.history import History


def penalise_repetition(logits_bv: Tensor, seen_bv: Tensor, penalty: Tensor | float) -> Tensor:
    """``logit / penalty`` where positive and ``logit * penalty`` where negative, of the tokens seen."""
    penalised_bv = torch.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
    return torch.where(seen_bv, penalised_bv, logits_bv)


def penalise_counts(logits_bv: Tensor, count_bv: Tensor, presence: Tensor | float, frequency: Tensor | float) -> Tensor:
    """``logit - presence * [count > 0] - frequency * count``."""
    return logits_bv - presence * (count_bv > 0) - frequency * count_bv


def _back(history: History, d: int) -> Tensor:
    """The d-th last token of each row ``[b, 1]``; anything where it has fewer."""
    return history.text_bn.gather(1, (history.length_b - d).clamp(0, history.text_bn.shape[1] - 1)[:, None])


def find_ngrams(history: History, size_b1: Tensor, largest: int) -> Tensor:
    """Where in a row's text an n-gram ends that begins as the text's end does: there is a token that would repeat it.

    Args:
        history: of the rows.
        size_b1: n of each row; 0 finds nothing.
        largest: the maximum of `size_b1`, known here so that the device is not asked.

    Returns:
        bool ``[b, n]``, beside `History.text_bn`.
    """
    columns_n = torch.arange(history.text_bn.shape[1], device=size_b1.device)
    found_bn = (size_b1 > 0) & (columns_n >= size_b1 - 1) & (columns_n < history.length_b[:, None])
    for d in range(1, min(largest, len(columns_n))):
        # What rolls in from the end is where no n-gram of more than d tokens ends.
        found_bn = found_bn & ((history.text_bn.roll(d, 1) == _back(history, d)) | (size_b1 <= d))
    return found_bn


def find_words(history: History, words_bwl: Tensor) -> Tensor:
    """Which sequences, all tokens of which but the last are the end of a row's text, its next token would complete.

    Args:
        history: of the rows.
        words_bwl: token ids, -1 before a shorter sequence's first and where there is none.

    Returns:
        bool ``[b, w]``.
    """
    found_bw = words_bwl[..., -1] >= 0
    for d in range(1, words_bwl.shape[2]):
        token_bw = words_bwl[..., -1 - d]
        same_bw = (token_bw == _back(history, d)) & (history.length_b >= d)[:, None]
        found_bw = found_bw & (same_bw | (token_bw < 0))
    return found_bw


def forbid(logits_bv: Tensor, tokens_bm: Tensor, there_bm: Tensor) -> Tensor:
    """Minus infinity for `tokens_bm` where `there_bm`, m of a row; logits that are not finite are no less noticed."""
    times_bv = torch.zeros_like(logits_bv, dtype=torch.int32).scatter_add_(1, tokens_bm, there_bm.to(torch.int32))
    return torch.where(times_bv > 0, logits_bv - torch.inf, logits_bv)


def keep_top_k(logits_bv: Tensor, k_b1: Tensor, largest: int) -> Tensor:
    """Drop every token below the k-th most likely of its row; rows with k = 0 keep all.

    Args:
        logits_bv: logits.
        k_b1: int64.
        largest: the maximum of `k_b1`, known here so that the device is not asked.
    """
    top_bk = logits_bv.topk(min(largest, logits_bv.shape[1]), dim=-1).values
    floor_b1 = top_bk.gather(1, (k_b1 - 1).clamp(0, top_bk.shape[1] - 1)).masked_fill(k_b1 == 0, -torch.inf)
    return logits_bv.masked_fill(logits_bv < floor_b1, -torch.inf)


def keep_top_p(logits_bv: Tensor, tail: Tensor | float) -> Tensor:
    """Drop the least likely tokens whose probabilities sum to at most ``tail = 1 - p``; one is always kept."""
    sorted_bv, order_bv = logits_bv.sort(dim=-1)
    drop_bv = sorted_bv.softmax(-1).cumsum(-1) <= tail
    drop_bv[:, -1] = False
    return logits_bv.masked_fill(drop_bv.scatter(1, order_bv, drop_bv), -torch.inf)


def keep_min_p(logits_bv: Tensor, p: Tensor | float) -> Tensor:
    """Drop tokens whose probability is below ``p`` times that of the most likely."""
    prob_bv = logits_bv.softmax(-1)
    return logits_bv.masked_fill(prob_bv < p * prob_bv.amax(-1, keepdim=True), -torch.inf)


def _entropy(prob_bv: Tensor, log_bv: Tensor) -> Tensor:
    """Of each row's distribution ``[b, 1]``, in nats."""
    return -torch.where(prob_bv > 0, prob_bv * log_bv, 0).sum(-1, keepdim=True)


def keep_typical_p(logits_bv: Tensor, p_b1: Tensor) -> Tensor:
    """Keep the tokens whose ``-log`` probability is nearest to the entropy, up to the one that brings them to ``p``.

    Rows with p = 1 keep all.
    """
    log_bv = logits_bv.log_softmax(-1)
    prob_bv = log_bv.exp()
    entropy_b1 = _entropy(prob_bv, log_bv)
    sorted_bv, order_bv = (-log_bv - entropy_b1).abs().sort(dim=-1)
    # A token that ties with the last one that is needed is kept as well.
    last_b1 = (prob_bv.gather(1, order_bv).cumsum(-1) < p_b1).sum(-1, keepdim=True).clamp(max=logits_bv.shape[1] - 1)
    drop_bv = sorted_bv > sorted_bv.gather(1, last_b1)
    drop_bv = drop_bv.scatter(1, order_bv, drop_bv) & (p_b1 < 1)
    return logits_bv.masked_fill(drop_bv, -torch.inf)


def keep_epsilon(logits_bv: Tensor, epsilon: Tensor | float) -> Tensor:
    """Drop tokens whose probability is below `epsilon`, but for the most likely."""
    drop_bv = (logits_bv.softmax(-1) < epsilon) & (logits_bv < logits_bv.amax(-1, keepdim=True))
    return logits_bv.masked_fill(drop_bv, -torch.inf)


def keep_eta(logits_bv: Tensor, eta_b1: Tensor) -> Tensor:
    """`keep_epsilon` with ``min(eta, sqrt(eta) * exp(-entropy))``: where much is possible, less likely tokens stay."""
    log_bv = logits_bv.log_softmax(-1)
    floor_b1 = eta_b1.sqrt() * (-_entropy(log_bv.exp(), log_bv)).exp()
    return keep_epsilon(logits_bv, torch.minimum(eta_b1, floor_b1))
