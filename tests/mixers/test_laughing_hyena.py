"""What is particular to LaughingHyena: its filters, which are Hyena's otherwise, and a state that doesn't grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.mixers.laughing_hyena import LaughingHyena
from subquad.ops import flashconv

TINY: dict[str, Any] = {"d_model": 6, "modes": 3}


def built(**fields: Any) -> LaughingHyena:
    """In float64, frozen, with every parameter away from its start."""
    mixer = LaughingHyena(LaughingHyena.Config(**TINY | fields)).double().requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("fields", [{}, {"order": 3, "conv_width": 1}, {"n_heads": 2}], ids=str)
def test_equals_long_convolutions_with_its_taps(fields: dict[str, Any]) -> None:
    mixer, t = built(**fields), 90
    x_btd = torch.randn(2, t, 6, dtype=torch.float64)
    k_ngl, direct_ng = mixer.filters.taps(t), mixer.recurrence.direct_ng

    def convolve(n: int, z_btd: Tensor, gate_in: Tensor | None, gate_out: Tensor | None) -> Tensor:
        bias_d = direct_ng[n].repeat_interleave(z_btd.shape[2] // direct_ng.shape[1])
        return flashconv.equation(z_btd, k_ngl[n], bias_d, gate_in_btd=gate_in, gate_out_btd=gate_out)

    layout, state = mixer.dense_layout(x_btd, None), mixer.init_state(2)
    want, _ = mixer.recurrence(x_btd, state.conv_bdw, layout, convolve)
    torch.testing.assert_close(mixer(x_btd), want, rtol=1e-9, atol=1e-10)


def test_taps_are_sums_of_modes_and_a_first_one() -> None:
    made = built(order=3).filters
    for n, g, t in ((0, 0, 0), (1, 5, 1), (0, 2, 40)):
        a_m = torch.exp(torch.complex(-1e-6 - made.log_rate_ngm[n, g].exp(), made.angle_ngm[n, g]))
        want = sum((torch.complex(*r) * a**t).real for r, a in zip(made.residue_ngmp[n, g], a_m, strict=True))
        want = want + made.first_ng[n, g] * (t == 0)
        torch.testing.assert_close(made.taps(41)[n, g, t], want, rtol=1e-10, atol=1e-12)


def test_poles_stay_inside_the_disc_whatever_is_learned() -> None:
    mixer = LaughingHyena(LaughingHyena.Config(**TINY))
    adam = torch.optim.Adam(mixer.filters.parameters(), 1.0)
    for _ in range(20):
        adam.zero_grad()
        (-mixer(torch.randn(1, 30, 6)).square().sum()).backward()  # the larger the better
        adam.step()
    log_a_ngm, _ = mixer.filters()
    assert (log_a_ngm.exp().abs() < 1).all() and (log_a_ngm.exp().abs() > 0.999).any()


def test_a_mode_of_any_rate_is_finite() -> None:
    mixer = LaughingHyena(LaughingHyena.Config(**TINY)).requires_grad_(False)
    for rate in (-500.0, 500.0):
        mixer.filters.log_rate_ngm[..., 0] = rate
        assert mixer(torch.randn(1, 70, 6)).isfinite().all() and mixer.filters.taps(70).isfinite().all()


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_filters_and_modes_stay_in_float32(cast: str) -> None:
    mixer = LaughingHyena(LaughingHyena.Config(**TINY))
    taps = mixer.filters.taps(9)
    getattr(mixer, cast)()
    assert torch.equal(mixer.filters.taps(9), taps)
    low = mixer.recurrence.in_proj.weight.dtype
    y_btd, update = mixer.read(torch.randn(2, 5, 6).to(low), mixer.init_state(2))
    after = update.commit(torch.tensor([3, 0]))
    assert (y_btd.dtype, after.modal_bndmp.dtype, after.conv_bdw.dtype) == (low, torch.float32, low)


def test_state_has_the_documented_size() -> None:
    mixer = LaughingHyena(LaughingHyena.Config(**TINY, order=3)).bfloat16()
    assert mixer.init_state(3, 10**6, device="meta").nbytes == 3 * (4 * 2 * 6 * 3 * 2 + 2 * 4 * 6 * 2)
    heads = LaughingHyena(LaughingHyena.Config(**TINY, n_heads=2))
    assert heads.init_state(1, device="meta").nbytes == 4 * (2 * 3 * 3 * 3 * 2 + 3 * 6 * 2)


def test_bad_configs_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="modes=0 must be at least 1"):
        LaughingHyena.Config(d_model=6, modes=0)
    with pytest.raises(ConfigError, match="needs order=2, got 3"):
        LaughingHyena(LaughingHyena.Config(d_model=6, modes=2, n_heads=2, order=3))
