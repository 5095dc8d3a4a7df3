"""The contract of a mixer, run over every registered one: in whatever pieces it is read, the result is the same.

One whose card says that it looks ahead can't be read in pieces: it says so, and is held to whole texts alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.attention import AttentionStats, AttentionWeights, RotarySpec
from subquad.core.errors import UnsupportedError
from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.core.registry import load, methods
from subquad.core.state import State

from .conftest import CAPACITY, EXACT, block


def test_every_mixer_gives_examples() -> None:
    assert [slug for slug, card in methods("mixers").items() if not card.examples] == []


def read_in_pieces(mixer: Mixer, x_btd: Tensor, cuts: Sequence[int], layout: Layout | None = None) -> Tensor:
    """Read up to each cut and commit, from an empty state."""
    b, t = x_btd.shape[:2]
    layout = Layout.dense(b, t) if layout is None else layout
    state: State = mixer.init_state(b, CAPACITY)
    out: list[Tensor] = []
    for start, stop in zip([0, *cuts], [*cuts, t], strict=True):
        y_btd, update = mixer.read(x_btd[:, start:stop], state, layout.narrow(start, stop))
        state = update.commit()
        out.append(y_btd)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("time", [1, 63, 65, 130])
def test_random_splits_equal_one_shot(mixer: Mixer, time: int) -> None:
    x_btd = block(mixer, 2, time)
    whole_btd = mixer(x_btd)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        cuts = sorted(set(torch.randint(1, max(time, 2), (4,), generator=generator).tolist()) - {time})
        torch.testing.assert_close(read_in_pieces(mixer, x_btd, cuts), whole_btd, **EXACT)


def test_single_steps_equal_one_shot(mixer: Mixer) -> None:
    x_btd = block(mixer, 2, 21)
    torch.testing.assert_close(read_in_pieces(mixer, x_btd, range(1, 21)), mixer(x_btd), **EXACT)


def test_commit_at_every_n_continues_exactly(mixer: Mixer) -> None:
    """Verification of drafts: of a block of 6, keep n per row, then read the true continuation."""
    history, size = 19, 6
    for n in range(size + 1):
        n_b = torch.tensor([n, size - n, 0])
        prompt = block(mixer, 3, history)
        state = mixer.read(prompt, mixer.init_state(3, CAPACITY))[1].commit()
        draft = block(mixer, 3, size, seed=2)
        _, update = mixer.read(draft, state, Layout.dense(3, size, start_b=history))
        after = update.commit(n_b)
        follow = block(mixer, 3, 5, seed=3)
        y_btd, _ = mixer.read(follow, after, Layout.dense(3, 5, start_b=history + n_b))
        for row, kept in enumerate(n_b.tolist()):
            true = torch.cat((prompt[row], draft[row, :kept], follow[row]))[None]
            torch.testing.assert_close(y_btd[row], mixer(true)[0, -5:], **EXACT)


def test_first_block_needs_no_buffers(mixer: Mixer) -> None:
    """A prompt is read from a state without capacity and committed into a pool that has one."""
    pool = mixer.init_state(3, CAPACITY)
    x_btd, n_b = block(mixer, 2, 30), torch.tensor([30, 11])
    _, update = mixer.read(x_btd, mixer.init_state(2), Layout.ragged(n_b, 30))
    mixer.commit_(pool, torch.tensor([2, 0]), update)
    follow = block(mixer, 2, 3, seed=2)
    y_btd, _ = mixer.read(follow, pool.select(torch.tensor([2, 0])), Layout.dense(2, 3, start_b=n_b))
    for row, n in enumerate(n_b.tolist()):
        whole_btd = mixer(torch.cat((x_btd[row, :n], follow[row]))[None])
        torch.testing.assert_close(y_btd[row], whole_btd[0, n:], **EXACT)


def test_read_changes_nothing(mixer: Mixer) -> None:
    state = mixer.read(block(mixer, 2, 11), mixer.init_state(2, CAPACITY))[1].commit()
    before = [t.clone() for _, t in state.tensors()]
    _, update = mixer.read(block(mixer, 2, 9, seed=2), state, Layout.dense(2, 9, start_b=11))
    update.commit(torch.tensor([3, 9]))
    update.tentative()
    for (name, now), then in zip(state.tensors(), before, strict=True):
        assert torch.equal(now, then), name


def test_padded_rows_equal_rows_alone(mixer: Mixer) -> None:
    lengths, time = [70, 1, 0, 33], 70
    x_btd = 30 * block(mixer, 4, time)  # loud padding: whatever leaks is heard
    layout = Layout.ragged(torch.tensor(lengths), time)
    y_btd, update = mixer.read(x_btd, mixer.init_state(4, CAPACITY), layout)
    assert y_btd.isfinite().all()
    state = update.commit()
    follow = block(mixer, 4, 3, seed=5)
    next_btd, _ = mixer.read(follow, state, Layout.dense(4, 3, start_b=torch.tensor(lengths)))
    for row, n in enumerate(lengths):
        alone = mixer(torch.cat((x_btd[row, :n], follow[row]))[None])[0]
        torch.testing.assert_close(y_btd[row, :n], alone[:n], **EXACT)
        torch.testing.assert_close(next_btd[row], alone[n:], **EXACT)


def test_packed_documents_equal_documents_alone(mixer: Mixer) -> None:
    documents = [[5, 66, 1, 20], [40, 2, 3], [92]]
    layout = Layout.packed(documents)
    time = layout.shape[1]
    x_btd = block(mixer, 3, time)
    y_btd = mixer(x_btd, layout)
    cut_btd = read_in_pieces(mixer, x_btd, [3, 5, 45, 72], layout)
    _, update = mixer.read(x_btd, mixer.init_state(3, CAPACITY), layout)
    follow = block(mixer, 3, 4, seed=7)
    lasts = torch.tensor([row[-1] for row in documents])
    next_btd, _ = mixer.read(follow, update.commit(), Layout.dense(3, 4, start_b=lasts))
    for i, row in enumerate(documents):
        at = 0
        for n in row:
            alone = mixer(x_btd[i : i + 1, at : at + n])[0]
            torch.testing.assert_close(y_btd[i, at : at + n], alone, **EXACT)
            torch.testing.assert_close(cut_btd[i, at : at + n], alone, **EXACT)
            at += n
        last = torch.cat((x_btd[i, at - row[-1] : at], follow[i]))[None]
        torch.testing.assert_close(next_btd[i], mixer(last)[0, -4:], **EXACT)


def test_commit_inside_packed_documents(mixer: Mixer) -> None:
    layout = Layout.packed([[5, 3, 6]])
    x_btd = block(mixer, 1, 14)
    prompt = block(mixer, 1, 9, seed=4)
    state = mixer.read(prompt, mixer.init_state(1, CAPACITY))[1].commit()
    shifted = dataclasses.replace(layout, starts_bn=layout.positions_bt + torch.where(layout.documents_bt == 0, 9, 0))
    _, update = mixer.read(x_btd, state, shifted)
    follow = block(mixer, 1, 2, seed=6)
    for n in range(15):
        begin = 0 if n <= 5 else 5 if n <= 8 else 8
        before = torch.cat((prompt[0], x_btd[0, :n])) if n <= 5 else x_btd[0, begin:n]
        y_btd, _ = mixer.read(follow, update.commit(torch.tensor([n])), Layout.dense(1, 2, start_b=len(before)))
        torch.testing.assert_close(y_btd, mixer(torch.cat((before, follow[0]))[None])[:, -2:], **EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_any_course_of_packed_padded_partial_commits_in_place(mixer: Mixer, seed: int) -> None:
    """Rows at different places of different documents, in some rows of a pool: every output is the document's alone."""
    draw = random.Random(seed)
    documents = [[draw.choice([1, 2, 5, 30, 70]) for _ in range(draw.randint(1, 4))] for _ in range(3)]
    packed, rows = Layout.packed(documents), torch.tensor(draw.sample(range(5), 3))
    assert packed.documents_bt is not None
    ends_b, longest = packed.lengths_b, 90
    x_btd = block(mixer, 3, packed.shape[1] + longest)  # what stands behind a piece is its padding
    ends = ((0, longest), "replicate")
    positions_bt = torch.nn.functional.pad(packed.positions_bt[:, None].double(), *ends)[:, 0].long()
    documents_bt = torch.nn.functional.pad(packed.documents_bt[:, None].double(), *ends)[:, 0].long()
    want = [torch.cat([mixer(d[None])[0] for d in x_btd[i, : sum(ns)].split(ns)]) for i, ns in enumerate(documents)]
    pool = mixer.init_state(5, CAPACITY)
    before, at_b = pool.snapshot(), torch.zeros(3, dtype=torch.int64)
    while (at_b < ends_b).any():
        n_b = torch.tensor([draw.choice([0, 1, 3, 17, longest]) for _ in documents]).minimum(ends_b - at_b)
        columns_bt = at_b[:, None] + torch.arange(max(int(n_b.max()), 1))
        last_b1 = torch.where(at_b > 0, documents_bt.gather(1, (at_b - 1).clamp(min=0)[:, None])[:, 0], 0)[:, None]
        layout = Layout(n_b, positions_bt.gather(1, columns_bt), documents_bt.gather(1, columns_bt) - last_b1)
        read_btd = x_btd.gather(1, columns_bt[..., None].expand(-1, -1, x_btd.shape[2]))
        y_btd, update = mixer.read(read_btd, pool.select(rows), layout)
        kept_b = torch.tensor([draw.choice([n, draw.randint(0, n)]) for n in n_b.tolist()])
        mixer.commit_(pool, rows, update, kept_b)
        for i, (at, n) in enumerate(zip(at_b.tolist(), n_b.tolist(), strict=True)):
            torch.testing.assert_close(y_btd[i, :n], want[i][at : at + n], **EXACT)
        at_b = at_b + kept_b
    others = torch.tensor(sorted(set(range(5)) - set(rows.tolist())))
    for (name, now), (_, then) in zip(pool.select(others).tensors(), before.select(others).tensors(), strict=True):
        assert torch.equal(now, then), name


