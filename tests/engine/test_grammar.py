"""Grammars by llguidance over a tokenizer of bytes: every text is one of theirs, whoever decodes beside it."""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.decode.draft_model import DraftModel
from subquad.engine.engine import Engine
from subquad.engine.generate import generate, generate_many
from subquad.engine.grammar import MOST_SOURCE, Grammar, Source
from subquad.engine.masks import Rule
from subquad.engine.request import Limits, Piece, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

from .conftest import ATTENTION, drain
from .test_captured import recorded  # noqa: F401  (a fixture)

END = 257
# More tokens than the tokenizer has, as in models whose embeddings are padded.
V = 263
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
LIMITS = Limits(90, end_tokens=[END])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a start and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def schema(tokenizer: Any) -> Grammar:
    return Grammar.json_schema(SCHEMA, tokenizer)


def build(seed: int, dtype: torch.dtype = torch.float64) -> Stack:
    torch.manual_seed(seed)
    model = Stack(ModelConfig(V, 16, 32, (ATTENTION, ATTENTION)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Stack:
    return build(0)


def valid(text: str) -> bool:
    held = json.loads(text)
    return (
        list(held) == ["name", "n", "tags"]
        and len(held["name"]) <= 4
        and 0 <= held["n"] <= 99
        and set(held["tags"]) <= {"red", "green"}
        and len(held["tags"]) <= 2
        and text == json.dumps(held, ensure_ascii=False)
    )


PROMPTS = [[1, 2, 3], [70], [9, 8, 70, 60, 5], [40, 40, 20]]
# Of rows side by side; None is free.
SETTINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=1.0, seed=3),
    SamplingConfig(temperature=1.5, min_p=0.05, repetition_penalty=1.2, seed=4),
    SamplingConfig(temperature=1.0, top_k=5, seed=5),
]


def requests(grammar: Grammar, tokenizer: Any, free: Sequence[int] = ()) -> list[Request]:
    return [
        Request(p, LIMITS if i not in free else replace(LIMITS, max_new_tokens=12), s, tokenizer, grammar)
        if i not in free
        else Request(p, replace(LIMITS, max_new_tokens=12), s, tokenizer)
        for i, (p, s) in enumerate(zip(PROMPTS, SETTINGS, strict=True))
    ]


def text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


DRAFTERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "copies": lambda: CopySpec((3, 1)),
    "model": lambda: DraftModel(build(1)),
    "coupled": lambda: DraftModel(build(1), coupled=True),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_every_text_is_valid_beside_rows_that_are_free(
    drafter: str, model: Stack, schema: Grammar, tokenizer: Any
) -> None:
    """Few slots, so that rows join late, are moved and end at different times; some are paused."""
    engine = Engine(model, rows=3, capacity=100, drafter=DRAFTERS[drafter](), rounds=2)
    for request in requests(schema, tokenizer, free=[2]):
        engine.submit(request)
    got = drain(engine, lambda step: engine.pause(step % 4) if step in (5, 9, 14) else None)
    for row in (0, 1, 3):
        assert valid(text(got[row])), text(got[row])
        # Nothing can follow the last brace, so that no end token is waited for.
        assert (got[row][-1].finish, got[row][-1].text) == ("end", "}")
    if drafter != "model":
        alone = generate(model, [PROMPTS[2]], limits=replace(LIMITS, max_new_tokens=12), sampling=[SETTINGS[2]])
        assert [piece.token for piece in got[2]] == alone[0].tokens


@pytest.mark.parametrize("drafter", ["copies", "coupled"])
def test_guesses_change_no_token(drafter: str, model: Stack, schema: Grammar, tokenizer: Any) -> None:
    options: dict[str, Any] = {"limits": LIMITS, "sampling": SETTINGS, "tokenizer": tokenizer, "grammar": schema}
    plain = generate(model, PROMPTS, logprobs=True, **options)
    looks: list[Any] = []
    got = generate(
        model, PROMPTS, logprobs=True, drafter=DRAFTERS[drafter](), draft_tokens=4, on_look=looks.append, **options
    )
    assert [(g.tokens, g.text, g.finish) for g in got] == [(g.tokens, g.text, g.finish) for g in plain]
    for a, b in zip(got, plain, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)
    # Names of keys are forced, and so guessed where the drafter has nothing to say.
    assert sum(look.kept for look in looks) > 20


def test_log_probabilities_are_those_of_the_model_itself(model: Stack, schema: Grammar) -> None:
    (got,) = generate(model, PROMPTS[:1], limits=LIMITS, logprobs=True, grammar=schema)
    logits_tv = model(torch.tensor([PROMPTS[0] + got.tokens[:-1]]))[0, len(PROMPTS[0]) - 1 :]
    own_t = logits_tv.log_softmax(-1).gather(1, torch.tensor(got.tokens)[:, None])[:, 0]
    assert got.logprobs == pytest.approx(own_t.tolist(), abs=1e-5)


