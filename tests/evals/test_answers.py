import json

import pytest
import torch

from subquad.core.errors import DataError
from subquad.evals.answers import answer, common, load_prompts, loop_start
from subquad.evals.generation import write

PROMPTS = [("The sky?", "And the grass?"), ("One?",), ("What is the number?", "Why?", "Is it?")]


def test_prompts_of_either_kind_are_spread_over_the_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"turns": [f"q{i}", "more"]} if i % 2 else {"prompt": f"q{i}"}) + "\n" for i in range(9))
    )
    assert load_prompts(path, 3) == [("q0",), ("q3", "more"), ("q6",)]
    assert len(load_prompts(path)) == len(load_prompts(path, 50)) == 9
    for text, message in (
        ("", "at least one prompt"),
        ('{"turns": []}', "expected turns"),
        ('{"turn": "a"}', "got turn"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_prompts(path)


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
@pytest.mark.parametrize("template", [True, False])
def test_each_turn_follows_the_models_own_answers(model, tokenizer, monkeypatch, template, batch_tokens):
    if not template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    told = []
    found = answer(
        model, tokenizer, PROMPTS, new_tokens=5, batch_tokens=batch_tokens, progress=lambda *n: told.append(n)
    )
    at = 0
    for turns in PROMPTS:
        text, said = "", []
        for turn in turns:
            if template:
                text += f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
            else:
                text += f"{turn}\n\n"
            (reply,) = write(model, tokenizer, [tokenizer.encode(text, add_special_tokens=False)], new_tokens=5)
            said.append(reply)
            text += reply + ("<|im_end|>\n" if template else "\n\n")
        assert list(found.texts[at : at + len(turns)]) == said
        at += len(turns)
    assert found.length_n.tolist() == [5] * 6 and found.cut_n.all()
    assert told[-1] == (6, 6)


def test_loops_are_found_where_they_begin():
    count = list(range(100))
    assert loop_start(count) is None
    assert loop_start([]) is None
    assert loop_start(count[:7] + [50, 51, 52] * 9) == 7
    assert loop_start(count[:7] + [50, 51, 52] * 8 + [50]) == 7
    assert loop_start(count[:7] + count[10:40] * 3) == 7
    assert loop_start(count[:7] + count[10:40] * 2) is None
    assert loop_start(count[:7] + [50] * 23) is None
    assert loop_start([50, 51] * 20 + [1, 2, 3]) is None


def test_texts_part_at_their_first_difference():
    assert (common("abc", "abd"), common("ab", "abc"), common("", "a"), common("a", "a")) == (2, 2, 0, 1)


def test_a_loop_of_a_real_answer_is_flagged(model, tokenizer, monkeypatch):
    # A head that always prefers one token says it for ever.
    head = model.head

    def one(hidden):
        logits = head(hidden)
        return torch.where(torch.arange(logits.shape[-1]) == 40, 1e4, logits)

    monkeypatch.setattr(model, "head", one)
    found = answer(model, tokenizer, PROMPTS[1:2], new_tokens=30)
    assert found.loop_n.tolist() == [0] and found.length_n.tolist() == [30]