def test_what_comes_later_changes_nothing_before(mixer: Mixer) -> None:
    x_btd = block(mixer, 1, 80)
    other = x_btd.clone()
    other[:, 50:] = block(mixer, 1, 30, seed=9)
    torch.testing.assert_close(mixer(x_btd)[:, :50], mixer(other)[:, :50], **EXACT)


def test_gradients_in_pieces_equal_one_shot(mixer: Mixer) -> None:
    mixer.requires_grad_(True)
    weight = block(mixer, 2, 70, seed=8)
    grads: list[list[Tensor]] = []
    for cuts in ([], [1, 30, 64]):
        x_btd = block(mixer, 2, 70).requires_grad_()
        (read_in_pieces(mixer, x_btd, cuts) * weight).sum().backward()
        assert x_btd.grad is not None
        grads.append([x_btd.grad, *(p.grad.clone() for p in mixer.parameters() if p.grad is not None)])
        mixer.zero_grad()
    assert len(grads[0]) == len(grads[1])
    for one, pieces in zip(*grads, strict=True):
        torch.testing.assert_close(pieces, one, rtol=1e-9, atol=1e-9)


def test_gradient_equals_finite_differences(any_mixer: Mixer) -> None:
    x_btd = block(any_mixer, 1, 12).requires_grad_()
    weight, along = block(any_mixer, 1, 12, seed=8), block(any_mixer, 1, 12, seed=9)
    (any_mixer(x_btd) * weight).sum().backward()
    assert x_btd.grad is not None
    with torch.no_grad():
        step = 1e-5
        difference = ((any_mixer(x_btd + step * along) - any_mixer(x_btd - step * along)) * weight).sum() / (2 * step)
    # Central differences: truncation and cancellation leave about step ** 2 = 1e-10 and 1e-16 / step = 1e-11.
    torch.testing.assert_close((x_btd.grad * along).sum(), difference, rtol=1e-6, atol=1e-7)


