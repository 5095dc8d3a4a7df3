"""Documents, the split, and streams that resume to the token."""

import gzip
import itertools
import json
import lzma
import subprocess
import sys
import sysconfig
import time
import types

import pytest
import torch

from subquad.core.errors import ConfigError, DataError
from subquad.data import Source, TokenStream, held_out_batch, held_out_text, parse_source
from subquad.data import stream as streams
from subquad.data.documents import Documents, Rendered, held_out
from subquad.data.sources import pieces, render, split_options


class Bytes:
    """A tokenizer of bytes: ids 0..255, end token 256."""

    eos_token_id = 256
    chat_template = None

    def __call__(self, text, *, add_special_tokens, verbose):
        assert add_special_tokens is False
        return {"input_ids": [list(t.encode()) for t in text]}

    def apply_chat_template(self, conversation, *, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role']}>{m['content']}" for m in conversation)


def memory(name, texts, **options):
    return Source(name, lambda: iter(texts), **options)


def tokenise(texts, tokenizer):
    return streams.tokenise([Rendered(text) for text in texts], tokenizer)


def words(seed, n, length=40):
    generator = torch.Generator().manual_seed(seed)
    return [
        f"{seed}.{i} " + "".join(chr(97 + int(c)) for c in torch.randint(26, (length,), generator=generator))
        for i in range(n)
    ]


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".xz", lzma.open), (".gz", gzip.open)])
def test_text_file_is_cut_at_paragraphs_and_loses_nothing(tmp_path, suffix, opener):
    text = "\n\n".join(f"paragraph {i} " + "x" * 700 for i in range(40)) + "\n"
    path = tmp_path / f"a.txt{suffix}"
    with opener(path, "wt", encoding="utf-8") as f:
        f.write(text)
    documents = list(parse_source(str(path)).open())
    assert "".join(documents) == text
    assert all(d.endswith("\n\n") and 8_192 <= len(d) < 10_000 for d in documents[:-1])
    assert len(documents) == 4


