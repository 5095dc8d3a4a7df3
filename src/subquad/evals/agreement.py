"""Does the student say what the teacher says: along the teacher's own greedy answers, and on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.engine.generate import Limits, generate
from subquad.evals.perplexity import windows_of
from subquad.evals.scoring import Progress, logit_chunks, make_batches
from subquad.evals.stats import Interval, bootstrap_mean, bootstrap_ratio, wilson
from subquad.evals.text import TextTokens
from subquad.models.stack import Stack


@dataclass(frozen=True)
class Agreement:
    """How far a student follows its teacher, per prompt.

    Attributes:
        tokens_n: tokens of the teacher's greedy answer.
        match_n: how many of them are the student's most likely token too, the teacher's answer being read so far.
        kl_n: sum over them of ``KL(teacher || student)``, in nats.
        same_n: tokens of the student's own greedy answer before it first differs from the teacher's.
    """

    tokens_n: Tensor
    match_n: Tensor
    kl_n: Tensor
    same_n: Tensor

    @property
    def match(self) -> Interval:
        """Share of tokens on which both agree, read along the teacher's answers."""
        return bootstrap_ratio(self.match_n, self.tokens_n)

    @property
    def kl(self) -> Interval:
        """``KL(teacher || student)`` per token, in nats."""
        return bootstrap_ratio(self.kl_n, self.tokens_n)

    @property
    def same(self) -> Interval:
        """Mean tokens before the student's own answer differs; at most the length of the answers."""
        return bootstrap_mean(self.same_n.double())

    @property
    def identical(self) -> Interval:
        """Share of answers that are the teacher's to the last token."""
        return wilson(int((self.same_n == self.tokens_n).sum()), len(self.tokens_n))


def prompts_from_text(text: TextTokens, n: int, length: int) -> list[list[int]]:
    """`n` prompts of `length` tokens, spread evenly over a text."""
    if n < 1 or len(text.ids_n) < n * length:
        raise ConfigError(
            f"expected at least 1 prompt, and a text of {n} x {length} tokens, got {len(text.ids_n)}; give more text"
        )
    starts = [i * (len(text.ids_n) - length) // max(1, n - 1) for i in range(n)]
    return [text.ids_n[start : start + length].tolist() for start in starts]


@torch.no_grad()
def evaluate_agreement(
    student: Stack,
    teacher: Stack,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = 64,
    batch: int = 8,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Agreement:
    """Let the teacher answer `prompts` greedily, and see how far the student follows.

    Args:
        student, teacher: models with one vocabulary.
        prompts: token ids.
        new_tokens: most tokens of an answer; an end token ends it and counts.
        batch: answers generated at once.
        batch_tokens: padded tokens read at once.
        progress: called with prompts done and in all.
    """
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ConfigError(
            f"expected one vocabulary, got {student.config.vocab_size} and {teacher.config.vocab_size} tokens; "
            "compare models that share a tokenizer"
        )
    limits = Limits(max_new_tokens=new_tokens, end_tokens=teacher.config.eos_tokens, allow_long=True)
    match_n, kl_n, same_n, tokens_n = (torch.zeros(len(prompts), dtype=torch.float64) for _ in range(4))
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        answers = [g.tokens for g in generate(teacher, part, limits=limits)]
        own = [g.tokens for g in generate(student, part, limits=limits)]
        for i, (theirs, mine) in enumerate(zip(answers, own, strict=True), start):
            tokens_n[i], same_n[i] = len(theirs), _common(theirs, mine)
        for rows in make_batches(list(zip(part, answers, strict=True)), batch_tokens, student.device):
            agree_n, divergence_n = _compare(student, teacher, rows.hidden_nd(student), rows.hidden_nd(teacher))
            sizes = [size for _, size in rows.owners]
            sums = zip(rows.owners, agree_n.split(sizes), divergence_n.split(sizes), strict=True)
            for (i, _), agree, divergence in sums:
                match_n[start + i], kl_n[start + i] = agree.sum(), divergence.sum()
        if progress is not None:
            progress(start + len(part), len(prompts))
    return Agreement(tokens_n, match_n, kl_n, same_n)


@dataclass(frozen=True)
class Divergence:
    """How far a student's distribution is from its teacher's on a text.

    Attributes:
        kl_w: mean of ``KL(teacher || student)`` over the tokens of each window, in nats.
    """

    kl_w: Tensor

    @property
    def kl(self) -> Interval:
        """Per token, over windows."""
        return bootstrap_mean(self.kl_w)


@torch.no_grad()
def evaluate_divergence(
    student: Stack,
    teacher: Stack,
    text: TextTokens,
    context: int,
    *,
    batch: int = 4,
    progress: Progress | None = None,
) -> Divergence:
    """``KL(teacher || student)`` of the next token along a text, in windows of `context` tokens as for perplexity.

    Args:
        student, teacher: models with one vocabulary.
        text: from `subquad.evals.text`.
        context: tokens of a window.
        batch: windows read at once.
        progress: called with tokens done and in all.

    Raises:
        ConfigError, DataError: see `subquad.evals.perplexity.windows_of`.
    """
    tokens_wt = windows_of(text, context)
    kl_w = torch.empty(len(tokens_wt), dtype=torch.float64)
    for start in range(0, len(tokens_wt), batch):
        tokens_bt = tokens_wt[start : start + batch].to(student.device)
        ours_nd, theirs_nd = (m.hidden(tokens_bt)[:, :-1].flatten(0, 1) for m in (student, teacher))
        _, divergence_n = _compare(student, teacher, ours_nd, theirs_nd)
        kl_w[start : start + batch] = divergence_n.view(len(tokens_bt), context - 1).mean(1)
        if progress is not None:
            progress(min(start + batch, len(tokens_wt)) * context, len(tokens_wt) * context)
    return Divergence(kl_w)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _compare(student: Stack, teacher: Stack, student_nd: Tensor, teacher_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Whether both prefer one token, and ``KL(teacher || student)``, at each position."""
    agree_n = torch.empty(len(student_nd), dtype=torch.float64)
    divergence_n = torch.empty(len(student_nd), dtype=torch.float64)
    both = zip(logit_chunks(student, student_nd), logit_chunks(teacher, teacher_nd), strict=True)
    for (part, q_cv), (_, p_cv) in both:
        agree_n[part] = (p_cv.argmax(1) == q_cv.argmax(1)).double().cpu()
        log_p_cv, log_q_cv = p_cv.log_softmax(1), q_cv.log_softmax(1)
        divergence_n[part] = (log_p_cv.exp() * (log_p_cv - log_q_cv)).sum(1).double().cpu()
    return agree_n, divergence_n
