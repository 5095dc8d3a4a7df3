"""Losses of a linear head: both implementations against the definition, gradients included."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError, UnsupportedError
from subquad.ops import backends, launch, linear_loss

# Where kernels run: on a GPU, or interpreted.
RUNS = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or backends.interpreted())
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not RUNS, reason="no Triton that runs here"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Behind the end of a row stands minus infinity, whose differences the interpreter's numpy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

N = 9
# A loss is a function, and for the KL what it is a mix of.
KINDS: dict[str, dict[str, float]] = {
    "kl": {},
    "kl at T": {"temperature": 0.7},
    "reverse kl": {"reverse": 1.0},
    "mixed kl": {"reverse": 0.3, "temperature": 2.5},
    "top": {},
    "cross_entropy": {},
}
# What each function is called in the package.
NAMES = {"top": "kl_top", "cross_entropy": "cross_entropy"}
LOSSES = tuple(KINDS)
SCORED = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool, device=DEVICE)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "poison", True)


def arguments(loss: str, v: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> dict[str, Tensor]:
    """Hidden states of width 16 (the teacher's 24) whose logits have a standard deviation of `spread`."""
    rng = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    made = {"hidden_nd": rand(N, 16), "head_vd": spread * rand(v, 16) / 4}
    if "kl" in loss:
        made |= {"target_nd": rand(N, 24), "target_head_vd": spread * rand(v, 24) / 24**0.5}
    return {name: x.to(DEVICE, dtype) for name, x in made.items()}


def options(loss: str, v: int) -> dict[str, Tensor]:
    """What a loss takes besides, always in float32."""
    rng = torch.Generator().manual_seed(1)
    made: dict[str, Tensor] = {}
    if loss == "cross_entropy":
        made = {"labels_n": torch.randint(v, (N,), generator=rng)}
    if loss == "top":
        values, ids = torch.randn(N, v, generator=rng).mul(3).log_softmax(-1).sort(-1, descending=True)
        made = {"ids_nk": ids[:, :5].int(), "log_p_nk": values[:, :5], "log_tail_n": values[:, 5:].logsumexp(-1)}
    return {"scored_n": SCORED} | {name: x.to(DEVICE) for name, x in made.items()}


def function(loss: str, module: Any = linear_loss) -> Callable[..., Tensor]:
    """The loss in `module`, which is the package or its equation."""
    return partial(getattr(module, NAMES.get(loss, "kl")), **KINDS[loss])


def results(function: Callable[..., Tensor], values: dict[str, Tensor], **rest: Any) -> list[Tensor]:
    """The loss, and its gradients with respect to hidden states and head."""
    x, w = (values[name].clone().requires_grad_() for name in ("hidden_nd", "head_vd"))
    total = function(**(values | {"hidden_nd": x, "head_vd": w}), **rest)
    return [total.detach(), *torch.autograd.grad(3 * total, (x, w))]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tokens", [1, 4, 1000])
def test_chunks_equal_the_definition(loss: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss.on_torch, "LOGITS_AT_ONCE", tokens * 37)
    values, rest = arguments(loss, 37), options(loss, 37)
    got = results(function(loss), values, **rest)
    want = results(function(loss, linear_loss.equation), values, **rest)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(("v", "block"), [(37, 4096), (64, 16), (100, 32)])
@pytest.mark.parametrize("backend", [TRITON])
def test_kernels_in_float32(
    loss: str, v: int, block: int, spread: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the error of the definition in float32, or a few roundings of the largest logit, which is 4 spreads."""
    from subquad.ops.linear_loss import on_triton

    monkeypatch.setattr(on_triton, "BLOCK", block)
    monkeypatch.setattr(on_triton, "LOGITS_AT_ONCE", 4 * v)
    single, rest = arguments(loss, v, torch.float32, spread), options(loss, v)
    exact = {name: x.double() for name, x in single.items()}
    with backends.use(backend):
        got = results(function(loss), single, **rest)
    equation = function(loss, linear_loss.equation)
    naive = results(equation, single, **rest, dtype=torch.float32)
    want = results(equation, exact, **rest)
    for a, b, c in zip(got, naive, want, strict=True):
        assert a.dtype == torch.float32
        assert error(a, c) <= max(2 * error(b, c), 4 * spread * 2**-24)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_bfloat16_is_better_than_the_naive_form(loss: str, backend: str) -> None:
    values, rest = arguments(loss, 300, torch.bfloat16), options(loss, 300)
    with backends.use(backend):
        got = results(function(loss), values, **rest)
    equation = function(loss, linear_loss.equation)
    naive = results(equation, values, **rest, dtype=torch.bfloat16)
    want = results(equation, {name: x.double() for name, x in values.items()}, **rest)
    assert got[0].dtype == torch.float32
    for a, b, c in zip(got, naive, want, strict=True):
        # Triton's interpreter rounds to bfloat16 towards zero, by up to 2^-7 and half of that in the mean.
        truncated = 2**-8 if backend == "triton" and DEVICE == "cpu" else 0
        assert error(a, c) <= max(2 * error(b, c), 2**-9) + truncated


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_is_that_of_a_matrix_product(loss: str, backend: str) -> None:
    values, rest = arguments(loss, 50, torch.float32), options(loss, 50)
    rounded = {name: x.bfloat16() for name, x in values.items()}
    with backends.use(backend), torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = results(function(loss), values, **rest)
    with backends.use(backend):
        want = results(function(loss), rounded, **rest)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.bfloat16(), b, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("loss", [name for name in LOSSES if "kl" in name])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(loss: str, backend: str) -> None:
    """To the second order of the rounding of both normalisers; to the first it would be 1e-7 a token."""
    values = arguments("kl", 200, torch.float32, spread=10.0)
    x, w = values["hidden_nd"], values["head_vd"]
    with backends.use(backend):
        total, of_x, of_w = results(
            function(loss), {"hidden_nd": x, "head_vd": w, "target_nd": x, "target_head_vd": w}, scored_n=SCORED
        )
    assert total.abs() <= 1e-12
    assert of_x.abs().max() == of_w.abs().max() == 0


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_scored_is_not_read(loss: str, backend: str) -> None:
    values, rest = arguments(loss, 40, torch.float32), options(loss, 40)
    kept = SCORED.nonzero()[:, 0]
    few = {name: x[kept] if name.endswith("nd") and "head" not in name else x for name, x in values.items()}
    alone = {name: x[kept] for name, x in rest.items()}
    with backends.use(backend):
        total, of_x, of_w = results(function(loss), values, **rest)
        want, of_few, of_head = results(function(loss), few, **alone)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(of_x[kept], of_few, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_w, of_head, rtol=1e-5, atol=1e-6)
    assert of_x[~SCORED].abs().max() == 0


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("loss", ["kl", "mixed kl"])
@pytest.mark.parametrize("name", ["hidden_nd", "target_nd"])
def test_nan_is_never_a_number(name: str, loss: str, backend: str) -> None:
    values = arguments("kl", 40, torch.float32)
    values[name][3, 2] = torch.nan
    with backends.use(backend):
        total, of_x, _ = results(function(loss), values, scored_n=SCORED)
    assert total.isnan()
    assert of_x[3].isnan().all()
    assert of_x[4].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("loss", [name for name in LOSSES if "kl" in name])
def test_tokens_that_neither_can_say(loss: str, backend: str) -> None:
    """A logit of minus infinity in both is no token at all."""
    # Hidden states whose first channel is 1, and heads whose is minus infinity for the first tokens and 0 for others.
    values = arguments(loss, 40, torch.float32)
    few = values | {name: values[name][5:].clone() for name in ("head_vd", "target_head_vd")}
    for name in ("hidden_nd", "target_nd"):
        values[name][:, 0] = 1
    for name in ("head_vd", "target_head_vd"):
        few[name][:, 0] = values[name][5:, 0] = 0
        values[name][:5] = 0
        values[name][:5, 0] = -torch.inf
    with backends.use(backend):
        got = results(function(loss), values, scored_n=SCORED)
        want = results(function(loss), few, scored_n=SCORED)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[2][5:], want[2], rtol=1e-4, atol=1e-5)
    assert got[2][:5].abs().max() == 0
    exact = results(function(loss, linear_loss.equation), values, scored_n=SCORED)
    torch.testing.assert_close(got[0].double(), exact[0].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_what_only_one_of_them_can_say_costs_infinitely_much_in_its_direction(backend: str) -> None:
    chosen = importlib.import_module(f"subquad.ops.linear_loss.on_{backend}")

    def total(logits: Tensor, target: Tensor, reverse: float) -> float:
        one = torch.ones(1, dtype=torch.bool, device=DEVICE)
        return float(chosen.kl_(logits.clone(), target.clone(), one, 1.0, reverse))

    all_ = torch.tensor([[0.1, 0.2, 0.3]], device=DEVICE)
    few = torch.tensor([[-torch.inf, 0.2, 0.3]], device=DEVICE)
    assert total(few, all_, 0.0) == total(all_, few, 1.0) == total(few, all_, 0.5) == torch.inf
    # What is left of all of it is a share of those that few can say.
    share = float(all_.exp()[0, 1:].sum() / all_.exp().sum())
    assert total(few, all_, 1.0) == total(all_, few, 0.0) == pytest.approx(-math.log(share), rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"reverse": -0.1}, {"reverse": 1.1}, {"temperature": torch.inf}]
)
def test_mixes_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected temperature > 0 and reverse in 0..1, got"):
        linear_loss.kl(**arguments("kl", 40), scored_n=SCORED, **wrong)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_no_tokens_and_frozen_weights(backend: str) -> None:
    values = arguments("kl", 40, torch.float32)
    with backends.use(backend):
        assert not linear_loss.kl(**values, scored_n=SCORED).requires_grad
        x = values["hidden_nd"].requires_grad_()
        linear_loss.kl(**values, scored_n=SCORED).backward()
        assert x.grad is not None
        assert values["head_vd"].grad is None
        none = values | {"hidden_nd": x[:0], "target_nd": values["target_nd"][:0]}
        assert linear_loss.kl(**none, scored_n=SCORED[:0]) == 0


@pytest.mark.parametrize("backend", [TRITON])
def test_the_kernels_refuse_float64(backend: str) -> None:
    with backends.use(backend), pytest.raises(UnsupportedError, match="linear_loss on triton: .*float64"):
        linear_loss.kl(**arguments("kl", 40), scored_n=SCORED)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_labels_and_scores_of_any_stride(backend: str) -> None:
    values, given = arguments("cross_entropy", 37, torch.float32), options("cross_entropy", 37)
    want = float(linear_loss.equation.cross_entropy(**values, **given))
    apart = {name: torch.stack((x, 1 - x.long()), dim=1).to(x.dtype)[:, 0] for name, x in given.items()}
    with backends.use(backend):
        assert float(linear_loss.cross_entropy(**values, **apart)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("backend", [TRITON])
def test_what_does_not_fit_is_an_error_and_a_label_of_nothing_is_nan(backend: str) -> None:
    values, given = arguments("cross_entropy", 37, torch.float32), options("cross_entropy", 37)
    with backends.use(backend):
        with pytest.raises(ConfigError, match="labels_n: expected n=9 as in hidden_nd, got 3"):
            linear_loss.cross_entropy(**values, **(given | {"labels_n": given["labels_n"][:3]}))
        given["labels_n"][0] = 99
        assert linear_loss.cross_entropy(**values, **given).isnan()
        teacher = arguments("kl", 37, torch.float32)
        teacher["target_head_vd"] = teacher["target_head_vd"][:20]
        with pytest.raises(ConfigError, match="target_head_vc: expected v=37 as in head_v, got 20"):
            linear_loss.kl(**teacher, scored_n=SCORED)


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")  # nothing is left of the tail
def test_top_of_everything_is_the_kl(backend: str) -> None:
    values = arguments("kl", 37, torch.float32)
    log_p = (values["target_nd"] @ values["target_head_vd"].mT).log_softmax(-1)
    order = torch.rand(N, 37, generator=torch.Generator().manual_seed(2)).argsort(-1).to(DEVICE)
    own = {name: values[name] for name in ("hidden_nd", "head_vd")}
    with backends.use(backend):
        want = results(linear_loss.kl, values, scored_n=SCORED)
        for k in (36, 37):
            ids, rest = order[:, :k], order[:, k:]
            top = {"ids_nk": ids, "log_p_nk": log_p.gather(1, ids), "log_tail_n": log_p.gather(1, rest).logsumexp(-1)}
            got = results(linear_loss.kl_top, own, **top, scored_n=SCORED)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_a_tail_far_below_float32(backend: str) -> None:
    """The student's tail is a share of 1e-13, which 1 less the top's share could not tell from 0."""
    hidden = torch.tensor([[30.0, 0.0]], device=DEVICE)
    head = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 3, device=DEVICE)
    top = {
        "ids_nk": torch.tensor([[0]], device=DEVICE),
        "log_p_nk": torch.tensor([[0.75]], device=DEVICE).log(),
        "log_tail_n": torch.tensor([0.25], device=DEVICE).log(),
        "scored_n": torch.ones(1, dtype=torch.bool, device=DEVICE),
    }
    with backends.use(backend):
        got = results(linear_loss.kl_top, {"hidden_nd": hidden, "head_vd": head}, **top)
    log_q_tail = math.log(3) - 30
    want = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - log_q_tail)
    assert float(got[0]) == pytest.approx(want, rel=1e-6)
    # Each of three tokens of the tail is to gain a third of what the tail lacks.
    torch.testing.assert_close(got[2][:, 0].cpu(), 3 * 30 * torch.tensor([0.25, -1 / 12, -1 / 12, -1 / 12]))


def test_there_is_no_second_derivative_to_be_wrong() -> None:
    values, given = arguments("cross_entropy", 37), options("cross_entropy", 37)
    x = values["hidden_nd"].requires_grad_()
    (gradient,) = torch.autograd.grad(linear_loss.cross_entropy(**values, **given), x, create_graph=True)
    assert not gradient.requires_grad
