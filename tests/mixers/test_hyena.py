"""What is particular to Hyena: its recurrence, its filters, and where they end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.mixers.hyena import Hyena

TINY: dict[str, Any] = {"d_model": 6, "max_len": 40, "bands": 3, "filter_width": 8}


def built(**fields: Any) -> Hyena:
    """In float64, frozen, with every parameter away from its start."""
    mixer = Hyena(Hyena.Config(**TINY | fields)).double().requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def projections(mixer: Hyena, x_td: Tensor) -> list[Tensor]:
    """v and the gates by hand."""
    recurrence = mixer.recurrence
    inputs_td = F.pad(recurrence.in_proj(x_td), (0, 0, recurrence.conv_weight.shape[1] - 1, 0))
    taps_td = (inputs_td[j : j + len(x_td)] * w for j, w in enumerate(recurrence.conv_weight.unbind(1)))
    return list((sum(taps_td) + recurrence.conv_bias).chunk(mixer.config.order + 1, dim=1))


def filters(mixer: Hyena, length: int) -> Tensor:
    """The network by hand, one position after the other, ``[convolutions, heads, length]``."""
    made, out = mixer.filters, []
    for t in range(length):
        at = t / mixer.config.max_len
        phases = [
            2 * math.pi * f * at for f in torch.linspace(1e-4, made.bands - 1, made.bands, dtype=torch.float64).tolist()
        ]
        x = torch.tensor([at, *map(math.cos, phases), *(-math.sin(p) for p in phases)], dtype=torch.float64)
        for layer in made.layers[:-1]:
            x = torch.sin(made.frequency_w * layer(x))
        out.append(made.layers[-1](x).view(made.shape) * torch.exp(-made.log_rate_ng.exp() * at))
    return torch.stack(out, dim=-1)


def convolved(z_td: Tensor, h_dl: Tensor, direct_d: Tensor) -> Tensor:
    t = len(z_td)
    rows = [sum(h_dl[:, i - j] * z_td[j] for j in range(i + 1)) + direct_d * z_td[i] for i in range(t)]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "fields", [{}, {"order": 4}, {"conv_width": 1, "filter_layers": 2, "learned_decay": True}], ids=str
)
def test_equals_the_papers_recurrence(fields: dict[str, Any]) -> None:
    mixer = built(**fields)
    x_td = torch.randn(17, 6, dtype=torch.float64)
    z, *gates = projections(mixer, x_td)
    for h, gate, direct in zip(filters(mixer, 17), gates[:-1], mixer.recurrence.direct_ng, strict=True):
        z = convolved(gate * z, h, direct)
    want = mixer.recurrence.out_proj(gates[-1] * z)
    torch.testing.assert_close(mixer(x_td[None])[0], want, rtol=1e-9, atol=1e-10)


def test_heads_convolve_outer_products() -> None:
    mixer = built(n_heads=2)
    x_td = torch.randn(11, 6, dtype=torch.float64)
    v, k, q = (x.view(11, 2, 3) for x in projections(mixer, x_td))
    h, direct = filters(mixer, 11)[0], mixer.recurrence.direct_ng[0]
    want = torch.zeros(11, 2, 3, dtype=torch.float64)
    for head in range(2):
        outer = (k[:, head, :, None] * v[:, head, None, :]).flatten(1)
        summed = convolved(outer, h[head].expand(9, -1), direct[head].expand(9)).view(11, 3, 3)
        want[:, head] = (q[:, head, None] @ summed)[:, 0]
    want = mixer.recurrence.out_proj(want.flatten(1))
    torch.testing.assert_close(mixer(x_td[None])[0], want, rtol=1e-9, atol=1e-10)


def test_filters_of_any_length_begin_alike_and_windows_decay_as_said() -> None:
    mixer = built()
    for length in (1, 7, 40):
        torch.testing.assert_close(mixer.filters(length), mixer.filters(40)[..., :length], rtol=1e-11, atol=1e-12)
    rate_g = Hyena(Hyena.Config(**TINY)).filters.log_rate_ng[0].exp()
    # Slowest to fastest: a hundredth behind 1.5 contexts, and behind 0.3.
    torch.testing.assert_close((-rate_g[[0, -1]] * torch.tensor([1.5, 0.3])).exp(), torch.tensor([0.01, 0.01]))


def test_filters_are_made_anew_when_a_weight_has_changed() -> None:
    mixer = built()
    before = mixer.filters(20)
    assert mixer.filters(20).data_ptr() == before.data_ptr()
    with torch.inference_mode():
        assert torch.equal(mixer.filters(5), before[..., :5])
    mixer.filters.layers[0].weight.mul_(1.5)
    assert not torch.equal(mixer.filters(20), before)
    mixer.filters.layers[0].weight.div_(1.5)
    mixer.filters.load_state_dict({n: 2 * x for n, x in mixer.filters.state_dict().items()})
    after = mixer.filters(20)
    assert not torch.equal(after, before)
    x_btd = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    mixer(x_btd).sum().backward()  # through filters kept before, frozen ones too
    assert x_btd.grad is not None and x_btd.grad.isfinite().all()


def test_filters_stay_in_float32() -> None:
    mixer = Hyena(Hyena.Config(**TINY)).bfloat16()
    assert {p.dtype for p in mixer.filters.parameters()} == {torch.float32}
    assert mixer.recurrence.in_proj.weight.dtype == mixer.init_state(1, 4).inputs_bnsd.dtype == torch.bfloat16
    assert mixer(torch.randn(1, 5, 6).bfloat16()).dtype == torch.bfloat16
    assert mixer.double().filters.frequency_w.dtype == torch.float64


def test_a_learned_window_learns_and_a_fixed_one_does_not() -> None:
    for learned in (True, False):
        mixer = Hyena(Hyena.Config(**TINY, learned_decay=learned))
        mixer(torch.randn(1, 9, 6)).square().sum().backward()
        assert ("filters.log_rate_ng" in dict(mixer.named_parameters())) == learned
        assert all(p.grad is not None and p.grad.norm() > 0 for p in mixer.parameters())


def test_beyond_its_filters_it_says_so() -> None:
    mixer = Hyena(Hyena.Config(**TINY))
    with pytest.raises(ConfigError, match="at most max_len=40 tokens.* got 41; build it with a larger max_len"):
        mixer(torch.randn(1, 41, 6))
    with pytest.raises(ConfigError, match="got 100"):
        mixer.init_state(1, 100)
    _, update = mixer.read(torch.randn(2, 5, 6), mixer.init_state(2, 4))
    with pytest.raises(ConfigError, match="capacity=4 tokens, got 5"):
        update.commit()
    assert update.commit(torch.tensor([4, 0])).seen_b.tolist() == [4, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": 1}, "order=1 must be at least 2"),
        ({"n_heads": 4}, "d_model=6 must be a multiple of n_heads=4"),
        ({"n_heads": 3, "order": 3}, "needs order=2, got 3"),
        ({"conv_width": 0}, "conv_width=0 must be at least 1"),
        ({"filter_layers": 1}, "filter_layers=1 must be at least 2"),
    ],
)
def test_bad_configs_say_what_to_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hyena(Hyena.Config(**TINY | fields))


def test_state_has_the_documented_size() -> None:
    mixer = Hyena(Hyena.Config(**TINY, order=3)).bfloat16()
    assert mixer.init_state(3, 30, device="meta").nbytes == 3 * (2 * (2 * 30 * 6 + 4 * 6 * 2) + 8)
    heads = Hyena(Hyena.Config(**TINY, n_heads=2))
    assert heads.init_state(1, 30, device="meta").nbytes == 4 * (30 * 2 * 3 * 3 + 3 * 6 * 2) + 8
