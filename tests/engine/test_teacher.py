"""On the real SmolLM2-135M: batches equal single prompts, chats end by themselves, text streams whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subquad.bench.prompts import prompt_texts
from subquad.cli.generate import encode
from subquad.convert.transplant import transplant
from subquad.decode.copyspec import CopySpec
from subquad.decode.draft_model import DraftModel
from subquad.engine.generate import Limits, generate
from subquad.engine.trace import Look


def test_a_batch_of_real_prompts_equals_each_alone_up_to_near_ties(smollm2: Any) -> None:
    model, tokenizer = smollm2.model, smollm2.tokenizer
    texts = [
        "The capital of France is",
        "def fibonacci(n):\n    ",
        "Die Würde des Menschen ist unantastbar. Sie zu achten",
    ]
    prompts = [tokenizer.encode(text) for text in texts]
    limits = Limits(max_new_tokens=8, end_tokens=[])
    for prompt, got in zip(
        prompts, generate(model, prompts, limits=limits, tokenizer=tokenizer, logprobs=True), strict=True
    ):
        # One reading of prompt and answer gives the greedy choice at every step.
        with torch.no_grad():
            whole = model(torch.tensor([prompt + got.tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = whole.gather(1, torch.tensor(got.tokens)[:, None])[:, 0]
        # Float32 noise between batched steps and one reading was measured at 6e-5 at most; twice that.
        torch.testing.assert_close(torch.tensor(got.logprobs), chosen, rtol=0, atol=1.2e-4)
        assert (whole.max(-1).values - chosen).max() < 1.2e-4
        begun = tokenizer.decode(prompt, skip_special_tokens=True)
        assert begun + got.text == tokenizer.decode(prompt + got.tokens, skip_special_tokens=True)


def test_a_chat_answers_and_ends_by_itself(smollm2: Any) -> None:
    prompt = encode(smollm2, "What is the capital of France? Answer with one word.", True)
    (answer,) = generate(smollm2.model, [prompt], limits=Limits(24), tokenizer=smollm2.tokenizer)
    assert "Paris" in answer.text
    assert answer.finish == "end"
    assert "<|im_end|>" not in answer.text


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_guesses_verified_by_real_weights_give_the_greedy_choice_at_every_step(smollm2: Any, kind: str) -> None:
    """Copies and another model's guesses, three prompts side by side, by the teacher and by a hybrid made of it."""
    teacher, tokenizer = smollm2.model, smollm2.tokenizer
    hybrid = transplant(teacher, {layer: {"mixer": "windowed_linear", "window": 16} for layer in range(1, 30, 2)})
    model, other = (teacher, hybrid) if kind == "attention" else (hybrid, teacher)
    prompts = [tokenizer.encode(text) for text in (*prompt_texts("copies")[3:5], "The capital of France is")]
    limits, looks = Limits(max_new_tokens=16, end_tokens=[]), list[Look]()
    for drafter in (CopySpec(), DraftModel(other)):
        looks.clear()
        answers = generate(model, prompts, limits=limits, drafter=drafter, draft_tokens=3, on_look=looks.append)
        for prompt, got in zip(prompts, answers, strict=True):
            with torch.no_grad():
                whole = model(torch.tensor([prompt + got.tokens]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            chosen = whole.gather(1, torch.tensor(got.tokens)[:, None])[:, 0]
            assert (whole.max(-1).values - chosen).max() < 1.2e-4
        assert sum(look.kept for look in looks) > 8  # some rounds gave several tokens
