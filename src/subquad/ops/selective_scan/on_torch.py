"""The selective scan in PyTorch, chunk by chunk, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops import chunks
from subquad.ops.selective_scan.equation import equation


def refusal(*tensors: Tensor) -> str | None:
    """None: it takes everything."""
    return None


def scan(
    u_btd: Tensor,
    dt_btd: Tensor,
    A_dn: Tensor,
    B_btgn: Tensor,
    C_btgn: Tensor,
    D_d: Tensor,
    state_bdn: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`subquad.ops.selective_scan.scan`: decays and inputs of a chunk at once, then one fused product a token.

    Only ``dt A``, at most 0, is exponentiated. States of single tokens live as long as their chunk, in the backward
    too.
    """
    arguments = u_btd, dt_btd, A_dn, B_btgn, C_btgn, D_d, state_bdn
    if u_btd.shape[1] <= 1:
        return equation(*arguments, valid_bt=valid_bt, documents_bt=documents_bt)
    dtype = chunks.compute_dtype(*arguments)
    with torch.autocast(u_btd.device.type, enabled=False):
        u, dt, B, C = (x.to(dtype) for x in chunks.blank(valid_bt, u_btd, dt_btd, B_btgn, C_btgn))
        A, state = A_dn.to(dtype), state_bdn.to(dtype)
        parts = [x.split(chunks.CHUNK, dim=1) for x in (u, dt, B, C)]
        documents_bt = chunks.settle(documents_bt, valid_bt)
        starts: list[Tensor | None] = [None] * len(parts[0])
        if documents_bt is not None:
            starts = list((documents_bt != F.pad(documents_bt[:, :-1], (1, 0))).split(chunks.CHUNK, dim=1))
        outputs: list[Tensor] = []
        for *part, starts_bt in zip(*parts, starts, strict=True):
            y_btd, state = _run(_chunk, len(starts), *part, A, state, starts_bt)
            outputs.append(y_btd)
        y_btd = torch.cat(outputs, dim=1) + D_d.to(dtype) * u
    return y_btd.to(u_btd.dtype), state


def final_state(
    u_btd: Tensor,
    dt_btd: Tensor,
    A_dn: Tensor,
    B_btgn: Tensor,
    state_bdn: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
) -> Tensor:
    """`subquad.ops.selective_scan.final_state` as a sum over each chunk's tokens."""
    dtype = chunks.compute_dtype(u_btd, dt_btd, A_dn, B_btgn, state_bdn)
    with torch.autocast(u_btd.device.type, enabled=False):
        u, dt, B = (x.to(dtype) for x in chunks.blank(valid_bt, u_btd, dt_btd, B_btgn))
        A, state = A_dn.to(dtype), state_bdn.to(dtype, copy=True)
        if u.shape[1] == 0:
            return state
        documents_bt = chunks.settle(documents_bt, valid_bt)
        if documents_bt is not None:
            u = u.masked_fill((documents_bt != documents_bt[:, -1:])[..., None], 0)
            state = state.masked_fill((documents_bt[:, -1] != 0)[:, None, None], 0)
        parts = [x.split(chunks.CHUNK, dim=1) for x in (u, dt, B)]
        for part in zip(*parts, strict=True):
            state = _run(_after, len(parts[0]), *part, A, state)
    return state


def _run(function: Callable[..., Any], n: int, *arguments: Tensor | None) -> Any:
    """One of `n` chunks; where there are several, what it makes on the way is made again in the backward."""
    if n == 1 or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _chunk(
    u_btd: Tensor, dt_btd: Tensor, B_btgn: Tensor, C_btgn: Tensor, A_dn: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs without D, and the state after a chunk."""
    g = B_btgn.shape[2]
    decay_btdn = (dt_btd[..., None] * A_dn).exp()
    if starts is not None:
        decay_btdn = decay_btdn.masked_fill(starts[..., None, None], 0)
    added_btdn = ((dt_btd * u_btd).unflatten(2, (g, -1))[..., None] * B_btgn[:, :, :, None]).flatten(2, 3)
    states: list[Tensor] = []
    for decay_bdn, added_bdn in zip(decay_btdn.unbind(1), added_btdn.unbind(1), strict=True):
        state = torch.addcmul(added_bdn, decay_bdn, state)
        states.append(state)
    states_btgkn = torch.stack(states, dim=1).unflatten(2, (g, -1))
    return (states_btgkn @ C_btgn[..., None]).squeeze(-1).flatten(2), state


def _after(u_btd: Tensor, dt_btd: Tensor, B_btgn: Tensor, A_dn: Tensor, state: Tensor) -> Tensor:
    """The state after a chunk."""
    g, dtype = B_btgn.shape[2], A_dn.dtype
    # Steps behind each token, summed from the end, so that the nearest are the most exact.
    behind_btd = F.pad(dt_btd[:, 1:], (0, 0, 0, 1)).to(chunks.wide(dt_btd)).flip(1).cumsum(1).flip(1).to(dtype)
    whole_bd = behind_btd[:, 0] + dt_btd[:, 0]
    weight_btgkn = (behind_btd[..., None] * A_dn).exp().unflatten(2, (g, -1))
    written_btgk1 = (dt_btd * u_btd).unflatten(2, (g, -1))[..., None]
    added_bdn = (weight_btgkn * written_btgk1 * B_btgn[:, :, :, None]).sum(1).flatten(1, 2)
    return torch.addcmul(added_bdn, (whole_bd[..., None] * A_dn).exp(), state)
