"""The teacher's own samples: the same whatever interrupts them, and read back as what they are."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.convert.transplant.samples import _Part, is_own, own_samples, rows_at_once, write_samples
from subquad.core.errors import DataError
from subquad.data import Source, TokenStream
from subquad.engine.generate import Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
TEMPLATE = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + ':' + m['content'] + '<over>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant:' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<over>", chat_template=TEMPLATE)
    fast.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    return fast


@pytest.fixture
def teacher(tokenizer):
    model = Stack(ModelConfig(len(tokenizer), 16, 24, (LAYER,), eos_tokens=(5, 7))).double()
    with torch.no_grad():
        # An end comes after some twenty tokens, and letters are what is likely else.
        model.lm_head.weight.normal_()
        model.embed.weight.normal_()
    return model.requires_grad_(False)


def questions(count=9):
    return Source("questions", lambda: iter("why? " * (i % 4) + f"what is {i}?" for i in range(count)))


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_teacher_alone(tmp_path, teacher, tokenizer):
    path = tmp_path / "a.jsonl"
    write_samples(teacher, tokenizer, path, documents=99, length=120, prompts=questions(), rows=4, seed=11)
    got = records(path)
    assert {r["messages"][0]["content"] for r in got} == set(questions().open())
    for i, record in enumerate(got):
        asked, said = record["messages"]
        ids = tokenizer.encode(f"<turn>user:{asked['content']}<over><turn>assistant:", add_special_tokens=False)
        limits = Limits(max_new_tokens=60, end_tokens=(5, 7, tokenizer.eos_token_id))
        (alone,) = generate(teacher, [ids], limits=limits, sampling=SamplingConfig(temperature=1.0, seed=11 + i))
        inner = alone.tokens[:-1] if alone.finish == "end" else alone.tokens
        assert (said["role"], record["finish"]) == ("assistant", alone.finish)
        assert said["content"] == tokenizer.decode(inner, skip_special_tokens=True)
    assert {r["finish"] for r in got} == {"end", "length"}


@pytest.mark.parametrize("prompts", [None, questions()])
def test_an_interrupted_call_loses_nothing_and_ends_the_same(tmp_path, teacher, tokenizer, prompts, monkeypatch):
    options = {"documents": 9, "length": 90, "prompts": prompts, "rows": 2, "seed": 3}
    write_samples(teacher, tokenizer, tmp_path / "whole.jsonl", **options)
    path, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.unfinished"
    shown, add = [], _Part.add

    def stop(self, number, record):
        add(self, number, record)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Part, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        write_samples(teacher, tokenizer, path, **options)
    monkeypatch.undo()
    assert not path.exists() and len(part.read_text().splitlines()) == 3
    with pytest.raises(DataError, match=r"a.jsonl: expected samples with seed 4, got 3; give the same settings, move"):
        write_samples(teacher, tokenizer, path, **options | {"seed": 4})
    with part.open("a") as file:
        file.write('[8, {"te')  # the power went here
    write_samples(teacher, tokenizer, path, **options, display=shown.append)
    assert shown[-1].step == 9 and shown[-1].share == 1.0
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not part.exists()


@pytest.mark.parametrize("finished", [True, False])
def test_samples_of_something_else_are_refused(tmp_path, teacher, tokenizer, finished):
    path, options = tmp_path / "a.jsonl", {"documents": 3, "length": 40, "seed": 3}
    write_samples(teacher, tokenizer, path, **options)
    before = path.read_text()
    if not finished:
        path.rename(tmp_path / "a.jsonl.unfinished")
    for change in ({"documents": 4}, {"length": 41}, {"seed": 4}, {"temperature": 0.5}):
        ((name, value),) = change.items()
        with pytest.raises(DataError, match=f"expected samples with {name} {value}, got "):
            write_samples(teacher, tokenizer, path, **options | change)
    with pytest.raises(DataError, match="expected samples with prompts questions, got None"):
        write_samples(teacher, tokenizer, path, prompts=questions(), **options)
    other = copy.deepcopy(teacher)
    other.norm.weight[0] += 1e-3
    with pytest.raises(DataError, match="expected samples with teacher [0-9a-f]+, got [0-9a-f]+;"):
        write_samples(other, tokenizer, path, **options)
    if finished:
        write_samples(teacher, tokenizer, path, **options)
        assert path.read_text() == before
    # Nobody knows what these were drawn from.
    (tmp_path / "a.terms.json").unlink()
    with pytest.raises(DataError, match="expected samples with teacher [0-9a-f]+, got no record of it"):
        write_samples(teacher, tokenizer, path, **options)


def test_a_source_of_answers_trains_on_them_only(tmp_path, teacher, tokenizer):
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(json.dumps({"q": q, "a": "no"}) for q in questions().open()))
    spec = f"self:{asked}#q+a,completions,weight=2"
    assert is_own(spec) and is_own("self") and is_own("self,weight=3") and not is_own(str(asked))
    out = tmp_path / "out"
    source = own_samples(spec, teacher, tokenizer, out, documents=99, length=120, seed=2)
    assert (source.name, source.weight, source.completions) == (spec, 2.0, True)
    (path,) = out.glob("*.jsonl")
    before = path.read_text()
    own_samples(spec, teacher, tokenizer, out, documents=99, length=120, seed=2)
    assert path.read_text() == before
    with pytest.raises(DataError, match="expected samples with seed 99, got 2"):
        own_samples(spec, teacher, tokenizer, out, documents=99, length=120, seed=99)
    stream = TokenStream([source], tokenizer, batch=1, time=16, fraction=0.0, chunk_tokens=64)
    batch = next(stream)
    assert batch.wanted_bt is not None and bool(batch.wanted_bt.any())
    # The old answer is not in the prompt, and the new one is the label.
    assert all("no<over>" not in tokenizer.apply_chat_template(d, tokenize=False) for d in source.open())
    assert [d[0] for d in source.open()] == [r["messages"][0] for r in records(path)]


def test_samples_from_nothing_have_room_to_the_last_token(tmp_path, teacher, tokenizer):
    source = own_samples("self", teacher, tokenizer, tmp_path, documents=5, length=30)
    texts = list(source.open())
    assert len(set(texts)) == 5 and all(text.startswith("<over>") for text in texts)
    assert rows_at_once(teacher, 64) == 16


def test_what_can_not_be_asked(tmp_path, teacher, tokenizer):
    with pytest.raises(DataError, match="questions: expected prompts of at most 5 tokens, got 9 others; raise --seq"):
        write_samples(teacher, tokenizer, tmp_path / "a", documents=9, length=10, prompts=questions())
    only = Source("x", lambda: iter([[{"role": "assistant", "content": "hi"}]]))
    with pytest.raises(DataError, match="x: expected a conversation that asks something"):
        write_samples(teacher, tokenizer, tmp_path / "a", documents=9, length=10, prompts=only)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="expected a tokenizer with a start or end token"):
        write_samples(teacher, tokenizer, tmp_path / "a", documents=9, length=10)


def test_samples_at_another_temperature_lie_beside_the_others(tmp_path, teacher, tokenizer):
    drawn, greedy = (
        own_samples(spec, teacher, tokenizer, tmp_path, documents=4, length=12) for spec in ("self", "self@0")
    )
    assert is_own("self@0.7:a.jsonl,weight=2") and not is_own("selfies.txt")
    assert len(set(drawn.open())) > 1
    assert len(set(greedy.open())) == 1
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"samples.jsonl", "samples-0.jsonl"}
    for text in ("warm", "-1", "inf"):
        with pytest.raises(DataError, match=f"self@{text}: expected a temperature of at least 0 behind self@, got"):
            own_samples(f"self@{text}", teacher, tokenizer, tmp_path, documents=1, length=12)
