"""Mixing matrices: what mixers do to values that are given, and their distance without ever building them."""

import itertools

import pytest
import torch

from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.core.registry import load, methods
from subquad.ops import norm
from subquad.ops.attention import expand_heads
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Loop
from subquad.train.optimiser import Rate
from subquad.train.stages.matrix import Matrix, probes, squared_frobenius

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CASES = [
    (slug, name)
    for slug, card in methods("mixers").items()
    if load("mixers", slug).mix_values is not Mixer.mix_values
    for name in card.examples
]


def build(slug, example):
    torch.manual_seed(0)
    cls = load("mixers", slug)
    mixer = cls(config_from_dict(cls.Config, methods("mixers")[slug].examples[example])).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer.requires_grad_(False)


def matrix(mixer, x, layout=None):
    """``[b, h, t, t]``, column by column."""
    b, t, _ = x.shape
    one = torch.eye(t, dtype=x.dtype)[None, :, None].expand(b, t, mixer.config.n_heads, t)
    return mixer.mix_values(x, one, layout).transpose(1, 2)


def finish(mixer, x, y):
    """What a mixer does behind its mixing."""
    if hasattr(mixer, "o_proj"):
        return mixer.o_proj(y.flatten(2))
    z, config = mixer.z_proj(x), mixer.config
    kind = getattr(config, "norm", "before_gate")
    if kind == "none":
        return mixer.out_proj(y.flatten(2) * torch.nn.functional.silu(z))
    groups = config.n_groups if hasattr(config, "norm") and config.n_groups else config.n_heads
    first = kind == "after_gate"
    return mixer.out_proj(norm.gated_rms(y.flatten(2), z, mixer.norm_weight, config.norm_eps, groups, gate_first=first))


def own_values(mixer, x):
    if hasattr(mixer, "o_proj"):
        return mixer.qkv.project(x)[2]
    empty = mixer.init_state(len(x)).conv_bdw
    return mixer.qkv(x, empty, Layout.dense(*x.shape[:2]))[2]


@pytest.mark.parametrize(("slug", "example"), CASES)
def test_mixing_is_a_causal_matrix_and_the_mixer_is_what_stands_around_it(slug, example):
    mixer = build(slug, example)
    x = torch.randn(2, 13, mixer.config.d_model, dtype=torch.float64)
    m = matrix(mixer, x)
    assert torch.equal(m.triu(1), torch.zeros_like(m))
    v = torch.randn(2, 13, mixer.config.n_heads, 5, dtype=torch.float64)
    torch.testing.assert_close(mixer.mix_values(x, v), (m @ v.transpose(1, 2)).transpose(1, 2), **EXACT)
    own = expand_heads(own_values(mixer, x), mixer.config.n_heads)
    torch.testing.assert_close(finish(mixer, x, mixer.mix_values(x, own)), mixer(x), **EXACT)


@pytest.mark.parametrize(("slug", "example"), CASES)
def test_documents_and_padding_stay_apart(slug, example):
    mixer = build(slug, example)
    x = torch.randn(1, 12, mixer.config.d_model, dtype=torch.float64)
    both = matrix(mixer, x, Layout.packed([[5, 7]]))
    assert torch.equal(both[..., 5:, :5], torch.zeros_like(both[..., 5:, :5]))
    torch.testing.assert_close(both[..., :5, :5], matrix(mixer, x[:, :5]), **EXACT)
    torch.testing.assert_close(both[..., 5:, 5:], matrix(mixer, x[:, 5:]), **EXACT)


def test_attention_mixes_by_its_softmax():
    mixer = build("attention", "full")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, _ = mixer.qkv(x, Layout.dense(1, 9))
    for h in range(4):
        scores = (mixer.scale * q[0, :, h] @ k[0, :, h // 2].T).masked_fill(
            ~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf
        )
        torch.testing.assert_close(matrix(mixer, x)[0, h], scores.softmax(-1), **EXACT)


@pytest.mark.parametrize("slug", sorted({slug for slug, _ in CASES}))
def test_the_estimate_is_unbiased(slug):
    """The mean over every sign vector there is, not over some: equal to the squared Frobenius norm to rounding."""
    t = 7
    full = build("attention", "full")
    mixer = load("mixers", slug).from_attention(full.weights()).double()
    x = torch.randn(3, t, 32, dtype=torch.float64)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=t)), dtype=torch.float64)  # [2^t, t]
    v = every.T[None, :, None].expand(3, t, 4, 2**t)
    norm_ = squared_frobenius(full.mix_values(x, v))
    error = squared_frobenius(mixer.mix_values(x, v) - full.mix_values(x, v))
    want, own = matrix(full, x), matrix(mixer, x)
    torch.testing.assert_close(error, (own - want).square().sum((0, 2, 3)), **EXACT)
    torch.testing.assert_close(norm_, want.square().sum((0, 2, 3)), **EXACT)


