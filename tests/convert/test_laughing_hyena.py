"""LaughingHyena: filters met by modes, and a model that says what its teacher says, step by step."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import cli
from subquad.convert.laughing_hyena import Distillation, distil, filters_of, fit
from subquad.core.errors import CheckpointError, ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.engine.generate import Limits, generate
from subquad.mixers.laughing_hyena import LaughingHyena
from subquad.models.checkpoint import from_pretrained, save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LENGTH, V, BOUND = 48, 13, 5e-3
LAYER = {"mixer": "hyena", "max_len": LENGTH, "bands": 3, "filter_width": 16, "frequency": 2.0}


def text(rng: torch.Generator, rows: int) -> Tensor:
    """Walks that step by 1, 2 or 3 round a circle, each row by its own step: what comes follows from what came."""
    start, step = torch.randint(V, (rows, 1), generator=rng), torch.randint(1, 4, (rows, 1), generator=rng)
    return (start + step * torch.arange(LENGTH)) % V


@pytest.fixture(scope="module")
def teacher() -> Stack:
    """A tiny language model that has learned its text, in float64, frozen."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = Stack(ModelConfig(V, 16, 32, (LAYER, LAYER | {"order": 3}), max_positions=LENGTH)).double()
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(60):
        tokens_bt = text(rng, 16)
        adam.zero_grad()
        F.cross_entropy(model(tokens_bt[:, :-1]).flatten(0, 1), tokens_bt[:, 1:].flatten()).backward()
        adam.step()
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def made(teacher: Stack) -> Distillation:
    return distil(teacher, modes=20, bound=BOUND)


def loss(model: Stack, tokens_bt: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens_bt[:, :-1]).flatten(0, 1), tokens_bt[:, 1:].flatten())


def test_the_student_says_what_its_teacher_says(teacher: Stack, made: Distillation) -> None:
    """The whole way: perplexity, greedy tokens by steps of constant state, and the same with guesses."""
    student, rng = made.student, torch.Generator().manual_seed(1)
    tokens_bt = text(rng, 16)
    assert loss(teacher, tokens_bt) < 0.5 < torch.log(torch.tensor(float(V)))  # it has learned something
    with torch.no_grad():
        assert abs(float((loss(student, tokens_bt) - loss(teacher, tokens_bt)).exp()) - 1) < 0.01
    prompts = [row[:n].tolist() for row, n in zip(text(rng, 4), (1, 5, 9, 16), strict=True)]
    limits = Limits(max_new_tokens=LENGTH - 16)
    want = [one.tokens for one in generate(teacher, prompts, limits=limits)]
    assert [one.tokens for one in generate(student, prompts, limits=limits)] == want
    assert len({token for row in want for token in row}) > 5
    guessed = generate(student, prompts, limits=limits, drafter=CopySpec(), draft_tokens=3)
    assert [one.tokens for one in guessed] == want
    assert student.init_state(1, 10**6, device="meta").nbytes == student.init_state(1, 10, device="meta").nbytes


def test_a_distilled_model_is_saved_like_any_other(made: Distillation, tmp_path: Any) -> None:
    save_pretrained(made.student, tmp_path / "m")
    again, tokens_bt = from_pretrained(tmp_path / "m"), torch.randint(V, (2, 9))
    assert [layer["mixer"] for layer in again.config.layers] == ["laughing_hyena"] * 2
    assert torch.equal(again(tokens_bt), made.student(tokens_bt))
    broken = made.student.blocks[0].mixer.state_dict()
    broken["filters.log_rate_ngm"] = broken["filters.log_rate_ngm"] * torch.nan
    with pytest.raises(CheckpointError, match="log_rate_ngm: expected finite poles"):
        made.student.blocks[0].mixer.__class__(made.student.blocks[0].mixer.config).load_state_dict(broken)


