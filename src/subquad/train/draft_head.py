"""Training of a draft head: what it guesses, and guesses on from its own guesses, becomes the model's distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.errors import ConfigError
from subquad.core.state import precise
from subquad.data import Batch, TokenStream
from subquad.models.draft_head import Head
from subquad.models.stack import Stack
from subquad.ops import linear_loss
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Display, Habits, Loop, Stage
from subquad.train.optimiser import Rate
from subquad.train.precision import autocast

# Sequences run at once on a CPU, which has no use for more.
ROWS_ON_CPU = 4
# Tokens of a batch whose guesses are compared with the model, over its whole vocabulary.
COMPARED = 512


@dataclass(frozen=True)
class Lesson:
    """What a head is trained on.

    Attributes:
        steps: guesses that stand one on the other (arXiv 2503.01840, section 3.2), or of a block head's one read.
        decay: weight of each guess's loss relative to the one before it: it counts only where that one stood.
        stream: weight of the relative squared error of what stands for the model's stream. EAGLE has a term like it
            (arXiv 2401.15077, section 3.2), EAGLE-3 has none.
    """

    steps: int = 3
    decay: float = 0.8
    stream: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what is no loss."""
        if self.steps < 1 or not 0 < self.decay <= 1 or self.stream < 0:
            raise ConfigError(f"draft head: expected steps >= 1, 0 < decay <= 1, stream >= 0, got {self}; change them")


