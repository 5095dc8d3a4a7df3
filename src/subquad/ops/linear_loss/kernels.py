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
def kl_rows(
    logits,
    target,
    scored,
    loss,
    temperature,
    reverse,
    stride_logits,
    stride_target,
    v,
    TEMPERED: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``T^2 ((1 - r) KL(p || q) + r KL(q || p))`` of a row, and its gradient in the place of the logits of q.

    TEMPERED, FORWARD and REVERSE say whether T is not 1, r not 1 and r not 0.
    """
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
        cold = 1.0 / temperature
        top_q, sum_q = _start()
        top_p, sum_p = _start()
        # sum exp(x - top_q) (x - y), for KL(q || p) = gap / sum_q - log of both normalisers' quotient.
        gap = tl.zeros((), tl.float32)
        for start in range(0, v, BLOCK):
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            y = tl.load(target + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            if TEMPERED:
                x *= cold
                y *= cold
            if REVERSE:
                new = tl.maximum(top_q, tl.max(x, 0))
                gap = gap * tl.exp(top_q - new) + tl.sum(_term(tl.exp(x - new), x - y), 0)
            top_q, sum_q = _grow(top_q, sum_q, x)
            top_p, sum_p = _grow(top_p, sum_p, y)
        lse_q = top_q + tl.log(sum_q)
        lse_p = top_p + tl.log(sum_p)
        own = gap / sum_q - (lse_q - lse_p)
        total = tl.zeros((BLOCK,), tl.float32)
        for back in range(0, v, BLOCK):
            start = last - back
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            y = tl.load(target + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            if TEMPERED:
                x *= cold
                y *= cold
            x -= lse_q
            y -= lse_p
            q = tl.exp(x)
            p = tl.exp(y)
            # q - p sums to nothing, and takes away what the rounding of both normalisers does to the first order.
            if FORWARD:
                term = _term(p, y - x) + (q - p)
                grad = q - p
            if REVERSE:
                back_term = _term(q, x - y) + (p - q)
                back_grad = _term(q, x - y - own)
                if FORWARD:
                    term = (1 - reverse) * term + reverse * back_term
                    grad = (1 - reverse) * grad + reverse * back_grad
                else:
                    term = back_term
                    grad = back_grad
            if TEMPERED:
                grad *= temperature
            total += term
            tl.store(logits + start + at, grad.to(logits.dtype.element_ty), mask=inside)
        result = tl.sum(total, 0)
        if TEMPERED:
            result *= temperature * temperature
        tl.store(loss + row, result)


@triton.jit
def _term(p, x):
    """``p x``: 0 where p is, even if x is infinite there."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def tail_rows(logits, top, p_tail, scored, tail, stride_logits, v, BLOCK: tl.constexpr):
    """``log sum exp`` of a row, where a few logits are minus infinity and have ``log sum exp`` `top` themselves.

    In the place of the logits: ``softmax(logits) (q_tail - p_tail)``, where ``q_tail`` is the share of this row's sum.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    at = tl.arange(0, BLOCK)
    # The second pass goes backwards, to meet first what the cache still holds.
    last = (v - 1) // BLOCK * BLOCK
    if tl.load(scored + row) == 0:
        for start in range(0, v, BLOCK):
            tl.store(logits + start + at, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + at < v)
        tl.store(tail + row, 0.0)
    else:
        highest, total = _start()
        for start in range(0, v, BLOCK):
            x = tl.load(logits + start + at, mask=start + at < v, other=-float("inf")).to(tl.float32)
            highest, total = _grow(highest, total, x)
        lse = highest + tl.log(total)
        # 1 / (1 + exp(top - lse)) would overflow where little is left.
        above = tl.maximum(highest, tl.load(top + row))
        q_tail = tl.exp(lse - above) / (tl.exp(lse - above) + tl.exp(tl.load(top + row) - above))
        weight = q_tail - tl.load(p_tail + row)
        # Of nothing left, every share is 0.
        base = tl.where(lse == -float("inf"), 0.0, lse)
        for back in range(0, v, BLOCK):
            start = last - back
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float32)
            tl.store(logits + start + at, (tl.exp(x - base) * weight).to(logits.dtype.element_ty), mask=inside)
        tl.store(tail + row, lse)


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
