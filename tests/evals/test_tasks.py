import json
import lzma
import math

import pytest
import torch

from subquad.core.errors import DataError
from subquad.evals.scoring import score_continuations
from subquad.evals.tasks import Item, Task, encode_pair, evaluate_task, load_task


def naive_logprobs(model, context, continuation):
    logits = model(torch.tensor([context + continuation]))[0, len(context) - 1 : -1].detach()
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0], logits.argmax(-1)


def write(path, *records):
    lines = "".join(json.dumps(r) + "\n" for r in records)
    with lzma.open(path, "wt") if path.suffix == ".xz" else open(path, "w") as f:
        f.write(lines)
    return path


def test_scores_equal_one_sequence_at_a_time(model):
    generator = torch.Generator().manual_seed(0)
    requests = []
    for n, m in [(1, 1), (5, 3), (17, 1), (17, 2), (40, 9), (2, 30), (1, 4)]:
        tokens = torch.randint(3, 100, (n + m,), generator=generator).tolist()
        requests.append((tokens[:n], tokens[n:]))
    requests += [(requests[2][0], [7]), (requests[2][0], [8])]  # share a row with the third
    for batch_tokens in (1, 60, 10_000):
        for (context, continuation), score in zip(
            requests, score_continuations(model, requests, batch_tokens=batch_tokens), strict=True
        ):
            want, best = naive_logprobs(model, context, continuation)
            torch.testing.assert_close(score.logprob_n, want, rtol=1e-10, atol=1e-10)
            assert score.greedy_n.tolist() == (best == torch.tensor(continuation)).tolist()


def test_requests_alike_but_for_the_last_token_are_read_once(model, monkeypatch):
    rows = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, layout: rows.append(len(tokens)) or hidden(tokens, layout))
    score_continuations(model, [([1, 2, 3], [t]) for t in range(4)])
    assert rows == [1]


def test_boundary_spaces_go_to_the_continuation(tokenizer):
    context, continuation = encode_pair(tokenizer, "The sky is ", "blue")
    assert tokenizer.decode(context) == "The sky is"
    assert tokenizer.decode(continuation) == " blue"
    assert context + continuation == tokenizer.encode("The sky is blue", add_special_tokens=False)


def test_a_token_over_the_boundary_is_scored_with_the_continuation(tokenizer):
    context, continuation = encode_pair(tokenizer, "The gre", "en grass")
    assert context + continuation == tokenizer.encode("The green grass", add_special_tokens=False)
    assert tokenizer.decode(context) == "The"
    assert tokenizer.decode(continuation) == " green grass"


def test_an_empty_context_starts_from_the_begin_token(tokenizer):
    context, continuation = encode_pair(tokenizer, "", "blue")
    assert context == [tokenizer.bos_token_id]
    assert tokenizer.decode(continuation) == "blue"


def test_begin_token_goes_where_the_tokenizer_puts_it(tokenizer):
    class Beginning:
        bos_token_id, eos_token_id = 1, 0

        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + tokenizer.encode(text, add_special_tokens=False)

    context, continuation = encode_pair(Beginning(), "The sky is ", "blue")
    assert context[0] == 1
    assert context[1:] + continuation == tokenizer.encode("The sky is blue", add_special_tokens=False)


