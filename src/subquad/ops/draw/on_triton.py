"""Draws by two Triton launches, which never write the noise."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from subquad.ops import launch, overlap
from subquad.ops.draw.kernels import best_kernel, guess_kernel, token_kernel, uniform_kernel

# Tokens of a program, and how many programs a GPU has processors for.
FEWEST, MOST = 512, 2048
PROCESSORS = 128
# Scores of a row's shares that one warp compares.
ONE_WARP = 1024


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernels can't run."""
    if not tensors[0].is_floating_point():
        return launch.no_kernels(tensors[0].device)
    return launch.refusal(*tensors, widths=())


def share(rows: int, width: int) -> int:
    """Tokens of a program, of rows that programs share: fewer where all processors would not have some."""
    return min(max(triton.next_power_of_2(rows * width // PROCESSORS), FEWEST), MOST)


def draw(
    logits_btv: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor, temperature_b: Tensor | None, *, draws: bool,
    stream: int,
) -> Tensor:  # fmt: skip
    """`subquad.ops.draw.draw`."""
    logits_btv = logits_btv if logits_btv.stride(-1) == 1 else logits_btv.contiguous()
    of_rows = launch.contiguous(greedy_b, seed_b, step_b, temperature_b)
    return _draw(logits_btv, None, None, *of_rows, draws, stream)[0]


def agree(
    logits_btv: Tensor, guesses_bk: Tensor, length_b: Tensor, greedy_b: Tensor, seed_b: Tensor, step_b: Tensor,
    temperature_b: Tensor | None, *, draws: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`subquad.ops.draw.agree`."""
    logits_btv, guesses_bk = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits_btv, guesses_bk))
    of_rows = launch.contiguous(length_b, greedy_b, seed_b, step_b, temperature_b)
    return _draw(logits_btv, guesses_bk, *of_rows, draws, 0)


@torch.library.custom_op("subquad::draw", mutates_args=())
@launch.guarded
def _draw(
    logits: Tensor, guesses: Tensor | None, length: Tensor | None, greedy: Tensor, seed: Tensor, step: Tensor,
    temperature: Tensor | None, draws: bool, stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tokens, and how many of them count."""
    b, t = logits.shape[:2]
    token, n = (torch.empty(*shape, dtype=torch.int64, device=logits.device) for shape in ((b, t), (b,)))
    if b * t == 0:
        return token, n
    score, at, shares = _best(logits, greedy, seed, step, None, temperature, 0, draws, stream, None)
    k, bt, bs = 0 if guesses is None else guesses.shape[1], triton.next_power_of_2(t), triton.next_power_of_2(shares)
    # What is absent has its place taken by something that no branch reads.
    judged = (at, at, 0) if guesses is None or not k else (guesses, length, guesses.stride(0))
    kernel: Any = token_kernel[(b,)]
    kernel(
        score, at, *judged, token, n,
        T=t, K=k, SHARES=shares, BT=bt, BS=bs, num_warps=1 if bt * bs <= ONE_WARP else 4,
        **overlap.options(logits.device),
    )  # fmt: skip
    return token, n


@_draw.register_fake
def _(
    logits: Tensor, guesses: Tensor | None, length: Tensor | None, greedy: Tensor, seed: Tensor, step: Tensor,
    temperature: Tensor | None, draws: bool, stream: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    token = logits.new_empty(logits.shape[:2], dtype=torch.int64)
    return token, token.new_empty(len(token))


def guess_(
    tokens_bk: Tensor, q_bkm: Tensor | None, at: int, logits_bm: Tensor, greedy_b: Tensor, seed_b: Tensor,
    step_b: Tensor, ids_m: Tensor | None, temperature_b: Tensor | None, *, draws: bool, stream: int,
) -> None:  # fmt: skip
    """`subquad.ops.draw.guess_`."""
    launch.writable(tokens_bk=tokens_bk, q_bkm=q_bkm)
    logits_bm = logits_bm if logits_bm.stride(-1) == 1 else logits_bm.contiguous()
    others = launch.contiguous(greedy_b, seed_b, step_b, ids_m, temperature_b)
    _guess(tokens_bk, q_bkm, at, logits_bm, *others, draws, stream)


@torch.library.custom_op("subquad::guess", mutates_args=("tokens", "q"))
@launch.guarded
def _guess(
    tokens: Tensor, q: Tensor | None, column: int, logits: Tensor, greedy: Tensor, seed: Tensor, step: Tensor,
    ids: Tensor | None, temperature: Tensor | None, draws: bool, stream: int,
) -> None:  # fmt: skip
    b, m = logits.shape
    if b == 0:
        return
    sums = None if q is None else launch.scratch(2, b, triton.cdiv(m, share(b, m)), like=logits, dtype=torch.float32)
    score, at, shares = _best(logits[:, None], greedy, seed, step, ids, temperature, column, draws, stream, sums)
    top, total = (score, score) if sums is None else sums
    # What is absent has its place taken by something that no branch reads.
    strides = (0, 0) if q is None else q.stride()[:2]
    parts = 1 if q is None else shares
    kernel: Any = guess_kernel[(b * parts,)]
    kernel(
        logits, at if ids is None else ids, score if temperature is None else temperature, greedy, score, at, top,
        total, tokens, score if q is None else q, m, column, logits.stride(0), tokens.stride(0), *strides,
        PARTS=parts, SHARES=shares, BS=triton.next_power_of_2(shares), PROBABILITIES=q is not None,
        NAMED=ids is not None, TEMPERED=temperature is not None, BM=share(b, m), num_warps=1 if q is None else 4,
        **overlap.options(logits.device),
    )  # fmt: skip


@_guess.register_fake
def _(
    tokens: Tensor, q: Tensor | None, column: int, logits: Tensor, greedy: Tensor, seed: Tensor, step: Tensor,
    ids: Tensor | None, temperature: Tensor | None, draws: bool, stream: int,
) -> None:  # fmt: skip
    return None


def _best(
    logits: Tensor, greedy: Tensor, seed: Tensor, step: Tensor, ids: Tensor | None, temperature: Tensor | None,
    ahead: int, draws: bool, stream: int, sums: Tensor | None,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Best scores of all rows' shares, where they are, and how many shares a row has."""
    b, t, v = logits.shape
    size = share(b * t, v)
    shares = triton.cdiv(v, size)
    score = launch.scratch(b * t, shares, like=logits, dtype=torch.float32)
    at = launch.scratch(b * t, shares, like=logits, dtype=torch.int32)
    top, total = (score, score) if sums is None else sums
    kernel: Any = best_kernel[(b * t * shares,)]
    kernel(
        logits, at if ids is None else ids, score if temperature is None else temperature, greedy, seed, step, score,
        at, top, total, v, ahead, *logits.stride()[:2],
        T=t, SHARES=shares, DRAWS=draws, STREAM=stream, NAMED=ids is not None, TEMPERED=temperature is not None,
        SUMS=sums is not None, BV=size, num_warps=4, **overlap.options(logits.device),
    )  # fmt: skip
    return score, at, shares


def uniform(seed_b: Tensor, step_b: Tensor, stream: int) -> Tensor:
    """`subquad.ops.draw.uniform`."""
    return _uniform(seed_b.contiguous(), step_b.contiguous(), stream)


@torch.library.custom_op("subquad::uniform", mutates_args=())
@launch.guarded
def _uniform(seed: Tensor, step: Tensor, stream: int) -> Tensor:
    out = torch.empty(seed.shape, dtype=torch.float32, device=seed.device)
    if len(seed):
        kernel: Any = uniform_kernel[(len(seed),)]
        kernel(seed, step, out, STREAM=stream, num_warps=1, **overlap.options(seed.device))
    return out


@_uniform.register_fake
def _(seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return seed.new_empty(seed.shape, dtype=torch.float32)