def test_jsonl_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = [{"text": "plain"}, {"messages": turns}, {"prompt": "q", "response": "a"}]
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    assert list(parse_source(str(path)).open()) == ["plain", turns, turns]
    path.write_text(json.dumps({"question": "q", "answer": "a", "text": "t"}))
    assert list(parse_source(f"{path}#question+answer").open()) == [turns]
    assert list(parse_source(f"{path}#question").open()) == ["q"]
    with pytest.raises(DataError, match=r"a.jsonl:1: no field 'questoin'; did you mean 'question'\?"):
        list(parse_source(f"{path}#questoin").open())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "expected text, messages, or prompt and response, got a; name the field"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "a.jsonl:1: expected one JSON object a line"),
        ('{"messages": ["hi"]}', "a.jsonl:1: expected messages like"),
        ('{"messages": [{"role": "user"}]}', "a.jsonl:1: expected messages like"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(parse_source(str(path)).open())


def test_bad_files(tmp_path):
    (tmp_path / "story.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "a.bin").write_text("x")
    (tmp_path / "a.txt.xz").write_bytes(b"no xz at all")
    with pytest.raises(DataError, match=r"no such file; did you mean 'story.txt'\?"):
        parse_source(str(tmp_path / "storie.txt"))
    with pytest.raises(DataError, match=r"got '.bin'; rename"):
        parse_source(str(tmp_path / "a.bin"))
    for name in ("story.txt", "a.txt.xz"):
        with pytest.raises(DataError, match="intact UTF-8"):
            list(parse_source(str(tmp_path / name)).open())


def test_pydoc_is_text_enough():
    documents = list(parse_source("pydoc").open())
    assert len(documents) > 60
    assert sum(map(len, documents)) > 300_000


def test_pycode_asks_for_functions_and_answers_with_them(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        'def f(x):\n    """Twice."""\n    return 2 * x\n\n\ndef g():\n    return 1\n\n\n'
        'class C:\n    def h(self):\n        """Nothing,\n\n        at length.\n        """\n        pass\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "odd.py").write_text('def t():\n    """Odd."""\n    return 1\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    first, second = parse_source("pycode").open()
    assert first == [
        {"role": "user", "content": 'Complete this Python function.\n\n```python\ndef f(x):\n    """Twice."""\n```'},
        {"role": "assistant", "content": '```python\ndef f(x):\n    """Twice."""\n    return 2 * x\n```'},
    ]
    assert second[0]["content"].endswith('def h(self):\n    """Nothing,\n\n    at length.\n    """\n```')


def test_there_is_code_in_every_python():
    documents = list(itertools.islice(parse_source("pycode").open(), 1000))
    assert len(documents) == 1000


def test_datasets_arguments(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"content": "x"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(parse_source("datasets:o/n:c@validation#content").open()) == ["x"]
    assert list(parse_source("datasets:o/n#content").open()) == ["x"]
    assert calls == [("o/n", "c", "validation", True), ("o/n", None, "train", True)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .subquad\[datasets\]"):
        list(parse_source("datasets:o/n").open())


def test_chat_template_renders_where_there_is_one():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tokenizer = Bytes()
    assert render(turns, tokenizer) == "q\n\na"
    tokenizer.chat_template = "there"
    assert render(turns, tokenizer) == "<user>q<assistant>a"


def test_pieces_join_to_the_text_and_break_at_spaces():
    text = " ".join(f"word{i}" for i in range(500))
    parts = list(pieces(text, longest=100))
    assert "".join(parts) == text
    assert all(len(p) <= 101 for p in parts)
    assert all(p.startswith(" ") for p in parts[1:])
    assert "".join(pieces("x" * 999, longest=100)) == "x" * 999


def test_one_epoch_holds_every_training_token_once_and_none_held_out():
    texts = words(0, 200)
    stream = TokenStream([memory("m", texts)], Bytes(), batch=1, time=10, fraction=0.2)
    train = tokenise([t for t in texts if not held_out(t, 0.2)], Bytes())
    count = len(train) // 10
    epoch = torch.cat([next(stream).tokens_bt for _ in range(count)])
    expected = torch.from_numpy(train[: count * 10].copy()).view(count, 10).long()
    order = sorted(range(count), key=lambda i: expected[i].tolist())
    assert sorted(epoch.tolist()) == expected[order].tolist()
    assert epoch.tolist() != expected.tolist()
    again = torch.cat([next(stream).tokens_bt for _ in range(count)])
    assert again.tolist() != epoch.tolist()

    out = held_out_text([memory("m", texts)], Bytes(), fraction=0.2)
    other = [t for t in texts if held_out(t, 0.2)]
    assert out == "\n\n".join(other) + "\n"
    assert held_out_text([memory("m", texts)], Bytes(), fraction=0.2, chars=50) == "\n\n".join(other[:2]) + "\n"
    assert 20 <= len(other) <= 60


def test_sources_mix_in_proportion_to_their_size():
    big, small = words(1, 300), words(2, 100)
    stream = TokenStream([memory("b", big), memory("s", small)], Bytes(), batch=1, time=8, fraction=0.0)
    read = [int(d.text[0]) - 1 for d in stream.documents.read()]
    assert len(read) == 400
    for part in (100, 200, 300):
        assert abs(sum(read[:part]) - part / 4) <= 2
    assert next(stream).tokens_bt.shape == (1, 8)


def test_weights_mix_without_counting_and_each_source_begins_anew():
    opened = []

    def endless():
        opened.append("endless")
        return (f"1.{i} " + "x" * 36 for i in itertools.count())

    sources = [Source("endless", endless, weight=3), memory("small", words(2, 10), weight=1)]
    documents = Documents(sources, Bytes(), fraction=0.0, train=True)
    read = [d.text for d in itertools.islice(documents.read(), 400)]
    assert opened == ["endless"]
    small = [text for text in read if text.startswith("2.")]
    assert small == (words(2, 10) * 11)[: len(small)]
    for part in (40, 200, 400):
        assert abs(sum(len(t) for t in read[:part] if t in small) / sum(map(len, read[:part])) - 0.25) < 0.03
    # From any place on, the counts are enough to read the same.
    for stop in (0, 1, 57, 391):
        reader = documents.read()
        for _ in range(stop):
            next(reader)
        again = documents.read(reader.taken, reader.chars)
        assert [d.text for d in itertools.islice(again, 400 - stop)] == read[stop:]


def test_held_out_text_is_read_once_whatever_the_weights():
    big, small = words(1, 60), words(2, 20)
    weighted = [memory("b", big, weight=1), memory("s", small, weight=5)]
    text = held_out_text(weighted, Bytes(), fraction=0.3)
    out = [t for t in big + small if held_out(t, 0.3)]
    assert sorted(text.strip().split("\n\n")) == sorted(out)
    # By weight as far as the small one goes.
    assert text.strip().split("\n\n")[1:4] == [t for t in small if held_out(t, 0.3)][:3]


def test_a_conversation_without_a_turn_is_refused_where_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: expected text, messages"):
        list(parse_source(str(tmp_path / "a.jsonl")).open())


def test_all_answers_to_a_question_lie_on_one_side():
    def talk(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    sides = {held_out(talk("why?", f"because {i}"), 0.5) for i in range(20)}
    assert sides == {held_out("why?", 0.5)}
    assert len({held_out(talk(f"why {i}?", "because"), 0.5) for i in range(20)}) == 2


def test_a_held_out_batch_is_the_beginning_of_what_no_training_sees():
    texts = words(3, 60)
    want = tokenise([t for t in texts if held_out(t, 0.4)], Bytes())
    batch = held_out_batch([memory("m", texts)], Bytes(), time=16, tokens=100, fraction=0.4)
    assert batch.wanted_bt is None
    assert batch.tokens_bt.flatten().tolist() == want[:96].tolist()
    assert batch.tokens_bt.shape == (6, 16)
    few = held_out_batch([memory("m", texts)], Bytes(), time=10_000, tokens=99, fraction=0.4)
    assert few.tokens_bt.tolist() == [want[:99].tolist()]
    with pytest.raises(DataError, match="--data m: expected held-out documents at --held-out 0.0, got none"):
        held_out_batch([memory("m", texts)], Bytes(), time=16, tokens=100, fraction=0.0)


def test_weights_that_can_not_be():
    with pytest.raises(ConfigError, match="--data s: expected a weight as the other sources have, got none"):
        TokenStream([memory("b", ["x"], weight=1), memory("s", ["y"])], Bytes(), batch=1, time=8)
    stream = TokenStream([memory("b", ["x"] * 99, weight=1), memory("s", [], weight=1)], Bytes(), batch=1, time=8)
    with pytest.raises(DataError, match="--data s: expected training documents, got none; give more or hold out less"):
        next(stream)


def test_options_of_a_source(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.write_text(json.dumps({"q": "a", "a": "b"}))
    spec = f"{path}#q+a,completions,weight=0.5"
    source = parse_source(spec)
    assert (source.name, source.weight, source.completions) == (spec, 0.5, True)
    assert len(list(source.open())) == 1
    assert split_options("self:x.jsonl#q,weight=2") == ("self:x.jsonl#q", {"weight": 2.0})
    assert split_options(str(path)) == (str(path), {})
    assert parse_source("pydoc,weight=3").weight == 3
    for option, message in [
        ("weight=0", "expected a weight above 0, got '0'"),
        ("weight=x", "expected a weight above 0, got 'x'; give a number such as weight=2"),
        ("weight=inf", "got 'inf'"),
        ("weight=1,weight=2", "expected weight once, got it twice"),
    ]:
        with pytest.raises(DataError, match=message):
            parse_source(f"{path},{option}")
    with pytest.raises(DataError, match=r"options are ,completions and ,weight=NUMBER"):
        parse_source(f"{tmp_path}/c.txt,wieght=2")


@pytest.mark.parametrize("chunk_tokens", [64, 700, 1 << 20])
@pytest.mark.parametrize("stop", [0, 1, 13, 41])
@pytest.mark.parametrize("weights", [(None, None), (2, 1)])
def test_resumed_stream_goes_on_to_the_token(chunk_tokens, stop, weights):
    if weights[0] and chunk_tokens > 10**6:
        chunk_tokens = 4000  # sources with weights never end, and neither would their only chunk

    def make():
        sources = [memory("a", words(3, 25), weight=weights[0]), memory("b", words(4, 9), weight=weights[1])]
        return TokenStream(sources, Bytes(), batch=3, time=17, seed=5, chunk_tokens=chunk_tokens)

    whole = make()
    batches = [next(whole).tokens_bt for _ in range(70)]
    first = make()
    for batch in batches[:stop]:
        assert torch.equal(next(first).tokens_bt, batch)
    state = json.loads(json.dumps(first.state_dict()))
    fresh = make()
    next(fresh)
    fresh.load_state_dict(state)
    for batch in batches[stop:]:
        assert torch.equal(next(fresh).tokens_bt, batch)


def test_an_epoch_may_leave_less_than_a_sequence(monkeypatch):
    """A corpus just above a chunk: its last few tokens go on into the next epoch."""
    monkeypatch.setattr("subquad.data.stream.TOKENISE_CHARS", 1)
    texts = words(6, 40, length=10)
    total = len(tokenise(texts, Bytes()))

    def make():
        return TokenStream(
            [memory("m", texts)], Bytes(), batch=1, time=total // 2 - 3, fraction=0.0, chunk_tokens=total - 6
        )

    whole = make()
    batches = [next(whole).tokens_bt for _ in range(7)]
    joined = tokenise(texts, Bytes()).tolist() * 4
    size = total // 2 - 3
    expected = [joined[i * size : (i + 1) * size] for i in range(8)]
    assert sorted(b[0].tolist() for b in batches[:6]) == sorted(expected[:6])
    for stop in range(6):
        first = make()
        for _ in range(stop):
            next(first)
        fresh = make()
        fresh.load_state_dict(first.state_dict())
        assert torch.equal(next(fresh).tokens_bt, batches[stop])


class Endless:
    """Documents without end, and how many were asked for."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            time.sleep(0.001)
            yield f"{self.read} " * 50


def test_closing_ends_the_thread_and_the_stream():
    endless = Endless()
    stream = TokenStream([Source("m", lambda: iter(endless))], Bytes(), batch=1, time=64, chunk_tokens=10**12)
    while endless.read < 3:
        time.sleep(0.001)
    stream.close()
    read = endless.read
    time.sleep(0.05)
    assert endless.read == read
    with pytest.raises(ConfigError, match="got one that was closed"):
        next(stream)
    stream.close()


EXITS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_stream import Bytes, Endless, Source, TokenStream
stream = TokenStream([Source("m", lambda: iter(Endless()))], Bytes(), batch=1, time=64, chunk_tokens=10**12)
"""


def test_a_process_ends_although_a_chunk_is_being_made():
    """Without end, so a thread that is waited for would be waited for for ever."""
    here = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", EXITS, here], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_resume_over_other_data_is_refused():
    stream = TokenStream([memory("a", words(3, 25))], Bytes(), batch=1, time=8)
    for other in (
        TokenStream([memory("b", words(3, 25))], Bytes(), batch=1, time=8),
        TokenStream([memory("a", words(3, 25))], Bytes(), batch=1, time=9),
        TokenStream([memory("a", words(3, 25))], Bytes(), batch=1, time=8, seed=1),
    ):
        with pytest.raises(DataError, match="give the same"):
            other.load_state_dict(stream.state_dict())


def test_text_too_short():
    stream = TokenStream([memory("m", ["short"])], Bytes(), batch=1, time=64, fraction=0.0)
    with pytest.raises(
        DataError, match="expected at least 64 training tokens, got 6; give more text or a shorter --seq"
    ):
        next(stream)
    with pytest.raises(DataError, match="expected held-out documents at --held-out 0.0, got none"):
        held_out_text([memory("m", ["short"])], Bytes(), fraction=0.0)
    with pytest.raises(DataError, match="end token"):
        tokenise(["x"], types.SimpleNamespace(eos_token_id=None))