def test_many_through_few_rows(model: Stack, schema: Grammar, tokenizer: Any) -> None:
    got = dict(generate_many(model, PROMPTS * 2, rows=3, limits=LIMITS, grammar=schema, drafter=CopySpec()))
    assert all(valid(tokenizer.decode(got[i].tokens)) for i in range(8))
    assert {g.finish for g in got.values()} == {"end"}


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_replayed_rounds_give_what_rounds_launched_anew_give(
    drafter: str, model: Stack, schema: Grammar, tokenizer: Any
) -> None:
    """Rows with a grammar and without come and go, so that masked and other graphs take turns."""
    answers: list[Any] = []
    for captures in (True, False):
        engine = Engine(model, rows=2, capacity=100, drafter=DRAFTERS[drafter](), most_drafted=2, rounds=2)
        engine._rounds.graphs.captures, engine._rounds.static = captures, True
        turns = iter(range(10_000))
        if engine.drafter is not None:
            engine.pace.choose = engine.ruled_pace.choose = lambda slots=1, turns=turns: (0, 2, 1)[next(turns) // 4 % 3]
        for free in ([0, 1], [0], []):
            for request in requests(schema, tokenizer, free=free)[:2]:
                engine.submit(request)
        got = drain(engine)
        answers.append({row: [(p.token, p.finish) for p in got[row]] for row in got})
        assert engine.captured is captures
        kinds = {key[0] for key in engine._rounds.graphs if isinstance(key[0], str)}
        assert ("masked" in kinds) is captures
        assert ("guess" in kinds) is (captures and drafter != "none")
        assert all(valid(text(got[row])) for row in (3, 4, 5))
    assert answers[0] == answers[1]


def test_without_a_grammar_rounds_are_what_they_were(model: Stack, schema: Grammar) -> None:
    """Several between two looks, before and after a row with a grammar."""
    engine = Engine(model, rows=2, capacity=100, rounds=4)
    free = Request([1, 2], Limits(40, end_tokens=[]))
    engine.submit(free)
    assert len(engine.step()) == 4
    assert not engine._rounds.masks._rooms
    engine.submit(Request([5], Limits(3, end_tokens=[]), grammar=schema))
    assert [len(engine.step()) for _ in range(3)] == [2, 2, 2]
    assert len(engine.step()) == 4
    assert [look.rounds for look in engine.looks] == [4, 1, 1, 1, 4]


def test_end_tokens_come_exactly_where_the_grammar_may_end(model: Stack, tokenizer: Any) -> None:
    """Of two end tokens one is a letter, and it is no text: the row would end within a word."""
    grammar = Grammar.regex("([ab]{3} )+[ab]{3}", tokenizer)
    (a,) = tokenizer.encode("a")
    settings = [SamplingConfig(temperature=2.0, seed=i) for i in range(40)]
    got = generate(model, [[5]] * 40, limits=Limits(40, end_tokens=[END, a]), sampling=settings, grammar=grammar)
    ended = [g for g in got if g.finish == "end"]
    assert {g.tokens[-1] for g in ended} == {a, END}
    assert all(re.fullmatch("(bbb )+bbb", tokenizer.decode(g.tokens[:-1])) for g in ended)
    held = Limits(40, end_tokens=[END, a], min_new_tokens=20)
    later = generate(model, [[5]] * 40, limits=held, sampling=settings, grammar=grammar)
    assert min(len(g.tokens) for g in ended) < 12
    assert min(len(g.tokens) for g in later) > 20


def test_a_finished_text_ends_its_row_without_end_tokens(model: Stack, tokenizer: Any) -> None:
    limits = Limits(9, end_tokens=[], min_new_tokens=9)
    for drafter in (None, CopySpec((1,))):
        grammar = Grammar.regex("ab{3}c", tokenizer)
        (got,) = generate(model, [[5]], limits=limits, tokenizer=tokenizer, grammar=grammar, drafter=drafter)
        assert (got.text, got.finish) == ("abbbc", "end")


@pytest.mark.parametrize("drafter", ["none", "copies", "model"])
def test_a_row_that_no_token_is_left_for_ends_and_says_so(drafter: str, model: Stack, tokenizer: Any) -> None:
    """Bad words forbid what the grammar asks for; broken logits are still told apart."""
    (b,) = tokenizer.encode("b")
    grammar = Grammar.regex("aab", tokenizer)
    config = SamplingConfig(bad_words_ids=[[b]], temperature=1.0)
    engine = Engine(model, rows=2, capacity=100, drafter=DRAFTERS[drafter](), draft_tokens=None, logprobs=True)
    engine.submit(Request([5], LIMITS, config, tokenizer, grammar))
    engine.submit(Request([5], replace(LIMITS, max_new_tokens=6)))
    got = drain(engine)
    assert [(p.token, p.text, p.finish) for p in got[0]][-1] == (-1, "", "exhausted")
    assert text(got[0]) == "aa" and math.isnan(got[0][-1].logprob)
    assert len(got[1]) == 6
    (one,) = generate(model, [[5]], sampling=[config], limits=LIMITS, tokenizer=tokenizer, grammar=grammar)
    assert (one.text, len(one.tokens), one.finish) == ("aa", 2, "exhausted")
    broken = build(0)
    broken.lm_head.weight[:, 0] = torch.nan
    engine = Engine(broken, rows=1, capacity=100)
    engine.submit(Request([5], LIMITS, config, tokenizer, grammar))
    assert [p.finish for p in drain(engine)[0]] == ["diverged"]


@pytest.mark.usefixtures("recorded")
def test_warm_makes_masked_rounds(model: Stack, schema: Grammar, tokenizer: Any) -> None:
    engine = Engine(model, rows=2, capacity=100, drafter=CopySpec(), most_drafted=2, rounds=2)
    engine._rounds.graphs.captures = engine._rounds.static = True
    engine.warm(Request([1], LIMITS, tokenizer=tokenizer, grammar=schema))
    graphs = set(engine._rounds.graphs)
    assert {key[0] for key in graphs} >= {"guess", "masked"}
    assert not engine._rounds.masks.on
    engine.submit(Request([1, 2], LIMITS, tokenizer=tokenizer, grammar=schema))
    assert valid(text(drain(engine)[0]))
    assert set(engine._rounds.graphs) == graphs


def test_any_json_object_is_one(model: Stack, tokenizer: Any) -> None:
    (close,) = tokenizer.encode("}")
    config = SamplingConfig(temperature=1.0, logit_bias={close: 6.0})
    got = generate(
        model, [[i] for i in range(20)], limits=LIMITS, sampling=config, grammar=Grammar.json_object(tokenizer)
    )
    done = [json.loads(tokenizer.decode(g.tokens)) for g in got if g.finish == "end"]
    assert len(done) > 5 and all(isinstance(held, dict) for held in done)


def test_a_grammar_of_lark(model: Stack, tokenizer: Any) -> None:
    grammar = Grammar.lark('start: "(" start ")" | "x"', tokenizer)
    config = SamplingConfig(temperature=1.0)
    got = generate(model, [[i] for i in range(9)], limits=LIMITS, sampling=config, grammar=grammar, tokenizer=tokenizer)
    assert len({g.text for g in got}) > 2
    assert all(re.fullmatch(r"(\(*)x(\)*)", g.text) and g.text.count("(") == g.text.count(")") for g in got)


def doubled(n: int, key: str) -> dict[str, Any]:
    """Each definition refers twice to the next: 2 ** n leaves."""
    held: dict[str, Any] = {f"a{i}": {key: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(n)}
    return {
        "$defs": {**held, f"a{n}": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        "$ref": "#/$defs/a0",
    }


def deep(n: int) -> str:
    return '{"items":' * n + "{}" + "}" * n


REFUSED: dict[str, tuple[Callable[[Any], Grammar], str]] = {
    "no schema": (lambda t: Grammar.json_schema("{", t), "json_schema: expected a JSON schema, got "),
    "a list": (lambda t: Grammar.json_schema("[]", t), "json_schema: expected a JSON object, got list"),
    "a set": (lambda t: Grammar.json_schema({"enum": {1}}, t), "json_schema: expected a JSON schema, got "),
    "a number": (lambda t: Grammar.regex(3, t), "regex: expected a text, got int"),  # type: ignore[arg-type]
    "a type": (lambda t: Grammar.json_schema({"type": "foo"}, t), "json_schema: .* got Invalid type: foo"),
    "a keyword": (lambda t: Grammar.json_schema({"not": {"const": 1}}, t), 'json_schema: .*Unimplemented keys: ."not"'),
    "a format": (lambda t: Grammar.json_schema({"type": "string", "format": "foo"}, t), "json_schema: .*format: foo"),
    "one of": (lambda t: Grammar.json_schema({"oneOf": [{"type": "string"}, {}]}, t), "json_schema: .*oneOf"),
    "remote": (lambda t: Grammar.json_schema({"$ref": "https://example.com/x"}, t), "json_schema: "),
    "nothing": (lambda t: Grammar.json_schema({"type": "integer", "minimum": 2, "maximum": 1}, t), "json_schema: "),
    "a circle": (lambda t: Grammar.json_schema({"$ref": "#"}, t), "json_schema: "),
    "open": (lambda t: Grammar.regex("(a", t), "regex: .*unclosed group"),
    "ahead": (lambda t: Grammar.regex("a(?=b)", t), "regex: .*look-ahead"),
    "lark": (lambda t: Grammar.lark("start: other", t), "lark: .*other"),
    "long": (lambda t: Grammar.regex("a" * (MOST_SOURCE + 1), t), f"regex: expected at most {MOST_SOURCE} characters"),
    "deep": (lambda t: Grammar.json_schema(deep(3_000), t), "json_schema: "),
    "deeper": (lambda t: Grammar.json_schema('{"a":' + "[" * 60_000, t), "json_schema: "),
    "nested": (lambda t: Grammar.regex("(" * 9_000 + "a" + ")" * 9_000, t), "regex: "),
    "all of any": (
        lambda t: Grammar.json_schema(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(16)]}, t
        ),
        "json_schema: .*too large",
    ),
    "a multiple": (lambda t: Grammar.json_schema({"type": "integer", "multipleOf": 10**9 + 7}, t), "json_schema: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_on_one_short_line(name: str, tokenizer: Any) -> None:
    make, match = REFUSED[name]
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=f"^{match}") as caught:
        make(tokenizer)
    assert time.perf_counter() - began < 5
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


BOMBS: dict[str, Callable[[Any], Grammar]] = {
    "any of": lambda t: Grammar.json_schema(doubled(40, "anyOf"), t),
    "all of many patterns": lambda t: Grammar.json_schema(
        {"allOf": [{"type": "string", "pattern": f"^.*{'x' * i}.*$"} for i in range(60)]}, t
    ),
    "all of": lambda t: Grammar.json_schema(doubled(40, "allOf"), t),
    "lengths": lambda t: Grammar.json_schema({"type": "string", "minLength": 10**6, "maxLength": 2 * 10**6}, t),
    "items": lambda t: Grammar.json_schema({"type": "array", "minItems": 10**6}, t),
    "repeats": lambda t: Grammar.regex("(a{1000}){1000}", t),
    "choices": lambda t: Grammar.regex("((a|b){1,1000}c){1,1000}", t),
    "states": lambda t: Grammar.regex("(a|b)*a(a|b){40}", t),
    "many keys": lambda t: Grammar.json_schema({"properties": {f"p{i}": {"type": "string"} for i in range(1_500)}}, t),
    "ambiguous": lambda t: Grammar.lark('start: s\ns: s s | "a" |', t),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_followed_in_bounded_time(name: str, model: Stack, tokenizer: Any) -> None:
    """Each would take years, were it written out; whichever it is, a row beside it gets its tokens."""
    import resource

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    engine = Engine(model, rows=2, capacity=100)
    with contextlib.suppress(ConfigError):
        engine.submit(Request([5], LIMITS, SamplingConfig(temperature=1.0), grammar=BOMBS[name](tokenizer)))
    engine.submit(Request([5], replace(LIMITS, max_new_tokens=90)))
    assert sum(len(pieces) for pieces in drain(engine).values()) >= 90
    assert time.perf_counter() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_text_too_complex_for_its_limits_ends_its_row_alone(model: Stack, schema: Grammar) -> None:
    """A matcher in error allows nothing."""
    matcher = schema.start()
    matcher.advance(0)
    rule = Rule(matcher, [END], V)
    assert not matcher.may_end and not matcher.must_end
    masks_tw = np.full((1, -(-V // 32)), -1, dtype=np.int32)
    rule.walk([], masks_tw, forces=False)
    assert not masks_tw.any()


def test_without_llguidance_the_remedy_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'^grammar: .* pip install "subquad\[serve\]"'):
        Grammar.json_object(tokenizer)


def test_a_tokenizer_that_is_none_is_refused() -> None:
    class Words:
        eos_token_id = 1

    with pytest.raises(ConfigError, match="^grammar: expected a fast tokenizer of transformers, got Words"):
        Grammar.json_object(Words())


def test_what_a_source_may_be(tmp_path: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "a.lark").write_text('start: "x"')
    names = [Source.parse(s).name for s in ("json", "regex:a+", str(tmp_path / "a.json"), str(tmp_path / "a.lark"))]
    assert names == ["json_schema", "regex", "json_schema", "lark"]
    with pytest.raises(ConfigError, match="^grammar: expected json, regex:PATTERN, or a file"):
        Source.parse(str(tmp_path / "none.json"))