class HeadStage(Stage):
    """Minimise ``sum_s decay^s KL(p || q_s)``, p and q renormalised over the tokens that may be guessed.

    p is the model's distribution behind a pair's token, and q_s that of the head where its last s pairs are of its own
    making (`Head.unroll`). The q_s of a block head does not depend on the last s tokens: it learns the mean of p over
    all that may stand there, which on the model's own samples is how the model itself goes on behind the prefix.

    The model runs without gradients, in the dtype it has; logits exist for one chunk of tokens at a time. Before each
    step the guesses for a few tokens of its batch are compared with the model: as long as no text comes twice, that is
    text not seen.

    Args:
        model: that the head guesses for; not changed.
        head: trained in place, on the model's device.
        stream: batches of tokens.
        lesson: what is minimised.
    """

    name = "head"

    def __init__(self, model: Stack, head: Head, stream: TokenStream, lesson: Lesson | None = None) -> None:
        head.config.check(model.config)
        self.model, self.head, self.stream = model.requires_grad_(False).eval(), head, stream
        self.lesson, self.device = lesson or Lesson(), model.device
        self.tokens_per_step = stream.batch * stream.time
        self.new, self.old = list(head.requires_grad_(True).parameters()), list[nn.Parameter]()
        self.clipped: Sequence[Sequence[nn.Parameter]] = [self.new]
        self._rows = min(stream.batch, ROWS_ON_CPU) if self.device.type == "cpu" else stream.batch
        self._few_md = guessable(model, head)

    def step(self) -> dict[str, Tensor]:
        """One batch, in parts."""
        batch, steps = next(self.stream).to(self.device), self.lesson.steps
        scored_sbt = scored(batch.tokens_bt, batch.wanted_bt, self.head.config.window, steps)
        counts = [
            scored_bt[:, self.head.columns(s, scored_bt.shape[1])].sum() for s, scored_bt in enumerate(scored_sbt)
        ]
        whole_s = torch.stack(counts).clamp(min=1)
        compared: dict[str, Tensor] = {}
        kl_s = torch.zeros(steps, device=self.device)
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(batch.tokens_bt), self._rows):
            rows = slice(start, start + self._rows)
            guesses = guess(self.model, self.head, batch.tokens_bt[rows], scored_sbt[:, rows])
            if not compared:
                some = [[x[:1, :COMPARED] for x in of_step] for of_step in guesses]
                sums_s3 = torch.stack([stood(self.model, self._few_md, self.head.ids_m, *few) for few in some])
                same_s, stands_s = (sums_s3[:, :2] / sums_s3[:, 2:].clamp(min=1)).unbind(1)
                compared = {"agreement": same_s, "acceptance": stands_s}
            one, one_s = self._loss(guesses, whole_s)
            one.backward()  # pyright: ignore[reportUnknownMemberType]
            loss, kl_s = loss + one.detach(), kl_s + one_s.detach()
        return {"loss": loss, "kl": kl_s, **compared}

    def _loss(self, guesses: Sequence[tuple[Tensor, ...]], whole_s: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows' share of a batch's loss, and of the KL of each guess; of `whole_s` scored columns."""
        losses: list[Tensor] = []
        kls: list[Tensor] = []
        for s, of_step in enumerate(guesses):
            (guess_nd, target_nd, scored_n), weight = (x.flatten(0, 1) for x in of_step), self.lesson.decay**s
            kl = linear_loss.kl(guess_nd, self._few_md, target_nd, self._few_md, scored_n) / whole_s[s]
            losses.append(weight * kl)
            kls.append(kl)
            if self.lesson.stream:
                wide_nd = target_nd.to(precise(target_nd.dtype))
                error_n = (guess_nd.to(wide_nd.dtype) - wide_nd).square().sum(-1) / wide_nd.square().sum(-1)
                losses.append(weight * self.lesson.stream * (error_n * scored_n).sum() / whole_s[s])
        return torch.stack(losses).sum(), torch.stack(kls)

    def fewer_rows(self) -> int | None:
        """Half as many rows at once from now on; None where it is one already."""
        if self._rows == 1:
            return None
        self._rows //= 2
        return self._rows

    def weights(self) -> dict[str, Tensor]:
        """The head's."""
        return self.head.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""
        self.head.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """The stream's position."""
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it."""
        self.stream.load_state_dict(state["stream"])


def guess(model: Stack, head: Head, tokens_bt: Tensor, scored_sbt: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the head makes of a text in each step, the model's stream in its place, and whether it is scored.

    Args:
        model: that it guesses for; nothing of it is trained.
        head: that guesses.
        tokens_bt: the text.
        scored_sbt: of `scored`, for each step.

    Returns:
        ``[b, n, d]``, ``[b, n, d]`` and ``[b, n]``, of the step's `Head.columns`.
    """
    with torch.no_grad():
        hidden_btd = model.hidden(tokens_bt, aux_layers=head.config.aux_layers)
    # A pair's token is the one that was drawn from its stream, the next. The last column has none, and is not scored.
    guesses = head.unroll(model, head.fused(hidden_btd), tokens_bt.roll(-1, 1), len(scored_sbt))
    at = [head.columns(s, tokens_bt.shape[1]) for s in range(len(guesses))]
    target_btd = hidden_btd[..., : head.config.d_model].roll(-1, 1)
    return [(x_bnd, target_btd[:, at[s]], scored_sbt[s][:, at[s]]) for s, x_bnd in enumerate(guesses)]


def guessable(model: Stack, head: Head) -> Tensor:
    """``[m, d]``: the rows of the model's head of the tokens that may be guessed."""
    weight_vd = model.lm_head.weight.detach()
    return weight_vd[head.ids_m] if len(head.ids_m) else weight_vd


def scored(tokens_bt: Tensor, wanted_bt: Tensor | None, window: int, steps: int) -> Tensor:
    """bool ``[s, b, t]``: columns where the step's guess (`Head.unroll`) has a distribution of the model to learn.

    That of column c is the model's at the token of column c + 1, so that its label stands in column c + 2.

    Args:
        tokens_bt: the text.
        wanted_bt: bool, the tokens that count as labels; None is all, and then the last column's stream counts too.
        window: of the head.
        steps: s.
    """
    b, t = tokens_bt.shape
    column_t = torch.arange(t, device=tokens_bt.device)
    step_s1 = torch.arange(steps, device=tokens_bt.device)[:, None]
    there_st = (column_t % min(window, t) >= step_s1) & (column_t < t - 1)
    there_sbt = there_st[:, None].expand(-1, b, -1)
    return there_sbt if wanted_bt is None else there_sbt & F.pad(wanted_bt[:, 2:], (0, min(2, t)))


@torch.no_grad()
def compare(
    model: Stack, few_md: Tensor, ids_m: Tensor, guess_bnd: Tensor, target_bnd: Tensor
) -> tuple[Tensor, Tensor]:
    """How guesses compare with the model over its whole vocabulary, both ``[b, n]``.

    First, whether the likeliest tokens are the same: then a greedy guess stands. Second, ``sum_v min(p, q)``, the
    probability that a sampled one stands (arXiv 2211.17192, theorem 3.5).

    Args:
        model: whose head makes the target's distributions p.
        few_md: of `guessable`.
        ids_m: their tokens; none is all.
        guess_bnd: what stands for the model's stream.
        target_bnd: the model's stream in its place.
    """
    logits_bnv = model.head(target_bnd)
    logits_bnv = logits_bnv.to(precise(logits_bnv.dtype))
    best_bn, p_bnm = logits_bnv.argmax(-1), logits_bnv.softmax(-1)
    if len(ids_m):
        p_bnm = p_bnm[..., ids_m]
    q_bnm = F.linear(guess_bnd, few_md).to(p_bnm.dtype).softmax(-1)
    guess_bn = q_bnm.argmax(-1)
    same_bn = (ids_m[guess_bn] if len(ids_m) else guess_bn) == best_bn
    return same_bn.to(p_bnm.dtype), torch.minimum(p_bnm, q_bnm).sum(-1)


def stood(
    model: Stack, few_md: Tensor, ids_m: Tensor, guess_bnd: Tensor, target_bnd: Tensor, scored_bn: Tensor
) -> Tensor:
    """``[3]``: the sums of both of `compare` over what is scored, and how much that is."""
    both = compare(model, few_md, ids_m, guess_bnd, target_bnd)
    return torch.stack([*((x_bn * scored_bn).sum() for x_bn in both), scored_bn.sum()])


@dataclass(frozen=True)
class Stood:
    """How the guesses on a text compare with the model.

    Attributes:
        agreement: for each guess in a row, how often it is the model's likeliest token.
        acceptance: for each, the mean probability that it stands when both draw at temperature 1.
        tokens: that were guessed.
    """

    agreement: tuple[float, ...]
    acceptance: tuple[float, ...]
    tokens: int

    def tokens_a_round(self, *, greedy: bool) -> float:
        """Of a round with as many guesses, if each stood or fell by itself: ``1 + a1 + a1 a2 + ...``."""
        return 1 + sum(accumulate(self.agreement if greedy else self.acceptance, mul))


@torch.no_grad()
def measure(model: Stack, head: Head, batch: Batch, steps: int) -> Stood:
    """Compare guesses with the model on a text that is there: each stands on tokens of the text.

    Args:
        model: that the head guesses for.
        head: on the model's device.
        batch: the text, in rows; only guesses of its labels count.
        steps: guesses in a row.
    """
    few_md = guessable(model, head)
    sums_s3 = torch.zeros(steps, 3, device=model.device)
    with autocast(model.device):
        wanted = [None] * len(batch.tokens_bt) if batch.wanted_bt is None else batch.wanted_bt.split(1)
        for pair in zip(batch.tokens_bt.split(1), wanted, strict=True):
            row = Batch(*pair).to(model.device)
            guesses = guess(model, head, row.tokens_bt, scored(row.tokens_bt, row.wanted_bt, head.config.window, steps))
            for sums_3, of_step in zip(sums_s3, guesses, strict=True):
                for chunk in zip(*(x.split(COMPARED, dim=1) for x in of_step), strict=True):
                    sums_3 += stood(model, few_md, head.ids_m, *chunk)
    agreement, acceptance = (sums_s3[:, :2] / sums_s3[:, 2:].clamp(min=1)).mT.tolist()
    return Stood(tuple(agreement), tuple(acceptance), int(sums_s3[0, 2]))


def fit_head(
    model: Stack,
    head: Head,
    stream: TokenStream,
    budget: Budget,
    rate: Rate,
    folder: RunFolder,
    *,
    lesson: Lesson | None = None,
    resume: bool = False,
    habits: Habits | None = None,
    display: Display | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Train `head` in place to guess for `model`; both lie on one device.

    Args:
        model, head, stream, lesson: see `HeadStage`.
        budget: when it ends.
        rate: learning rate and clipping.
        folder: takes log and checkpoints.
        resume: go on from the folder's checkpoint; everything else must be as it was.
        habits, display, say: see `Loop`.

    Raises:
        ConfigError: a head for another model.
        DivergenceError, StoppedError, CheckpointError: see `Loop.run` and `RunFolder.load`.
    """
    stage = HeadStage(model, head, stream, lesson)
    loop = Loop(stage, budget, rate, folder, habits=habits, display=display, say=say)
    if resume:
        checkpoint = folder.load()
        folder.rewind([stage.name], checkpoint["stage"], checkpoint["step"])
        loop.resume(checkpoint)
    loop.run()
    head.requires_grad_(False).eval()