def test_every_filter_is_met_within_the_bound(teacher: Stack, made: Distillation) -> None:
    assert len(made.fits) == 16 + 2 * 16
    for one in made.fits:
        mixer = made.student.blocks[one.layer].mixer
        assert isinstance(mixer, LaughingHyena)
        k_l = filters_of(teacher.blocks[one.layer])[one.convolution, one.head]
        off_l = mixer.filters.taps(LENGTH)[one.convolution, one.head] - k_l
        # The first tap is met by what stands beside the state: float64 sums of at most 20 residues of up to ten, taken
        # off and added again, are off by 2 x 20 x 10 x 1.1e-16 = 4e-14.
        torch.testing.assert_close(off_l[0], torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
        assert one.l2 == pytest.approx((off_l[1:].norm() / k_l[1:].norm()).item(), rel=1e-6) and one.l2 <= BOUND
        assert one.linf == pytest.approx((off_l[1:].abs().max() / k_l[1:].abs().max()).item(), rel=1e-6)
        assert one.modes <= mixer.config.modes <= 20
        assert one.hankel >= one.aak * (1 - 1e-9) - 1e-12
    assert len({one.modes for one in made.fits}) > 1  # each as many as it needs
    for block in made.student.blocks:
        log_a_ngm, _ = block.mixer.filters()
        assert (log_a_ngm.exp().abs() < 1).all()


def test_all_but_the_filters_is_the_teachers_and_nothing_is_shared(teacher: Stack, made: Distillation) -> None:
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    mine = made.student.state_dict()
    for name, x in before.items():
        if ".filters." not in name:
            assert torch.equal(mine[name], x) and mine[name].data_ptr() != teacher.state_dict()[name].data_ptr()
    assert [layer["mixer"] for layer in teacher.config.layers] == ["hyena"] * 2


def test_heads_are_distilled_as_they_are() -> None:
    torch.manual_seed(0)
    layer = LAYER | {"n_heads": 2, "learned_decay": True, "conv_width": 1}
    model = Stack(ModelConfig(V, 8, 16, (layer,))).double().requires_grad_(False)
    made = distil(model, modes=20, bound=BOUND)
    tokens_bt = torch.randint(V, (2, LENGTH))
    want = model(tokens_bt)
    assert (made.student(tokens_bt) - want).norm() < 1e-2 * want.norm()
    assert len(made.fits) == 2 and made.student.config.layers[0]["n_heads"] == 2


def test_steps_in_float32_are_as_exact_as_the_whole_at_once() -> None:
    """Filters like noise, met badly: no residues of millions that cancel in float64 and not in steps of float32."""
    torch.manual_seed(0)
    layer = LAYER | {"max_len": 128, "bands": 8, "frequency": 6.0}
    model = Stack(ModelConfig(V, 8, 16, (layer,))).requires_grad_(False)
    student = distil(model, modes=16, bound=None).student
    tokens_bt, state, steps = torch.randint(V, (1, 128)), student.init_state(1), []
    for t in range(128):
        hidden_btd, update = student.read(tokens_bt[:, t : t + 1], state)
        state = update.commit()
        steps.append(student.head(hidden_btd))
    want = copy.deepcopy(student).double()(tokens_bt)
    assert (torch.cat(steps, 1) - want).norm() < 1e-3 * want.norm()


def test_a_filter_beyond_the_bound_is_named(teacher: Stack) -> None:
    expected = (
        r"layer 0, convolution 0, filter \d+: expected a relative l2 error of at most 1e-06, got .* with 1 modes "
    )
    with pytest.raises(ConfigError, match=expected + r"\(order 2\).*: allow more modes, or a larger bound"):
        distil(teacher, modes=1, bound=1e-6)
    made = distil(teacher, modes=1, bound=None)
    assert {one.modes for one in made.fits} == {1} and max(one.l2 for one in made.fits) > 1e-2
    attention = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    with pytest.raises(ConfigError, match="expected a model with hyena layers, got attention"):
        distil(Stack(ModelConfig(V, 16, 32, (attention,))))
    with pytest.raises(ConfigError, match="unknown norm 'l3'"):
        distil(teacher, norm="l3")
    with pytest.raises(ConfigError, match="at least one mode and a bound above 0, got 0"):
        distil(teacher, modes=0)


def modal(rates: list[float], angles: list[float], length: int) -> Tensor:
    """Filters that are sums of modes, with random residues."""
    log_a_m = torch.complex(-torch.tensor(rates), torch.tensor(angles)).to(torch.complex128)
    l_l = torch.arange(length)[:, None]
    residue_gm = torch.randn(3, len(rates), dtype=torch.complex128)
    return (residue_gm[:, None] * (l_l * log_a_m).exp()).real.sum(2)


def test_singular_values_are_those_of_the_matrix() -> None:
    k_gl = modal([0.01, 0.3, 0.05], [0.0, 3.0, 1.0], 60)
    h_gl = k_gl[:, 1:]
    matrix_gpp = torch.stack([h_gl[:, i : i + 30] for i in range(30)], dim=1)
    value_gr, vector_gpr = fit.singular(h_gl, 8)
    # A decomposition of 30 x 30 numbers of up to 3 in size is off by some 30 epsilons of its largest value, which is at
    # most 90: 30 x 2.2e-16 x 90 = 6e-13. Beyond its modes the matrix holds only such noise.
    torch.testing.assert_close(value_gr, torch.linalg.svdvals(matrix_gpp)[:, :8], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close((matrix_gpp @ vector_gpr).norm(dim=1), value_gr, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [64, 300])
def test_modes_are_found_again_exactly(length: int) -> None:
    """Real poles, negative ones and pairs, slow and fast; fewer than there are fall short by what AAK says at least."""
    k_gl = modal([0.01, 0.3, 0.05, 0.1], [0.0, torch.pi, 1.0, 2.5], length)
    (log_a_gm, residue_gm), used_g = fit.choose(k_gl, 8, 1e-6, "l2")
    assert used_g.tolist() == [4, 4, 4]
    off_gl = fit.error(fit.Modes(log_a_gm, residue_gm), k_gl[:, 1:])
    assert (off_gl.norm(dim=1) <= 1e-6 * k_gl[:, 1:].norm(dim=1)).all()
    few, _ = fit.choose(k_gl, 2, None, "l2")
    fitted_gl = F.pad(fit.error(few, k_gl[:, 1:]), (1, 0)) + k_gl
    off = fit.errors(k_gl, fitted_gl, torch.full((3,), 2))
    assert (off.hankel >= off.aak).all() and (off.aak > 1e-3).all()


def test_refinement_comes_nearer_in_the_norm_asked_for() -> None:
    torch.manual_seed(3)
    k_gl = torch.randn(4, 80, dtype=torch.float64).cumsum(1) * (-torch.arange(80) / 20).exp()
    h_gl = k_gl[:, 1:] / k_gl[:, 1:].norm(dim=1, keepdim=True)
    start = fit.realise(h_gl, 3)
    square, largest = (fit.error(fit.refine(start, h_gl, norm), h_gl) for norm in ("l2", "linf"))
    assert (square.norm(dim=1) < fit.error(start, h_gl).norm(dim=1) * (1 - 1e-3)).all()
    assert (square.norm(dim=1) <= largest.norm(dim=1)).all()
    assert (largest.abs().amax(1) < square.abs().amax(1) * 0.95).all()


def test_short_and_empty_filters() -> None:
    """One tap, two, three; and one that is zero behind the first."""
    for length in (1, 2, 3):
        k_gl = torch.randn(2, length, dtype=torch.float64)
        k_gl[1, 1:] = 0
        found, used_g = fit.choose(k_gl, 4, 1e-6, "l2")
        off_gl = fit.error(found, k_gl[:, 1:])
        assert off_gl.abs().sum() < 1e-5 and used_g[1] == 0
        assert torch.isfinite(fit.errors(k_gl, k_gl, used_g).aak).all()


def test_the_command_saves_model_table_and_picture(
    teacher: Stack, made: Distillation, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(teacher, tmp_path / "teacher")
    out = tmp_path / "student"
    assert (
        cli.main(["distil", str(tmp_path / "teacher"), "--out", str(out), "--modes", "20", "--bound", str(BOUND)]) == 0
    )
    said = capsys.readouterr().out
    assert "48 filters" in said and "layer 1: 32 filters" in said
    table = json.loads((out / "distil.json").read_text())
    assert [one["modes"] for one in table["fits"]] == [one.modes for one in made.fits]
    assert set(table["fits"][0]) == {field.name for field in dataclasses.fields(made.fits[0])}
    assert (out / "filters.png").stat().st_size > 10_000 and (out / "README.md").exists()
    assert cli.main(["distil", str(tmp_path / "teacher"), "--out", str(out), "--modes", "1", "--bound", "1e-6"]) == 2
    assert "filter" in capsys.readouterr().err
    assert from_pretrained(out).config.layers[0]["mixer"] == "laughing_hyena"  # what was there is as it was


def test_what_a_gpu_does_otherwise_gives_the_same() -> None:
    """The bases and the small eigenvalues that a GPU would find one matrix after the other."""
    # Columns that shrink to 1e-6 of the first, as under powers of a matrix.
    x_gpr = torch.randn(5, 40, 7, dtype=torch.float64) * 10.0 ** -torch.arange(7.0)
    q_gpr = fit.gram_schmidt(x_gpr)
    torch.testing.assert_close(q_gpr.mT @ q_gpr, torch.eye(7, dtype=torch.float64).expand(5, -1, -1))
    want_gpr = torch.linalg.qr(x_gpr)[0]
    torch.testing.assert_close(q_gpr @ q_gpr.mT, want_gpr @ want_gpr.mT)
    square_gxx = torch.randn(5, 4, 4, dtype=torch.float64)
    assert torch.equal(fit.on_cores(torch.linalg.eigvals, square_gxx), torch.linalg.eigvals(square_gxx))
    symmetric_gxx = square_gxx + square_gxx.mT
    for got, want in zip(fit.on_cores(torch.linalg.eigh, symmetric_gxx), torch.linalg.eigh(symmetric_gxx), strict=True):
        assert torch.equal(got, want)