@pytest.mark.parametrize("ending", ["", ".xz"])
def test_files_of_both_kinds(tmp_path, ending):
    choice = {"query": "Q:", "choices": ["a", "b", "c"], "gold": 2, "extra": 1}
    task = load_task(write(tmp_path / f"copa.jsonl{ending}", choice, choice), delimiter="\nAnswer: ")
    assert task == Task("copa", "choice", (Item("Q:", ("a", "b", "c"), 2),) * 2, "\nAnswer: ")
    cloze = {"context": "In my palm", "continuation": "signs"}
    assert load_task(write(tmp_path / "l.jsonl", cloze, cloze), limit=1).items == (Item("In my palm", ("signs",), 0),)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"context": "a", "answer": "b"}], "expected the keys context, continuation or query, choices, gold"),
        ([[1]], "expected the keys"),
        ([{"query": "a", "choices": ["b", "c"], "gold": 2}], "gold among them"),
        ([{"query": "a", "choices": ["b"], "gold": 0}], "at least two choices"),
        ([{"query": "a", "choices": ["b", ""], "gold": 0}], "non-empty choices"),
        ([{"query": "a", "choices": ["b", "c"], "gold": "1"}], "integer gold"),
        ([], "one kind, got none"),
        ([{"context": "a", "continuation": "b"}, {"query": "a", "choices": ["b", "c"], "gold": 0}], "one kind"),
    ],
)
def test_bad_records(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path / "t.jsonl", *records))


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_task(tmp_path / "none.jsonl")
    (tmp_path / "t.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="line 1: expected a JSON object"):
        load_task(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl.xz").write_text("not xz")
    with pytest.raises(DataError, match="readable"):
        load_task(tmp_path / "t.jsonl.xz")


def test_choice_picks_by_sum_and_by_characters(model, tokenizer):
    items = [Item("The sky is", ("blue", "green, the sky is blue", "4"), i % 3) for i in range(5)]
    items.append(Item("water flowed", ("from", "a"), 1))
    result = evaluate_task(model, tokenizer, Task("t", "choice", tuple(items)))
    for item, right, right_normalised in zip(items, result.right_n, result.right_normalised_n, strict=True):
        pairs = [encode_pair(tokenizer, item.context + " ", c) for c in item.choices]
        sums = torch.stack([naive_logprobs(model, *p)[0].sum() for p in pairs])
        lengths = torch.tensor([len(c) for c in item.choices])
        assert bool(right) == (int(sums.argmax()) == item.gold)
        assert bool(right_normalised) == (int((sums / lengths).argmax()) == item.gold)
    assert result.chance == pytest.approx((5 / 3 + 1 / 2) / 6)
    assert result.above_chance(result.accuracy).value == pytest.approx(
        (result.accuracy.value - result.chance) / (1 - result.chance)
    )
    above = result.above_chance(result.accuracy_normalised)
    assert float(result.above_n.mean()) == pytest.approx(above.value, rel=1e-12)


def test_cloze_counts_exact_greedy_words(model, tokenizer):
    # Continue greedily by hand: that continuation is right, any other wrong.
    context = tokenizer.encode("The sky is", add_special_tokens=False)
    greedy = int(model(torch.tensor([context]))[0, -1].argmax())
    scores = score_continuations(model, [(context, [greedy]), (context, [greedy ^ 1])])
    assert [bool(s.greedy_n.all()) for s in scores] == [True, False]
    task = Task("l", "cloze", (Item("The sky is", ("blue",), 0), Item("The man turned on the", ("faucet, water",), 0)))
    result = evaluate_task(model, tokenizer, task)
    sums, counts = [], []
    for item in task.items:
        logprobs, _ = naive_logprobs(model, *encode_pair(tokenizer, item.context + " ", item.choices[0]))
        sums.append(float(logprobs.sum()))
        counts.append(len(logprobs))
    assert result.item_perplexity.value == pytest.approx(math.exp(-sum(sums) / 2), rel=1e-10)
    assert result.token_perplexity.value == pytest.approx(math.exp(-sum(sums) / sum(counts)), rel=1e-10)


def test_a_context_beyond_the_model_loses_its_beginning(model, tokenizer):
    long = Item("The grass is green." * 200, ("blue",), 0)
    result = evaluate_task(model, tokenizer, Task("l", "cloze", (long,)))
    context, continuation = encode_pair(tokenizer, long.context + " ", "blue")
    want, _ = naive_logprobs(model, context[-(256 - len(continuation) + 1) :], continuation)
    assert float(result.logprob_n[0]) == pytest.approx(float(want.sum()), rel=1e-10)