def test_probes_are_independent_signs():
    generator = torch.Generator().manual_seed(3)
    v = probes(torch.zeros(2, 4, 8, dtype=torch.float64), 3, 4096, generator)
    assert v.shape == (2, 4, 3, 4096) and v.dtype == torch.float64
    assert torch.equal(v.abs(), torch.ones_like(v))
    assert torch.equal(v[:, :, 0], v[:, :, 2])
    rows = v[:, :, 0].flatten(0, 1)
    # Off the diagonal of v v^T / n stand means of 4096 signs: five of their deviations.
    torch.testing.assert_close(rows @ rows.T / 4096, torch.eye(8, dtype=torch.float64), rtol=0, atol=5 * 4096**-0.5)


# -- the stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", sorted({slug for slug, _ in CASES} - {"attention"}))
def test_only_what_mixes_learns_and_the_matrices_come_closer(tmp_path, make_work, make_stream, slug):
    job = make_work(slug, **({"window": 3} if slug == "windowed_linear" else {}))
    before = {k: x.clone() for k, x in job.student.state_dict().items()}
    loop = Loop(Matrix(job), Budget(60 * 24), Rate(lr=3e-2), RunFolder(tmp_path))
    block, attention = job.student.blocks[0], job.teacher.blocks[0].mixer

    @torch.no_grad()
    def true_error():
        x = block.norm1(job.teacher.embed(next(make_stream(8)).tokens_bt))
        want = matrix(attention, x)
        return float((matrix(block.mixer, x) - want).square().sum() / want.square().sum())

    start = true_error()
    loop.run()
    # A windowed_linear starts right where its window reaches, and nearly silent beyond.
    assert true_error() < (0.97 if slug == "windowed_linear" else 0.5) * start
    changed = {k for k, x in job.student.state_dict().items() if not torch.equal(x, before[k])}
    assert changed and all(k.startswith(("blocks.0.mixer.", "blocks.2.mixer.")) for k in changed)
    behind = ("v_proj", "o_proj", "out_proj", "z_proj", "norm_weight")
    assert not [k for k in changed if any(part in k for part in behind)]


def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path, make_work):
    def run(folder, steps, checkpoint=None):
        job = make_work()
        loop = Loop(Matrix(job), Budget(steps * 24), Rate(lr=1e-2, schedule="constant", warmup=0), RunFolder(folder))
        if checkpoint is not None:
            loop.resume(checkpoint)
        loop.run()
        return job.student.state_dict(), [line["loss"] for line in RunFolder(folder).lines()]

    whole, losses = run(tmp_path / "whole", 6)
    run(tmp_path / "part", 3)
    again, rest = run(tmp_path / "rest", 6, RunFolder(tmp_path / "part").load())
    assert rest == losses[3:]
    assert all(torch.equal(x, whole[k]) for k, x in again.items())


def test_what_cannot_be_compared_is_refused_before_the_training(make_work):
    job = make_work()
    job.student.blocks[0].mixer.mix_values = lambda *_: Mixer.mix_values(job.student.blocks[0].mixer, *_)
    with pytest.raises(UnsupportedError, match="Mamba2 has no mixing matrix to compare; leave stage matrix out"):
        Matrix(job)
    job = make_work()
    wide = load("mixers", "mamba2").Config(16, n_heads=4, key_dim=4, value_dim=4)
    job.student.blocks[0].mixer = load("mixers", "mamba2")(wide)
    with pytest.raises(ConfigError, match="layer 0: expected 2 heads as the attention has, got 4"):
        Matrix(job)
    with pytest.raises(ConfigError, match="matrix: expected probes >= 1, got 0"):
        Matrix.Config(probes=0)
