"""Triton: the loss of each row of logits, and in their place its gradient; two passes over a row, nothing kept."""

import triton
import triton.language as tl


@triton.jit
def _start():
    """Before a row: a maximum below every logit, yet finite, so that two of them differ by 0 and not by NaN."""
    return tl.full((), -3.0e38, tl.float32), tl.zeros((), tl.float32)


@triton.jit
def _grow(top, total, x):
    """Maximum and ``sum exp(x - maximum)`` of a row, a block of it further (arXiv 1805.02867, algorithm 3)."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit
def kl_rows(logits, target, scored, loss, stride_logits, stride_target, v, BLOCK: tl.constexpr):
    """``KL(softmax(target) || softmax(logits))`` of a row, and its gradient ``q - p`` in the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    target += row * stride_target
    at = tl.arange(0, BLOCK)
    # The second pass goes backwards, to meet first what the cache still holds.
    last = (v - 1) // BLOCK * BLOCK
    if tl.load(scored + row) == 0:
        for start in range(0, v, BLOCK):
            tl.store(logits + start + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + at < v)
        tl.store(loss + row, 0.0)
    else:
        top_q, sum_q = _start()
        top_p, sum_p = _start()
        for start in range(0, v, BLOCK):
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            y = tl.load(target + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            top_q, sum_q = _grow(top_q, sum_q, x)
            top_p, sum_p = _grow(top_p, sum_p, y)
        lse_q = top_q + tl.log(sum_q)
        lse_p = top_p + tl.log(sum_p)
        total = tl.zeros((BLOCK,), tl.float32)
        for back in range(0, v, BLOCK):
            start = last - back
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float32) - lse_q
            y = tl.load(target + start + at, mask=inside, other=-float("inf")).to(tl.float32) - lse_p
            q = tl.exp(x)
            p = tl.exp(y)
            # q - p sums to nothing, and takes away what the rounding of both normalisers does to the first order.
            total += tl.where(p == 0, 0.0, p * (y - x)) + (q - p)
            tl.store(logits + start + at, (q - p).to(logits.dtype.element_ty), mask=inside)
        tl.store(loss + row, tl.sum(total, 0))


@triton.jit
def cross_entropy_rows(logits, labels, scored, loss, stride_logits, v, BLOCK: tl.constexpr):
    """``-log softmax(logits)[label]`` of a row, and its gradient ``q - [v = label]`` in the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    at = tl.arange(0, BLOCK)
    # The second pass goes backwards, to meet first what the cache still holds.
    last = (v - 1) // BLOCK * BLOCK
    if tl.load(scored + row) == 0:
        for start in range(0, v, BLOCK):
            tl.store(logits + start + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + at < v)
        tl.store(loss + row, 0.0)
    else:
        label = tl.load(labels + row)
        top, total = _start()
        for start in range(0, v, BLOCK):
            x = tl.load(logits + start + at, mask=start + at < v, other=-float("inf")).to(tl.float32)
            top, total = _grow(top, total, x)
        lse = top + tl.log(total)
        chosen = tl.zeros((BLOCK,), tl.float32)
        for back in range(0, v, BLOCK):
            start = last - back
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float32) - lse
            own = start + at == label
            chosen -= tl.where(own, x, 0.0)
            tl.store(logits + start + at, (tl.exp(x) - own.to(tl.float32)).to(logits.dtype.element_ty), mask=inside)
        # No label of these is no loss, and not 0.
        tl.store(loss + row, tl.where((label >= 0) & (label < v), tl.sum(chosen, 0), float("nan")))
