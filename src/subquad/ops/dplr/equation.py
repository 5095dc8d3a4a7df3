"""A state space with a diagonal plus low-rank matrix as a loop over tokens, with dense matrices: the oracle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops import chunks, lti
from subquad.ops import step as one_step


class System(NamedTuple):
    """``dx/dt = (diag(poles) - low low*) x + input u``, ``y = output x``, for g groups.

    All but the step are complex ``[g, n]`` and one half of conjugate pairs: the state has 2 n coordinates, x and its
    conjugate, so that ``low* x`` and ``y`` are ``2 Re`` of the halves' products. With real parts of the poles below 0
    the matrix takes length from every state, whatever the rest is: no step of any size lets it grow.

    Attributes:
        poles_gn: the diagonal.
        low_gn: the vector of the low-rank part.
        input_gn: B.
        output_gn: C.
        step_g: time between tokens.
    """

    poles_gn: Tensor
    low_gn: Tensor
    input_gn: Tensor
    output_gn: Tensor
    step_g: Tensor

    def to(self, dtype: torch.dtype) -> System:
        """In another real dtype and the complex one that belongs to it."""
        poles_gn, low_gn, input_gn, output_gn = (x.to(lti.complex_of(dtype)) for x in self[:4])
        return System(poles_gn, low_gn, input_gn, output_gn, self.step_g.to(dtype))


def dense(system: System) -> tuple[Tensor, Tensor, Tensor]:
    """The continuous system in real coordinates, all real parts before all imaginary ones: A, B and C.

    Returns:
        ``[g, 2 n, 2 n]``, ``[g, 2 n]``, ``[g, 2 n]``.
    """
    real_gnn, imag_gnn = torch.diag_embed(system.poles_gn.real), torch.diag_embed(system.poles_gn.imag)
    upper_gnp, lower_gnp = torch.cat((real_gnn, -imag_gnn), dim=-1), torch.cat((imag_gnn, real_gnn), dim=-1)
    low_gp, input_gp, output_gp = (torch.cat((x.real, x.imag), dim=-1) for x in system[1:4])
    a_gpp = torch.cat((upper_gnp, lower_gnp), dim=-2) - 2 * low_gp[..., :, None] * low_gp[..., None, :]
    sign_p = torch.ones_like(output_gp[0])
    sign_p[len(sign_p) // 2 :] = -1
    return a_gpp, input_gp, 2 * sign_p * output_gp


def bilinear(system: System) -> tuple[Tensor, Tensor, Tensor]:
    """`dense`, discretised by the trapezoidal rule (2111.00396, equation 3), with a solve of the whole matrix."""
    a_gpp, b_gp, c_gp = dense(system)
    half_g11 = system.step_g[:, None, None] / 2
    one_pp = torch.eye(a_gpp.shape[-1], dtype=a_gpp.dtype, device=a_gpp.device)
    both_gpq = torch.cat((one_pp + half_g11 * a_gpp, 2 * half_g11 * b_gp[..., None]), dim=-1)
    made_gpq = torch.linalg.solve(one_pp - half_g11 * a_gpp, both_gpq)
    return made_gpq[..., :-1], made_gpq[..., -1], c_gp


def step(system: System) -> one_step.Table:
    """`subquad.ops.step.table` of the discrete system, worked out in the widest dtype of the device.

    Woodbury's identity (2111.00396, appendix C.2), with all that no state enters worked out beforehand: what the
    low-rank part sees before and behind the diagonal is one sum over the state, and what it sees of the input goes
    into the input's own factor.
    """
    narrow, system = system.step_g.dtype, system.to(chunks.wide(system.step_g))
    half_g1 = system.step_g[:, None] / 2
    implicit_gn, back_gn = 1 / (1 - half_g1 * system.poles_gn), system.low_gn.conj()
    keep_gn, low_gn = implicit_gn * (1 + half_g1 * system.poles_gn), half_g1 * implicit_gn * system.low_gn
    input_gn = 2 * half_g1 * implicit_gn * system.input_gn
    share_g1 = 1 / (1 + 2 * (back_gn * low_gn).sum(-1, keepdim=True).real)
    sees_gn = 2 * share_g1 * back_gn * (1 + keep_gn)
    input_gn = input_gn - low_gn * share_g1 * 2 * (back_gn * input_gn).sum(-1, keepdim=True).real
    return one_step.table(keep_gn, input_gn, 2 * system.output_gn, low_gn, sees_gn).to(narrow)


def equation(
    u_btd: Tensor,
    system: System,
    state_bdnp: Tensor,
    *,
    valid_bt: Tensor | None = None,
    documents_bt: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """S4 as its equation (2111.00396, equations 1 and 3), a loop over tokens; the oracle.

    ``x_t = A x_{t-1} + B u_t``, ``y_t = C x_t`` in every channel, with A and B of `bilinear`.

    Args:
        u_btd: inputs; ``d / g`` channels in succession share a system.
        system: continuous.
        state_bdnp: before the first token, half of the conjugate pairs, real and imaginary part along p.
        valid_bt: True where a token stands, first in every row; elsewhere the state passes unchanged and the output
            means nothing.
        documents_bt: document of each token, never decreasing; document 0 continues `state_bdnp`, a later one starts
            from zero.
        dtype: real dtype of arithmetic and state; None is the widest of the arguments, at least float32.

    Returns:
        Outputs ``[b, t, d]`` in the dtype of the inputs, and the state after the last token in `dtype`.
    """
    dtype = dtype or chunks.compute_dtype(u_btd, system.step_g, state_bdnp)
    a_gpp, b_gp, c_gp = bilinear(system.to(dtype))
    (given_btd,) = chunks.blank(valid_bt, u_btd.to(dtype))
    documents_bt = chunks.settle(documents_bt, valid_bt)
    g, outputs = len(system.step_g), list[Tensor]()
    state_gbrp = lti.grouped(state_bdnp.to(dtype), g)
    for t in range(u_btd.shape[1]):
        if documents_bt is not None:
            before_b = documents_bt[:, t - 1] if t > 0 else torch.zeros_like(documents_bt[:, 0])
            state_gbrp = state_gbrp.masked_fill((documents_bt[:, t] != before_b)[:, None, None], 0)
        u_gbr1 = given_btd[:, t].unflatten(1, (g, -1)).transpose(0, 1)[..., None]
        after_gbrp = state_gbrp @ a_gpp[:, None].mT + u_gbr1 * b_gp[:, None, None]
        state_gbrp = after_gbrp if valid_bt is None else torch.where(valid_bt[:, t, None, None], after_gbrp, state_gbrp)
        outputs.append((state_gbrp * c_gp[:, None, None]).sum(-1).transpose(0, 1).flatten(1))
    y_btd = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u_btd)
    return y_btd.to(u_btd.dtype), lti.by_channel(state_gbrp)
