"""What models write: problems with a right answer, conversations side by side, and agreement with a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from subquad.core.errors import ConfigError
from subquad.evals.agreement import Agreement, evaluate_agreement, prompts_from_text
from subquad.evals.answers import Answered, Turns, answer, common
from subquad.evals.generation import Problems, Written, evaluate_problems
from subquad.evals.report import Answers, Dialogue, Said, Section
from subquad.evals.stats import Paired, bootstrap_ratio, paired_difference, sign_flip, wilson
from subquad.evals.suite import Compare, Suite
from subquad.evals.text import TextTokens


def problems(
    suite: Suite, problems: Problems, *, new_tokens: int = 256, plain: bool = False, run_code: bool = False
) -> None:
    """Word problems by exact match, or code by its tests."""
    found = suite.measure(
        problems.name,
        "problems",
        Written,
        ("problems", problems, new_tokens, plain),
        lambda m, progress: evaluate_problems(
            m.model,
            suite.tokenizer,
            problems,
            new_tokens=new_tokens,
            plain=plain,
            run_code=run_code,
            batch_tokens=suite.batch_tokens,
            progress=progress,
        ),
    )
    shape = {"problems": len(problems.items), "shots": len(problems.examples), "new_tokens": new_tokens}
    kind, label = ("pass1", "passed at the first try") if problems.kind == "code" else ("exact", "exact answers")
    suite.add(
        f"task.{problems.name}.{kind}",
        f"{problems.name}, {label}",
        "1",
        "higher",
        found,
        lambda r: r.accuracy,
        shape | {"plain": plain or not suite.tokenizer.chat_template},
        lambda a, b: paired_difference(a.right_n, b.right_n),
        chance=0.0,
    )
    shown = [
        Answers(problem.question, {_verdict(suite, who, r, i): r.texts[i] for who, r in found.items()})
        for i, problem in enumerate(problems.items[:3])
    ]
    suite.sections.append(Section(f"Answers to {problems.name}", shown, "The first few, as they were written."))


def prompts(suite: Suite, prompts: Sequence[Turns], *, new_tokens: int = 256) -> None:
    """Answers to conversations, side by side in the report, and how many of them fall into a loop."""
    found = suite.measure(
        "prompts",
        "answers",
        Answered,
        ("answers", prompts, new_tokens),
        lambda m, progress: answer(
            m.model,
            suite.tokenizer,
            prompts,
            new_tokens=new_tokens,
            batch_tokens=suite.batch_tokens,
            progress=progress,
        ),
    )
    tokens = {suite.labels[who]: round(float(r.length_n.double().mean()), 1) for who, r in found.items()}
    shape = {"prompts": len(prompts), "answers": sum(map(len, prompts)), "new_tokens": new_tokens, "tokens": tokens}
    suite.add(
        "answers.loops",
        "answers that fall into a loop",
        "1",
        "lower",
        found,
        lambda r: wilson(int((r.loop_n >= 0).sum()), len(r.loop_n)),
        shape,
        lambda a, b: paired_difference(a.loop_n >= 0, b.loop_n >= 0),
    )
    held = "teacher" if "teacher" in found else "model"
    order = [held, *(who for who in found if who != held)]
    at, parts = 0, list[Dialogue]()
    for turns in prompts:
        said = [
            {suite.labels[who]: _said(found[who], found[held], i) for who in order} for i in range(at, at + len(turns))
        ]
        parts.append(Dialogue(list(zip(turns, said, strict=True))))
        at += len(turns)
    words = (
        f"Greedy, at most {new_tokens} tokens; marked where an answer first differs from that of {suite.labels[held]}."
    )
    suite.sections.append(Section("Side by side", parts, words))


def agreement(suite: Suite, text: TextTokens, prompts: int, *, prompt_tokens: int = 64, new_tokens: int = 32) -> None:
    """How far the model follows the teacher's greedy answers to beginnings from a text."""
    if "teacher" not in suite.models:
        raise ConfigError("agreement: expected a teacher to agree with, got none; give --teacher")
    teacher = suite.models["teacher"]
    beginnings = prompts_from_text(text, prompts, prompt_tokens)
    found = suite.measure(
        "agreement",
        "prompts",
        Agreement,
        ("agreement", beginnings, new_tokens, suite.fingerprint("teacher") if suite.memo else ""),
        lambda m, progress: evaluate_agreement(
            m.model,
            teacher.model,
            beginnings,
            new_tokens=new_tokens,
            batch=max(1, suite.batch_tokens // (prompt_tokens + new_tokens)),
            batch_tokens=suite.batch_tokens,
            progress=progress,
        ),
        ("model", "baseline"),
    )

    def share(counted: str) -> Compare:
        def compare(first: Agreement, second: Agreement) -> Paired:
            differences_n = getattr(first, counted) - getattr(second, counted)
            return Paired("difference", bootstrap_ratio(differences_n, first.tokens_n), sign_flip(differences_n))

        return compare

    shape = {"prompts": prompts, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    label = "same most likely token, along the teacher's answers"
    suite.add("agreement.match", label, "1", "higher", found, lambda r: r.match, shape, share("match_n"))
    label = "KL(teacher || model) along them"
    suite.add("agreement.kl", label, "nats/token", "lower", found, lambda r: r.kl, shape, share("kl_n"))
    label = f"tokens before its own answer differs, of {new_tokens}"
    suite.add(
        "agreement.same",
        label,
        "tokens",
        "higher",
        found,
        lambda r: r.same,
        shape,
        lambda a, b: paired_difference(a.same_n, b.same_n),
    )


def _verdict(suite: Suite, who: str, result: Written, i: int) -> str:
    return f"{suite.labels[who]}: {'right' if result.right_n[i] else 'wrong'}"


def _said(mine: Answered, other: Answered, i: int) -> Said:
    """One answer with its length and its flaws, and where it parts from the other's."""
    text, loop = mine.texts[i], int(mine.loop_n[i])
    remarks = [f"{int(mine.length_n[i])} tokens"]
    remarks += ["cut off"] if bool(mine.cut_n[i]) else []
    remarks += [f"loops from token {loop}"] if loop >= 0 else []
    if mine is other:
        return Said(text, ", ".join(remarks))
    if text == other.texts[i]:
        return Said(text, ", ".join([*remarks, "the same"]))
    return Said(text, ", ".join(remarks), common(text, other.texts[i]))
