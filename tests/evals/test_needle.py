import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.engine.generate import Generation, Limits, generate
from subquad.evals import needle
from subquad.evals.needle import (
    FILLER,
    PASSKEY,
    NeedleGrid,
    NeedleResult,
    answer_logprobs,
    evaluate_needles,
    make_questions,
)
from subquad.evals.scoring import score_continuations

HAY = "The grass is green. The sky is blue. Water flowed from the spout, therefore. What is the man? " * 20
GRID = NeedleGrid(lengths=(300, 420), depths=(0.0, 0.5, 1.0), samples=2, digits=4)


def test_prompts_have_exact_lengths_and_needles_at_their_depths(tokenizer):
    questions = make_questions(tokenizer, HAY, GRID)
    assert [len(q.tokens) for q in questions] == [300] * 6 + [420] * 6
    for question in questions:
        text = tokenizer.decode(question.tokens)
        key = text.split("special magic number for ")[-1].split()[0]
        sentence = f" The special magic number for {key} is {question.value}."
        assert text.count(sentence) == 1
        body = text[text.index("\n\n") + 2 : text.rindex("\n\nWhat is the special")]
        before, after = body.split(sentence)
        depth = len(before) / len(before + after)
        assert depth == pytest.approx(question.depth, abs=0.25)
        assert not before or before.endswith((".", "?"))
        assert text.endswith(f"<|im_start|>assistant\nThe special magic number for {key} mentioned in the text is")


def test_the_same_seed_asks_the_same(tokenizer):
    assert make_questions(tokenizer, HAY, GRID) == make_questions(tokenizer, HAY, GRID)
    other = NeedleGrid(lengths=(300,), depths=(0.5,), samples=2, digits=4, seed=1)
    assert make_questions(tokenizer, HAY, other)[0].value != make_questions(tokenizer, HAY, GRID)[2].value


def test_distractors_have_other_keys_and_values(tokenizer):
    grid = NeedleGrid(lengths=(400,), depths=(0.5,), samples=3, digits=4, distractors=3)
    for question in make_questions(tokenizer, HAY, grid):
        assert len(question.tokens) == 400
        text = tokenizer.decode(question.tokens)
        said = [s.split(".")[0].split(" is ") for s in text.split("magic number for ")[1:] if " is " in s.split(".")[0]]
        needles = {key: value for key, value in said if value.isdigit()}
        assert len(needles) == 4
        asked = text.split("magic number for ")[-1].split()[0]
        assert needles[asked] == question.value


