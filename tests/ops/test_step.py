"""One token through linear state spaces: as the equations say, and the kernels as PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from subquad.core.errors import ConfigError
from subquad.mixers.s4 import DiagonalPlusLowRank
from subquad.ops import backends, dplr, modal, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
both = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
B, D, G, N = 10, 12, 6, 5


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def modes() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.complex(-torch.rand(G, N, device=DEVICE), 3 * drawn(G, N)), torch.complex(drawn(G, N), drawn(G, N))


@pytest.mark.parametrize("low", [False, True], ids=["diagonal", "low rank"])
@both
def test_a_step_is_the_equation_of_one_token(backend: str, low: bool) -> None:
    u_bd, state = drawn(B, D), drawn(B, D, N, 2)
    if low:
        system = DiagonalPlusLowRank(G, 2 * N, n_ssm=2, dt_min=0.01, dt_max=0.5).to(DEVICE).requires_grad_(False)
        table = system.step()
        want_btd, end = dplr.equation(u_bd[:, None].double(), system.system(), state.double())
    else:
        log_a, residue = modes()
        table = step.table(log_a.exp(), torch.ones_like(log_a), residue)
        want_btd, end = modal.equation(u_bd[:, None].double(), log_a, residue, state.double())
    kept = torch.tensor([1, 0] * (B // 2), device=DEVICE)
    kept_end = torch.where((kept > 0)[:, None, None, None], end.float(), state)
    rows, skip_d = torch.randperm(B, device=DEVICE), drawn(D, dtype=torch.bfloat16)
    with backends.use(backend):
        y_bd = step.read(u_bd, table, state)
        skipped_bd = step.read(u_bd.bfloat16(), table, state, skip_d, gelu=True)
        elsewhere, there, wider = torch.full_like(state, torch.nan), state.clone(), drawn(B, 2, D, N, 2)
        step.write_(elsewhere, rows, u_bd, table, state, kept)
        step.write_(there, None, u_bd, table, there, kept)
        before, u_wide = wider.clone(), drawn(B, 2 * D, dtype=torch.bfloat16)
        step.write_(wider[:, 1], None, u_wide[:, D:], table, wider[:, 1], kept)
        advanced, both = state.clone(), before.clone()
        at_once_bd = step.advance_(u_bd, table, advanced, kept)
        skipped_at_once_bd = step.advance_(u_wide[:, D:], table, both[:, 1], kept, skip_d, gelu=True)
        apart_bd = step.read(u_wide[:, D:], table, before[:, 1], skip_d, gelu=True)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y_bd, want_btd[:, 0].float(), **close)
    # The input was rounded before, the output behind all: to a neighbour in bfloat16 at most, 2^-7.
    rounded_bd = u_bd.bfloat16().double()
    seen_bd = want_btd[:, 0] + (rounded_bd - u_bd) * table.direct_g.repeat_interleave(D // G)
    torch.testing.assert_close(skipped_bd, F.gelu(seen_bd + skip_d * rounded_bd).bfloat16(), rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(elsewhere[rows], kept_end, **close)
    torch.testing.assert_close(there, kept_end, **close)
    torch.testing.assert_close(at_once_bd, y_bd, **close)
    # Rounded to a neighbour in bfloat16 at most, 2^-7.
    torch.testing.assert_close(skipped_at_once_bd, apart_bd, rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(advanced, there, **close)
    torch.testing.assert_close(both, wider, **close)
    with backends.use("torch"):
        again = before[:, 1].clone()
        step.write_(again, None, u_wide[:, D:].contiguous(), table, again, kept)
    torch.testing.assert_close(wider[:, 1], again, **close)
    assert torch.equal(wider[:, 0], before[:, 0])


def test_a_table_is_made_anew_when_its_weights_change() -> None:
    system = DiagonalPlusLowRank(2, 4, n_ssm=None, dt_min=0.01, dt_max=0.5)
    with torch.no_grad():
        first = system.step()
        assert system.step() is first
        system.log_dt.add_(0.5)
        second = system.step()
    assert not any(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(x.requires_grad for x in system.step())


def test_what_does_not_fit_is_refused() -> None:
    log_a, residue = modes()
    table = step.table(log_a.exp(), torch.ones_like(log_a), residue)
    with pytest.raises(ConfigError, match="state_bdnp"):
        step.read(drawn(B, D), table, drawn(B, D, N + 1, 2))
    with pytest.raises(ConfigError, match="divide d=7"):
        step.read(drawn(B, 7), table, drawn(B, 7, N, 2))
    with pytest.raises(ConfigError, match=f"skip_d: expected a number for each of d={D}"):
        step.read(drawn(B, D), table, drawn(B, D, N, 2), drawn(G))
    with pytest.raises(ConfigError, match="state_bdnp"):
        step.advance_(drawn(B, D), table, drawn(B, D, N + 1, 2), torch.ones(B, dtype=torch.int64, device=DEVICE))
