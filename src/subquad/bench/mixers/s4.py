"""S4's layer against softmax attention's, and the precision of its state against that of modes by eigenvectors."""

from __future__ import annotations

import torch

from subquad.bench import state_spaces
from subquad.bench.harness import Bench
from subquad.mixers.s4 import S4, DiagonalPlusLowRank
from subquad.ops import dplr, modal
from subquad.ops.dplr.equation import bilinear


def errors(system: dplr.System, length: int) -> tuple[float, float]:
    """Error of an impulse response read from a float32 state, of modes and of ours, relative to its largest number.

    The modes are found in float64.
    """
    a_gpp, b_gp, c_gp = bilinear(system)
    values_gp, vectors_gpp = torch.linalg.eig(a_gpp)
    into_gp = torch.linalg.solve(vectors_gpp, b_gp.to(vectors_gpp.dtype))
    residue_gp = (c_gp.to(vectors_gpp.dtype)[:, None] @ vectors_gpp)[:, 0] * into_gp
    one_btd = torch.zeros(1, length, len(b_gp))
    one_btd[:, 0] = 1
    log_a_gp, residue_gp = values_gp.log().to(torch.complex64), residue_gp.to(torch.complex64)
    modes_btd, _ = modal.equation(one_btd, log_a_gp, residue_gp, torch.zeros(1, *b_gp.shape, 2))
    ours_btd, _ = dplr.scan(one_btd, system.to(torch.float32), torch.zeros(1, *system.poles_gn.shape, 2))
    want_btd, _ = dplr.equation(one_btd.double(), system, torch.zeros(1, *system.poles_gn.shape, 2).double())
    by_modes, by_ours = (float((y - want_btd).abs().max() / want_btd.abs().max()) for y in (modes_btd, ours_btd))
    return by_modes, by_ours


def run(bench: Bench) -> None:
    """A SmolLM2-135M-shaped layer with the paper's state of 64; the eigenvectors of its start at several sizes."""
    length = bench.size(1000, smoke=50)
    # On the CPU, where every eigenvector is found in float64.
    for n in (8, 16, 32, 64):
        system = DiagonalPlusLowRank(4, n, n_ssm=None, dt_min=1e-2, dt_max=1e-2).double().requires_grad_(False)
        by_modes, ours = errors(system.system(), length)
        shape = {"n": n, "t": length}
        bench.value(f"error.n{n}", ours, "1", "lower", baseline="modes", baseline_value=by_modes, shape=shape)
    state_spaces.measure(bench, lambda d_model: S4(S4.Config(d_model)), train=1024)