def test_a_model_without_template_is_asked_in_plain_text(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    question = make_questions(tokenizer, HAY, NeedleGrid(lengths=(300,), depths=(0.5,), samples=1, digits=4))[0]
    text = tokenizer.decode(question.tokens)
    assert text.startswith(needle.NUMBERS.intro)
    assert "<|im_start|>" not in text
    assert len(question.tokens) == 300


def test_grids_that_ask_nothing(tokenizer):
    with pytest.raises(ConfigError, match="use a length of at least"):
        make_questions(tokenizer, HAY, NeedleGrid(lengths=(60,), samples=1))
    with pytest.raises(ConfigError, match="depths from 0 to 1"):
        NeedleGrid(depths=(50,))
    with pytest.raises(ConfigError, match="expected lengths"):
        NeedleGrid(lengths=())


def test_likelihood_of_the_number_equals_that_of_the_whole_sequence(model, tokenizer):
    questions = make_questions(tokenizer, HAY, NeedleGrid(lengths=(230, 200), depths=(0.5,), samples=1, digits=4))
    got = answer_logprobs(model, tokenizer, questions, others=9)
    assert got.shape == (2, 10)
    requests = [(q.tokens, tokenizer.encode(f" {q.value}", add_special_tokens=False)) for q in questions]
    want = torch.stack([s.logprob_n.sum() for s in score_continuations(model, requests)])
    torch.testing.assert_close(got[:, 0], want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(answer_logprobs(model, tokenizer, questions)[:, 0], want, rtol=1e-10, atol=1e-10)
    hits = evaluate_needles(model, tokenizer, questions, by="likelihood").hit_n
    assert hits.tolist() == [bool((row[0] > row[1:]).all()) for row in got]


def test_numbers_of_other_keys_are_the_first_rivals(model, tokenizer, monkeypatch):
    grid = NeedleGrid(lengths=(400,), depths=(0.5,), samples=2, distractors=3, digits=4)
    questions = make_questions(tokenizer, HAY, grid)
    for question in questions:
        text = tokenizer.decode(question.tokens)
        assert len(set(question.others)) == 3 and all(f" {other}." in text for other in question.others)
    seen = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: seen.append(text) or encode(text, **options))
    answer_logprobs(model, tokenizer, questions, others=9)
    assert [seen[10 * i : 10 * i + 4] for i in (0, 1)] == [[f" {v}" for v in (q.value, *q.others)] for q in questions]


def test_generation_counts_the_number_and_nothing_longer(model, tokenizer, monkeypatch):
    grid = NeedleGrid(lengths=(240,), depths=(0.5,), samples=5, digits=4)
    questions = make_questions(tokenizer, HAY, grid)
    v = [q.value for q in questions]
    texts = [f" {v[0]}.", f" {v[1]}7", f" 1{v[2]}", f" {v[3][:3]}", f": {v[4]}"]
    monkeypatch.setattr(needle, "generate", lambda *_, **__: [Generation(tokenizer.encode(texts.pop(0)))])
    result = evaluate_needles(model, tokenizer, questions, batch_tokens=1)
    assert result.hit_n.tolist() == [True, False, False, False, True]
    assert result.accuracy(240, 0.5).value == pytest.approx(2 / 5)


def test_generation_runs_and_long_prompts_warn(model, tokenizer):
    questions = make_questions(tokenizer, HAY, NeedleGrid(lengths=(300,), depths=(0.5,), samples=2, digits=4))
    seen = []
    with pytest.warns(UserWarning, match="beyond the 256 positions"):
        result = evaluate_needles(model, tokenizer, questions, progress=lambda *args: seen.append(args))
    assert result.by == "generation"
    assert seen == [(600, 600)]
    with pytest.raises(ConfigError, match="generation or likelihood"):
        evaluate_needles(model, tokenizer, questions, by="luck")


def test_batches_hold_prompts_of_like_length_and_keep_their_order(model, tokenizer, monkeypatch):
    grid = NeedleGrid(lengths=(240, 300, 270), depths=(0.5,), samples=2, digits=4)
    questions = make_questions(tokenizer, HAY, grid)
    batches = []

    def answer(_, prompts, limits):
        batches.append([len(p) for p in prompts])
        assert limits.chunk == max(batches[-1])
        # The number itself where the prompt has 270 tokens.
        return [
            Generation(tokenizer.encode(next(q.value for q in questions if q.tokens == tuple(p))) * (len(p) == 270))
            for p in prompts
        ]

    monkeypatch.setattr(needle, "generate", answer)
    with pytest.warns(UserWarning, match="beyond the 256 positions"):
        result = evaluate_needles(model, tokenizer, questions, batch_tokens=600)
    assert batches == [[300, 300], [270, 270], [240, 240]]
    assert result.hit_n.tolist() == [False] * 4 + [True] * 2
    assert result.length_n == (240, 240, 300, 300, 270, 270)


def test_one_long_read_gives_what_chunks_give(model, tokenizer):
    questions = make_questions(tokenizer, HAY, NeedleGrid(lengths=(240,), depths=(0.2, 0.7), samples=1, digits=4))
    prompts = [q.tokens for q in questions]
    whole, pieces = (generate(model, prompts, limits=Limits(6, chunk=chunk)) for chunk in (240, 37))
    assert [g.tokens for g in whole] == [g.tokens for g in pieces]


def test_a_passkey_stands_in_the_filler_at_its_depth(tokenizer):
    grid = NeedleGrid(lengths=(400,), depths=(0.1, 0.9), samples=1, digits=4)
    for question in make_questions(tokenizer, FILLER, grid, PASSKEY):
        text = tokenizer.decode(question.tokens)
        assert len(question.tokens) == 400 and text.count(question.value) == 2
        body = text[text.index("\n\n") + 2 : text.rindex("\n\nWhat is the passkey")]
        before, after = body.split(" " + PASSKEY.needle.format(value=question.value))
        assert len(before) / len(before + after) == pytest.approx(question.depth, abs=0.12)
        assert text.endswith("assistant\nThe passkey is")
        assert all(sentence in FILLER + FILLER for sentence in after.strip().split(". ")[1:-1])
    with pytest.raises(ConfigError, match="expected no distractors"):
        make_questions(tokenizer, FILLER, NeedleGrid(distractors=1), PASSKEY)


def test_no_two_needles_hold_one_number(tokenizer):
    grid = NeedleGrid(lengths=(2400,), depths=(0.5,), samples=4, digits=2, distractors=20)
    for question in make_questions(tokenizer, HAY, grid):
        text = tokenizer.decode(question.tokens)
        values = [part.split(" is ")[1].split(".")[0] for part in text.split("magic number for ")[1:] if " is " in part]
        assert len(set(values[:21])) == 21
    with pytest.raises(ConfigError, match="more digits"):
        NeedleGrid(digits=1, distractors=5)


def test_retention_is_what_is_left_of_the_teachers():
    def result(hits):
        return NeedleResult("generation", (900,) * 6, (0.5,) * 6, torch.tensor(hits, dtype=torch.bool))

    teacher, student = result([1, 1, 1, 1, 0, 0]), result([1, 1, 1, 0, 0, 0])
    retention = needle.needle_retention(student, teacher)
    assert retention.value == pytest.approx(0.75)
    assert retention.low <= 0.75 <= retention.high
    with pytest.raises(ConfigError, match="finds something"):
        needle.needle_retention(student, result([0] * 6))
    with pytest.raises(ConfigError, match="same questions"):
        needle.needle_retention(student, NeedleResult("generation", (900,), (0.5,), torch.tensor([True])))
