"""The token KL in chunks against all logits at once; before that, a transplant that changes nothing is its teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.convert.transplant import transplant
from subquad.core.layout import Layout
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.losses import token_kl


def plain_kl(student_btd: Tensor, head_vd: Tensor, teacher_btd: Tensor, teacher_head_vd: Tensor) -> Tensor:
    """The same loss with all logits at once."""
    student_btv = F.linear(student_btd[:, :-1], head_vd).log_softmax(-1)
    with torch.no_grad():
        teacher_btv = F.linear(teacher_btd[:, :-1], teacher_head_vd).log_softmax(-1)
    return F.kl_div(student_btv, teacher_btv, reduction="none", log_target=True).sum(-1).mean()


def gradient(loss: Tensor, *of: Tensor) -> Tensor:
    """All gradients of `loss` in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, of)])


def run(bench: Bench) -> None:
    """SmolLM2-135M's head over a batch, forward and backward."""
    (b, t, d, v) = bench.size((4, 1024, 576, 49_152), smoke=(2, 9, 16, 64))
    shape = {"b": b, "t": t, "d": d, "v": v}
    factory = bench.factory
    student_btd, teacher_btd = torch.randn(b, t, d, **factory), torch.randn(b, t, d, **factory)
    head_vd, teacher_vd = torch.randn(v, d, **factory) * d**-0.5, torch.randn(v, d, **factory) * d**-0.5
    layout = Layout.dense(b, t, device=bench.device)

    def ours(x_btd: Tensor, w_vd: Tensor) -> Tensor:
        x_btd, w_vd = x_btd.requires_grad_(), w_vd.requires_grad_()
        return gradient(token_kl(x_btd, w_vd, teacher_btd, teacher_vd, layout), x_btd, w_vd)

    def plain(x_btd: Tensor, w_vd: Tensor) -> Tensor:
        x_btd, w_vd = x_btd.requires_grad_(), w_vd.requires_grad_()
        return gradient(plain_kl(x_btd, w_vd, teacher_btd, teacher_vd), x_btd, w_vd)

    few = slice(0, 1), slice(0, 128)
    x_btd, target_btd = student_btd[few].clone().requires_grad_(), teacher_btd[few]
    w_vd = head_vd.clone().requires_grad_()
    dense = Layout.dense(*x_btd.shape[:2], device=bench.device)
    got = gradient(token_kl(x_btd, w_vd, target_btd, teacher_vd, dense), x_btd, w_vd)
    naive = gradient(plain_kl(x_btd, w_vd, target_btd, teacher_vd), x_btd, w_vd)
    wide_x, wide_w = (y.detach().double().requires_grad_() for y in (x_btd, w_vd))
    want = gradient(plain_kl(wide_x, wide_w, target_btd.double(), teacher_vd.double()), wide_x, wide_w)
    bench.gate("gradients of the chunked loss", got, want, naive=naive)
    layer = {"mixer": "attention", "n_heads": 9, "n_kv_heads": 3, "head_dim": 64, "rotary": {"theta": 1e5, "dim": 64}}
    config = ModelConfig(v, 576, bench.size(1536, smoke=32), (layer,) * 2)
    teacher = Stack(config).to(**factory).requires_grad_(False)
    # A window as long as the text is full attention: the student must be its teacher.
    student = transplant(teacher, {i: {"mixer": "attention", "window": t} for i in (0, 1)})
    tokens_bt = torch.randint(v, (b, t), device=bench.device)
    exact = transplant(teacher, {}).double().hidden(tokens_bt)
    bench.gate("a transplant that changes nothing", student.hidden(tokens_bt), exact, naive=teacher.hidden(tokens_bt))

    bench.compare(
        "kl", ours, plain, baseline_name="all logits at once", inputs=(student_btd, head_vd), tokens=b * t, shape=shape
    )