def test_rows_of_several_states_go_on_as_one_batch(mixer: Mixer) -> None:
    """Prompts read apart, of different lengths, are one batch from then on."""
    lengths = [3, 40, 1]
    prompts = [block(mixer, 1, n, seed=n) for n in lengths]
    state = State.cat([mixer.read(p, mixer.init_state(1, CAPACITY))[1].commit() for p in prompts])
    assert state.batch == 3
    follow = block(mixer, 3, 5, seed=2)
    y_btd, _ = mixer.read(follow, state, Layout.dense(3, 5, start_b=torch.tensor(lengths)))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(y_btd[row], mixer(torch.cat((prompt[0], follow[row]))[None])[0, -5:], **EXACT)


def test_state_is_select_fork_save_load(mixer: Mixer, tmp_path: Any) -> None:
    state = mixer.read(block(mixer, 2, 9), mixer.init_state(2, CAPACITY))[1].commit()
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert type(loaded) is type(state)
    for (name, a), (_, b) in zip(state.tensors(), loaded.tensors(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype, name
    probe = block(mixer, 1, 3, seed=2)
    y_btd, _ = mixer.read(probe.repeat(4, 1, 1), state.fork(2), Layout.dense(4, 3, start_b=9))
    for row in range(4):
        alone, _ = mixer.read(probe, loaded.select(torch.tensor([row // 2])), Layout.dense(1, 3, start_b=9))
        torch.testing.assert_close(y_btd[row], alone[0], **EXACT)


def test_declared_axes_and_constant_state(request: pytest.FixtureRequest, mixer: Mixer) -> None:
    slug, name = request.node.callspec.params["mixer"]
    card = methods("mixers")[slug]
    sizes = [mixer.init_state(1, n, device="meta").nbytes for n in (1000, 8000)]
    if card.constant_state or name in ("window", "sinks"):
        assert sizes[0] == sizes[1]
    else:
        assert sizes[1] > sizes[0]

    def check(tensor: Tensor, declaration: dict[str, Any]) -> Tensor:
        assert len(declaration["axes"].split()) == tensor.ndim
        assert tensor.is_floating_point() != (declaration["precision"] == "index")
        return tensor

    mixer.init_state(1, 4).map(check)
    half = mixer.init_state(1, 4).to(dtype=torch.bfloat16)
    half.map(lambda t, d: check(t, d) if d["precision"] != "high" else _at_least_float32(t))


def _at_least_float32(tensor: Tensor) -> Tensor:
    assert tensor.dtype == torch.float32
    return tensor


def test_low_precision_stays_near(any_mixer: Mixer) -> None:
    """float32 against float64: both errors come from the same sums, some 1e3 roundings of 6e-8 at most."""
    x_btd = block(any_mixer, 2, 200)
    exact = any_mixer(x_btd)
    single = any_mixer.float()(x_btd.float())
    assert (single - exact).norm() / exact.norm() < 1e-4
    half = any_mixer.to(torch.bfloat16)(x_btd.bfloat16())
    assert half.isfinite().all()
    assert (half - exact).norm() / exact.norm() < 0.1  # 2 ** -8 a rounding, some tens of them in a row


def test_what_looks_ahead_refuses_to_be_read(ahead: Mixer) -> None:
    with pytest.raises(UnsupportedError, match=r"depends on tokens behind it.*; use forward"):
        ahead.read(block(ahead, 1, 1), State())
    x_btd = block(ahead, 1, 30)
    later = x_btd.clone()
    later[:, -1] += 1
    assert (ahead(later) - ahead(x_btd))[:, 0].norm() > 0


def test_what_looks_ahead_sees_no_padding_and_no_other_document(ahead: Mixer) -> None:
    x_btd = 30 * block(ahead, 4, 70)
    lengths, documents = [70, 1, 0, 33], [[5, 61, 4], [40, 2, 3], [70], [1]]
    y_btd, packed_btd = ahead(x_btd, Layout.ragged(torch.tensor(lengths), 70)), ahead(x_btd, Layout.packed(documents))
    assert y_btd.isfinite().all() and packed_btd.isfinite().all()
    for row, parts in enumerate(documents):
        torch.testing.assert_close(y_btd[row, : lengths[row]], ahead(x_btd[row, : lengths[row]][None])[0], **EXACT)
        at = 0
        for n in parts:
            alone = ahead(x_btd[row : row + 1, at : at + n])[0]
            torch.testing.assert_close(packed_btd[row, at : at + n], alone, **EXACT)
            at += n


MAPPED = [slug for slug, card in methods("mixers").items() if card.from_attention]


@pytest.mark.parametrize("slug", MAPPED)
@pytest.mark.parametrize("measured", [False, True])
def test_from_attention_takes_every_kind_of_teacher(slug: str, measured: bool) -> None:
    """Grouped heads, biases, QK norms, RoPE, head_dim != d_model / heads; the source is left as it was."""
    torch.manual_seed(0)
    h, g, k, d = 6, 2, 8, 32
    source = AttentionWeights(
        q_weight=torch.randn(h * k, d) / d**0.5,
        k_weight=torch.randn(g * k, d) / d**0.5,
        v_weight=torch.randn(g * k, d) / d**0.5,
        o_weight=torch.randn(d, h * k) / (h * k) ** 0.5,
        n_heads=h,
        n_kv_heads=g,
        head_dim=k,
        scale=k**-0.5,
        q_bias=torch.randn(h * k),
        k_bias=torch.randn(g * k),
        v_bias=torch.randn(g * k),
        q_norm=1 + 0.1 * torch.randn(k),
        k_norm=1 + 0.1 * torch.randn(k),
        rotary=RotarySpec(10000.0, k),
    )
    before = source.v_weight.clone()
    stats = AttentionStats(torch.linspace(2, 50, h), torch.linspace(0.5, 2, h)) if measured else None
    cls: type[Mixer] = load("mixers", slug)
    mixer = cls.from_attention(source, stats)
    y_btd = mixer(torch.randn(2, 20, d))
    assert y_btd.isfinite().all()
    assert y_btd.norm() > 0
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
    assert torch.equal(source.v_weight, before)
