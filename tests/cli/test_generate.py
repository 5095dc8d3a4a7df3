"""`subquad generate` on a small saved model: text to stdout, speed to stderr, errors on one line."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from subquad import cli
from subquad.cli.generate import encode, read_prompts, twice
from subquad.core.errors import ConfigError, DataError
from subquad.engine.generate import Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a:{% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and a start token before plain text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path, template: str | None = TEMPLATE) -> str:
    torch.manual_seed(0)
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
    config = ModelConfig(
        vocab_size=258, d_model=16, d_mlp=32, layers=(layer, layer), max_positions=64, eos_tokens=(257,)
    )
    model = Stack(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    save_pretrained(model, folder, tokenizer(template))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model") / "tiny")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.main(["generate", *args, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def expected(model: str, text: str, n: int, sampling: SamplingConfig | None = None) -> Any:
    loaded = load_model(model)
    (result,) = generate(
        loaded.model,
        [loaded.tokenizer.encode(text)],
        limits=Limits(n),
        sampling=sampling,
        tokenizer=loaded.tokenizer,
        logprobs=True,
    )
    return result


def test_one_prompt_streams_its_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, model, "hé", "--max-new-tokens", "12")
    assert out == expected(model, "hé", 12).text + "\n"
    assert err.startswith("tiny: read 4 tokens in ")
    assert " tok/s), wrote 11 more in " in err
    assert run(capsys, model, "hé", "--max-new-tokens", "12", "--no-stream")[0] == out


def test_streaming_writes_while_it_generates(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(io.StringIO):
        parts: list[str] = []  # noqa: RUF012

        def write(self, text: str) -> int:
            self.parts.append(text)
            return super().write(text)

    out = Writes()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["generate", model, "ab", "--max-new-tokens", "12", "--device", "cpu"]) == 0
    assert len([p for p in out.parts if p.strip()]) > 3


def test_json_holds_what_the_engine_gives(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "3", "--repetition-penalty", "1.1"]
    out, _ = run(capsys, model, "one", "three", "--json", "--max-new-tokens", "9", "--batch-size", "1", *options)
    config = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=3)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "three"]
    assert [line["prompt_tokens"] for line in lines] == [4, 6]
    first = expected(model, "one", 9, config)
    assert (lines[0]["tokens"], lines[0]["text"], lines[0]["finish"]) == (first.tokens, first.text, first.finish)
    assert lines[0]["logprobs"] == pytest.approx(first.logprobs, abs=1e-5)
    # The batch is no part of the result: seeds follow the prompts.
    together, _ = run(capsys, model, "one", "three", "--json", "--max-new-tokens", "9", *options)
    assert [json.loads(line)["tokens"] for line in together.splitlines()] == [line["tokens"] for line in lines]


def test_words_and_repetitions_are_left_out(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = expected(model, "xyx", 20)
    options = ["--no-repeat-ngram-size", "2", "--bad-word", "q", "--bad-word", "\x11", "--epsilon-cutoff", "0.001"]
    out, _ = run(capsys, model, "xyx", "--json", "--max-new-tokens", "20", *options)
    ids = load_model(model).tokenizer.encode("xyx q\x11")
    *_, space, q, other = ids
    words = [[q], [space, q], [other], [space, other]]
    config = SamplingConfig(no_repeat_ngram_size=2, bad_words_ids=words, epsilon_cutoff=0.001)
    got = json.loads(out)["tokens"]
    assert got == expected(model, "xyx", 20, config).tokens
    assert {q, other} <= set(free.tokens)
    assert not {q, other} & set(got)
    pairs = list(itertools.pairwise([*ids[:-3], *got]))
    assert len(set(pairs)) == len(pairs)


def test_drafts_change_nothing_and_leave_a_trace(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "new" / "drafts.json"
    drafts = ["--draft", "copyspec,gammas=2", "--draft", f"draft_model,model={model}", "--draft-tokens", "3"]
    out, err = run(capsys, model, "abcabcab", "--max-new-tokens", "13", *drafts, "--trace", str(trace))
    assert out == expected(model, "abcabcab", 13).text + "\n"
    assert " guesses stood, " in err
    looks = json.loads(trace.read_text())["looks"]
    assert sum(look["tokens"] for look in looks) == 13
    assert 0 < sum(look["kept"] for look in looks) <= sum(look["guessed"] for look in looks)
    assert trace.with_suffix(".svg").read_text().startswith("<svg")


def test_relaxed_drafts_say_that_they_are_not_exact(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["abcabcab", "--max-new-tokens", "13", "--json", "--draft", "gad,window=8,guesses=4", "--draft-tokens", "3"]
    out, err = run(capsys, model, *asked)
    assert json.loads(out)["exact"] and "EXACT" not in err
    out, err = run(capsys, model, *asked, "--relaxed", "beta=258,tau=99")
    assert not json.loads(out)["exact"] and json.loads(out)["text"] != expected(model, "abcabcab", 13).text
    assert "NOT EXACT: " in err and " of 13 tokens (" in err


def test_a_prompt_can_be_read_twice(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, model, "ab", "--max-new-tokens", "5", "--read-twice")
    assert out == expected(model, "ab\n\nab", 5).text + "\n"
    assert twice([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])[1:] == [
        {"role": "user", "content": "q\n\nq"}
    ]


def test_several_prompts_come_under_their_titles(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, model, "a  b", "c", "--max-new-tokens", "4")
    assert out == f"# 1: a b\n{expected(model, 'a  b', 4).text}\n\n# 2: c\n{expected(model, 'c', 4).text}\n\n"


def test_prompts_from_files_and_chats(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("one\n\nthree\n", encoding="utf-8")
    assert read_prompts(lines) == ["one", "three"]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}]
    items = tmp_path / "p.jsonl"
    items.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"messages": talk}) + "\n", encoding="utf-8")
    assert read_prompts(items) == ["one", talk]

    for turns in (["hi"], [{"role": "user"}], []):
        items.with_name("bad.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match="bad.jsonl:1: expected .* correct the line"):
            read_prompts(items.with_name("bad.jsonl"))

    loaded = load_model(model)
    assert loaded.tokenizer.decode(encode(loaded, "one", False)) == "<s>one"
    assert loaded.tokenizer.decode(encode(loaded, "one", True)) == "<s>[user:one][a:"  # one start token, not two
    assert loaded.tokenizer.decode(encode(loaded, talk, False)) == "<s>[system:s][user:é][a:"
    out, _ = run(capsys, model, "--file", str(items), "--json", "--max-new-tokens", "3")
    assert [list(json.loads(line))[0] for line in out.splitlines()] == ["prompt", "messages"]  # noqa: RUF015


def test_a_stop_string_and_the_end_token_end_the_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = expected(model, "xy", 20)
    stop = free.text[3]
    out, _ = run(capsys, model, "xy", "--max-new-tokens", "20", "--stop", stop)
    assert out == free.text[: free.text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["hi", "--temperature", "-1"], "temperature: expected 0, or a finite number"),
        (["hi", "--device", "cuda:99"], "--device: expected a device that is there, got 'cuda:99'"),
        (["hi", "--device", "gpu"], "--device: expected cpu, cuda"),
        (["hi", "--dtype", "float23"], "--dtype: unknown 'float23'; did you mean 'float32'?"),
        (["hi", "--max-new-tokens", "100"], "prompt 0: expected at most 64 tokens of context, got 3 and 100 new ones"),
        (["hi", "there", "--stream"], "--stream: expected one prompt"),
        (["hi", "--file", "nowhere.txt"], "nowhere.txt: expected a text file in UTF-8"),
        (["hi", "--max-new-tokens", "9", "--stop", ""], "stop: expected strings of at least one character"),
        (["hi", "--draft", "copyspek"], "unknown method 'copyspek' in decode; did you mean 'copyspec'?"),
        (["hi", "--draft-tokens", "3"], "--draft-tokens: expected a --draft, got none"),
        (["hi", "--relaxed", "beta=3"], "--relaxed: expected a --draft, got none"),
        (["hi", "--draft", "copyspec", "--relaxed", "3"], "relaxed: expected beta=3,tau=1, got '3'"),
        (
            ["hi", "--max-new-tokens", "9", "--draft", "copyspec", "--relaxed", "tau=1", "--temperature", "1"],
            "relaxed: expected greedy requests, got temperature 1.0",
        ),
        (["hi", "--bad-word", " "], "--bad-word: expected a text, got an empty one"),
        (["hi", "--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size: expected an integer in [0, 2**31), got -1"),
        ([], "expected a prompt, got none"),
    ],
)
def test_bad_input_is_one_line(model: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", model, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_going_beyond_the_context_can_be_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, model, "hi", "--max-new-tokens", "100", "--allow-long", "--json")
    assert json.loads(out)["finish"] in ("length", "end")


@pytest.mark.parametrize(
    "line", ["{", '["a"]', '{"prompt": 3}', '{"prompt": ""}', '{"text": "a"}'], ids=["cut", "list", "3", "empty", "key"]
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"p\.jsonl:2: expected"):
        read_prompts(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="an empty file"):
        read_prompts(path)


def test_a_model_without_template_or_tokenizer_says_so(tmp_path: Path) -> None:
    plain = load_model(save(tmp_path / "plain", template=None))
    with pytest.raises(ConfigError, match="^plain: expected a chat template, got none"):
        encode(plain, "hi", True)
    bare = type(plain)(plain.model, None, "bare", "bare")
    with pytest.raises(ConfigError, match="^bare: expected a tokenizer"):
        encode(bare, "hi", False)


def test_a_grammar_says_what_comes(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 20]}, "minItems": 1, "maxItems": 3}')
    out, _ = run(capsys, model, "ab", "hé", "--grammar", str(schema), "--json", "--max-new-tokens", "20")
    for line in out.splitlines():
        answer = json.loads(line)
        assert answer["finish"] == "end"
        assert set(json.loads(answer["text"])) <= {1, 20}
    assert run(capsys, model, "ab", "--grammar", "regex:(yes|no)", "--max-new-tokens", "9")[0] in ("yes\n", "no\n")


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("regex:(a", "regex: expected a grammar that can be followed"),
        ("nowhere.json", "grammar: expected json, regex:PATTERN"),
    ],
)
def test_a_grammar_that_is_none_is_refused_before_weights_are_loaded(
    grammar: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["generate", "no-such-model", "ab", "--grammar", grammar]) == 2
    assert why in capsys.readouterr().err
