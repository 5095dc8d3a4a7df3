import json

import pytest
import torch

from subquad.core.errors import ConfigError, DataError
from subquad.evals import generation
from subquad.evals.generation import (
    Problem,
    Problems,
    asks_to_write,
    evaluate_problems,
    extract,
    load_problems,
    prompt_text,
    same_answer,
    write,
)

SUMS = [
    {
        "context": f"What is {i} and 1?",
        "chain_of_thought": f"It is {i}+1=<<{i}+1={i + 1}>>{i + 1}.",
        "answer": f"{i + 1}",
    }
    for i in range(5)
]
CODE = {
    "prompt": 'def add(x):\n    """Add one."""\n',
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1) == 2\n",
}


def saved(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_first_problems_are_examples_and_are_not_asked(tmp_path):
    path = saved(tmp_path / "sums.jsonl", *SUMS)
    assert asks_to_write(path)
    problems = load_problems(path, shots=2, limit=2)
    assert (problems.name, problems.kind) == ("sums", "answers")
    assert [p.question for p in problems.examples] == ["What is 0 and 1?", "What is 1 and 1?"]
    assert [p.answer for p in problems.items] == ["3", "4"]
    assert problems.items[0].worked == "It is 2+1=3."
    code = load_problems(saved(tmp_path / "code.jsonl", CODE, CODE), shots=4, limit=1)
    assert (code.kind, code.examples, len(code.items), code.items[0].entry) == ("code", (), 1, "add")


def test_files_of_choices_are_not_for_writing(tmp_path):
    assert not asks_to_write(saved(tmp_path / "a.jsonl", {"context": "a", "continuation": "b"}))
    assert not asks_to_write(saved(tmp_path / "b.jsonl", [1]))
    with pytest.raises(DataError, match="No such file"):
        asks_to_write(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"context": "a"}], "expected the keys context, answer or prompt, entry_point, test, got context"),
        ([{"context": "a", "answer": 3}], "expected text in context, answer"),
        ([SUMS[0], CODE], "one kind"),
        (SUMS[:2], "expected more than the 2 problems"),
    ],
)
def test_bad_files(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        load_problems(saved(tmp_path / "t.jsonl", *records), shots=2)


def test_prompts_show_the_examples(tokenizer, monkeypatch):
    items = tuple(Problem(r["context"], r["answer"], "So.") for r in SUMS[:2])
    problems = Problems("sums", "answers", items[1:], items[:1])
    chat = prompt_text(tokenizer, problems, items[1])
    ask = generation.INSTRUCTION
    assert chat == (
        f"<|im_start|>user\n{ask}\n\nWhat is 0 and 1?<|im_end|>\n<|im_start|>assistant\nSo.\n#### 1<|im_end|>\n"
        f"<|im_start|>user\n{ask}\n\nWhat is 1 and 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    text = f"{ask}\n\nQuestion: What is 0 and 1?\nAnswer: So.\n#### 1\n\nQuestion: What is 1 and 1?\nAnswer:"
    assert prompt_text(tokenizer, problems, items[1], plain=True) == text
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert prompt_text(tokenizer, problems, items[1]) == text


def test_code_is_begun_for_the_model(tokenizer):
    problems = Problems("code", "code", (Problem(CODE["prompt"], check=CODE["test"], entry="add"),))
    head = CODE["prompt"].rstrip()
    assert prompt_text(tokenizer, problems, problems.items[0], plain=True) == head
    assert prompt_text(tokenizer, problems, problems.items[0]).endswith(f"assistant\n```python\n{head}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3 + 4 = 7.\n#### 7", "7"),
        ("#### $1,234.50 dollars, not 9", "$1,234.50"),
        ("first 3, then 12.", "12"),
        ("She owes -5", "-5"),
        ("between 5-10", "10"),
        ("it is .5", ".5"),
        ("12,15", "15"),
        ("#### 1,234,567", "1,234,567"),
        ("minus: \u22127", "\u22127"),
        ("12 apples\n#### none", "12"),
        (" Blue ", "Blue"),
    ],
)
def test_the_answer_is_taken_out_of_the_text(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        ("$1,234.00", "1234", True),
        ("0.5", ".50", True),
        ("7", "70", False),
        ("-7", "7", False),
        ("\u22127", "-7", True),
        ("The  Moon", "the moon", True),
        ("7", "seven", False),
    ],
)
def test_answers_are_numbers_before_they_are_text(given, right, same):
    assert same_answer(given, right) is same


def test_answers_are_judged_in_the_order_of_the_problems(model, tokenizer, monkeypatch):
    said = {"1?": "It is\n#### 2", "2?": "4", "3?": "I don't know"}
    items = tuple(Problem(f"{'Well: ' * i}{key}", str(i + 2)) for i, key in enumerate(said))
    seen = []

    def written(_, __, prompts, **options):
        seen.append(options)
        return [said[tokenizer.decode(p).split("<|im_end|>")[-2].split()[-1]] for p in prompts]

    monkeypatch.setattr(generation, "write", written)
    result = evaluate_problems(model, tokenizer, Problems("sums", "answers", items), new_tokens=7)
    assert result.right_n.tolist() == [True, False, False]
    assert result.texts == tuple(said.values())
    assert result.accuracy.value == pytest.approx(1 / 3)
    assert seen[0]["new_tokens"] == 7


def test_code_passes_its_tests_or_not_and_only_with_leave(model, tokenizer, monkeypatch):
    problems = Problems("code", "code", (Problem(CODE["prompt"], check=CODE["test"], entry="add"),) * 3)
    texts = ["\n    return x + 1", "\n    return x", "\n    return x +"]
    monkeypatch.setattr(generation, "write", lambda *_, **__: texts)
    assert evaluate_problems(model, tokenizer, problems, run_code=True).right_n.tolist() == [True, False, False]
    with pytest.raises(ConfigError, match="give --run-code"):
        evaluate_problems(model, tokenizer, problems)


def test_what_is_written_is_greedy_and_the_same_in_any_batch(model, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("The sky is", "The man turned on the faucet", "What")]
    kept = {}
    alone = [write(model, tokenizer, [p], new_tokens=8)[0] for p in prompts]
    told = []
    for batch_tokens in (1, 10_000):
        texts = write(
            model,
            tokenizer,
            prompts,
            new_tokens=8,
            batch_tokens=batch_tokens,
            progress=lambda *n: told.append(n),
            keep=lambda i, tokens, finish: kept.update({i: (tokens, finish)}),
        )
        assert texts == alone
    assert told == [(1, 3), (2, 3), (3, 3), (3, 3)]
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert kept[i] == (tokens[len(prompt) :], "length")
    with pytest.warns(UserWarning, match="beyond the 256 positions"):
        write(model, tokenizer, [prompts[0] * 100], new_tokens=1)
