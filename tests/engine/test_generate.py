"""A row of a batch gets what it would get alone, from every registered mixer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import ConfigError, DataError, DivergenceError, SubquadError, UnsupportedError
from subquad.core.registry import methods
from subquad.engine import request
from subquad.engine.generate import Generation, Limits, generate, stream
from subquad.engine.prefill import prefill
from subquad.engine.sampler import SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 97
MIXERS = {
    f"{slug}-{name}": {"mixer": slug, **example}
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
    for name, example in card.examples.items()
}
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
PROMPTS = [[1, 2, 3], [5], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [4, 4, 40, 41, 42, 43, 44]]


def build(layers: Sequence[dict[str, Any]], **config: Any) -> Stack:
    torch.manual_seed(0)
    d_model = layers[0].get("d_model", 32)
    bare = tuple({k: v for k, v in layer.items() if k != "d_model"} for layer in layers)
    model = Stack(ModelConfig(vocab_size=V, d_model=d_model, d_mlp=48, layers=bare, **config))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform logits, and no special starts
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(params=MIXERS)
def model(request: pytest.FixtureRequest) -> Stack:
    return build([MIXERS[request.param]] * 2)


@pytest.fixture
def attention() -> Stack:
    return build([ATTENTION])


def recomputed(model: Stack, prompt: list[int], n: int) -> tuple[list[int], list[float]]:
    """Greedy without any state: the whole text is read again for every token."""
    tokens, scores = list(prompt), list[float]()
    with torch.no_grad():
        for _ in range(n):
            logp_v = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
            tokens.append(int(logp_v.argmax()))
            scores.append(float(logp_v.max()))
    return tokens[len(prompt) :], scores


def test_a_ragged_batch_equals_each_prompt_alone_and_without_a_state(model: Stack) -> None:
    n = 9
    together = generate(model, PROMPTS, limits=Limits(max_new_tokens=n, chunk=4), logprobs=True)
    for prompt, got in zip(PROMPTS, together, strict=True):
        (alone,) = generate(model, [prompt], limits=Limits(max_new_tokens=n), logprobs=True)
        tokens, scores = recomputed(model, prompt, n)
        assert got.tokens == alone.tokens == tokens
        assert got.finish == alone.finish == "length"
        # What float32 differs by between batch shapes, up to 6e-5; the tokens above are identical.
        torch.testing.assert_close(got.logprobs, scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.logprobs, scores, rtol=0, atol=1e-4)
    assert len({tuple(g.tokens) for g in together}) > 1


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_prefill_in_chunks_gives_the_state_of_reading_at_once(model: Stack, chunk: int) -> None:
    model = model.double()
    pool, once = model.init_state(len(PROMPTS), 16), model.init_state(len(PROMPTS), 16)
    hidden_bd = prefill(model, PROMPTS, pool, chunk)
    width = max(map(len, PROMPTS))
    lengths_b = torch.tensor([len(p) for p in PROMPTS])
    tokens_bt = torch.tensor([p + [50] * (width - len(p)) for p in PROMPTS])
    with torch.no_grad():
        read_btd, update = model.read(tokens_bt, once, lengths_b)
    torch.testing.assert_close(hidden_bd, read_btd[torch.arange(len(PROMPTS)), lengths_b - 1], rtol=1e-9, atol=1e-9)
    assert pool.seen_b.tolist() == lengths_b.tolist()
    # Bytes that no one reads may differ; what the state says about the next block may not.
    next_bt = torch.arange(5).repeat(len(PROMPTS), 1)
    with torch.no_grad():
        mine, theirs = model.read(next_bt, pool)[0], model.read(next_bt, update.commit())[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_rows_that_finish_at_different_times_leave_the_others_alone(model: Stack) -> None:
    n = 12
    free = generate(model, PROMPTS, limits=Limits(max_new_tokens=n))
    # An end token for every row, at as different steps as its text allows.
    for row, result in enumerate(free):
        end = result.tokens[min(2 * row + 1, n - 1)]
        got = generate(model, PROMPTS, limits=Limits(max_new_tokens=n, end_tokens=[end]))
        for one, other in zip(got, free, strict=True):
            cut = other.tokens.index(end) + 1 if end in other.tokens else n
            assert one.tokens == other.tokens[:cut]
            assert one.finish == ("end" if end in other.tokens else "length")


def test_sampled_rows_do_not_depend_on_their_batch(model: Stack) -> None:
    configs = [
        SamplingConfig(temperature=1.0, seed=4),
        SamplingConfig(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=5),
        SamplingConfig(),
        SamplingConfig(temperature=1.5, top_p=0.9, min_p=0.01, frequency_penalty=0.3, seed=6),
    ]
    limits = Limits(max_new_tokens=10, end_tokens=range(0, V, 9))  # some rows end early, and the batch shrinks
    together = generate(model, PROMPTS, limits=limits, sampling=configs)
    assert len({len(g.tokens) for g in together}) > 1
    for prompt, config, got in zip(PROMPTS, configs, together, strict=True):
        assert generate(model, [prompt], limits=limits, sampling=[config]) == [got]
    back = generate(model, PROMPTS[::-1], limits=limits, sampling=configs[::-1])
    assert back[::-1] == together


def test_one_configuration_gives_rows_successive_seeds(attention: Stack) -> None:
    limits = Limits(max_new_tokens=20)
    same = generate(attention, [[3]] * 3, limits=limits, sampling=SamplingConfig(temperature=1.0, seed=7))
    assert len({tuple(g.tokens) for g in same}) == 3
    (third,) = generate(attention, [[3]], limits=limits, sampling=SamplingConfig(temperature=1.0, seed=9))
    assert third == same[2]


def test_the_repetition_penalty_sees_prompt_and_output_but_no_padding(attention: Stack) -> None:
    # So strong a penalty allows no token twice.
    config = SamplingConfig(repetition_penalty=1e9)
    for prompt, got in zip(
        PROMPTS, generate(attention, PROMPTS, limits=Limits(max_new_tokens=40), sampling=config), strict=True
    ):
        assert len({*prompt, *got.tokens}) == len(set(prompt)) + 40
        (alone,) = generate(attention, [prompt], limits=Limits(max_new_tokens=40), sampling=config)
        assert alone == got
    # Padding columns hold token 0; only the third prompt has it.
    assert 0 in generate(attention, [[5], PROMPTS[2]], limits=Limits(max_new_tokens=V - 1), sampling=config)[0].tokens


def test_the_state_is_allocated_once_and_a_constant_one_ignores_the_length(
    model: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[int] = []
    read = Stack.read

    def spy(self: Stack, tokens_bt: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        pools.append(state.nbytes)
        return read(self, tokens_bt, state, *args, **kwargs)

    monkeypatch.setattr(Stack, "read", spy)
    generate(model, [[1, 2, 3]], limits=Limits(max_new_tokens=12))
    assert len(pools) == 13
    prompt, *steps = pools  # the prompt but its last token is read against an empty state of its own
    assert len(set(steps)) == 1
    assert prompt <= steps[0]
    slug = model.config.layers[0]["mixer"]
    if methods("mixers")[slug].constant_state:
        generate(model, [[1, 2, 3] * 36], limits=Limits(max_new_tokens=12))
        assert set(pools) == {prompt, steps[0]}


def test_a_finished_half_of_the_batch_leaves_it(attention: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    free = generate(attention, PROMPTS, limits=Limits(max_new_tokens=12))
    end = free[0].tokens[0]
    sizes: list[int] = []
    read = Stack.read

    def spy(self: Stack, tokens_bt: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(tokens_bt))
        return read(self, tokens_bt, *args, **kwargs)

    monkeypatch.setattr(Stack, "read", spy)
    got = generate(attention, [PROMPTS[0], PROMPTS[3]], limits=Limits(max_new_tokens=12, end_tokens=[end]))
    assert len(got[0].tokens) == 1
    assert len(got[1].tokens) > 2
    # The prompts but their last tokens, a first round of both, then one alone.
    assert sizes == [2, 2, *[1] * (len(got[1].tokens) - 1)]


def letters() -> PreTrainedTokenizerFast:
    """Token i is one byte, so that any token gives text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:V]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_pieces_add_up_to_the_text_and_an_end_token_shows_nothing(attention: Stack) -> None:
    tokenizer, limits = letters(), Limits(max_new_tokens=15, end_tokens=[])
    seen: list[Any] = []
    free = generate(attention, PROMPTS, limits=limits, tokenizer=tokenizer, on_piece=seen.append)
    for row, result in enumerate(free):
        assert result.text == tokenizer.decode(result.tokens, clean_up_tokenization_spaces=False)
        assert "".join(p.text for p in seen if p.row == row) == result.text
    end = free[0].tokens[3]
    (cut,) = generate(attention, PROMPTS[:1], limits=Limits(max_new_tokens=15, end_tokens=[end]), tokenizer=tokenizer)
    kept = free[0].tokens[: free[0].tokens.index(end)]
    assert cut == Generation([*kept, end], tokenizer.decode(kept, clean_up_tokenization_spaces=False), [], "end")


def test_a_stop_string_ends_a_row_and_is_not_shown(attention: Stack) -> None:
    tokenizer = letters()
    (free,) = generate(attention, PROMPTS[:1], limits=Limits(max_new_tokens=15), tokenizer=tokenizer)
    stop = free.text[4:6]
    (cut,) = generate(attention, PROMPTS[:1], limits=Limits(max_new_tokens=15, stop=[stop]), tokenizer=tokenizer)
    at = free.text.index(stop)
    assert (cut.text, cut.tokens, cut.finish) == (free.text[:at], free.tokens[: at + 2], "stop")


def test_the_models_own_end_tokens_are_the_default() -> None:
    free = build([ATTENTION])
    (plain,) = generate(free, [[5]], limits=Limits(max_new_tokens=8))
    ended = build([ATTENTION], eos_tokens=(V - 1, plain.tokens[2]))
    (got,) = generate(ended, [[5]], limits=Limits(max_new_tokens=8))
    assert got.finish == "end"
    assert got.tokens == plain.tokens[: plain.tokens.index(plain.tokens[2]) + 1]
    assert generate(ended, [[5]], limits=Limits(max_new_tokens=8, end_tokens=[])) == [plain]


def test_a_consumer_may_leave_a_stream_and_gradients_stay_as_they_were(attention: Stack) -> None:
    pieces = stream(attention, [[1, 2]], limits=Limits(max_new_tokens=50))
    first = next(pieces)
    assert torch.is_grad_enabled()
    assert (first.row, first.finish) == (0, None)
    assert math.isnan(first.logprob)
    pieces.close()


def test_the_context_is_a_limit_unless_it_is_asked_to_be_passed() -> None:
    model = build([ATTENTION], max_positions=12)
    (full,) = generate(model, [[1] * 5], limits=Limits(max_new_tokens=8))  # the last token is never read
    assert len(full.tokens) == 8
    with pytest.raises(ConfigError, match=r"^prompt 1: .* got 5 and 9 new ones; ask for at most 8 new tokens, or"):
        generate(model, [[1], [1] * 5], limits=Limits(max_new_tokens=9))
    with pytest.raises(ConfigError, match=r"drop 2 tokens"):
        generate(model, [[1] * 14], limits=Limits(max_new_tokens=1))
    (longer,) = generate(model, [[1] * 14], limits=Limits(max_new_tokens=9, allow_long=True))
    assert len(longer.tokens) == 9


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, DataError, "^prompts: expected at least one"),
        ([[1], []], {}, DataError, "^prompt 1: expected at least one token"),
        ([[1], [2, V]], {}, DataError, f"^prompt 1: expected token ids from 0 to {V - 1}, got {V}"),
        ([[-1]], {}, DataError, "^prompt 0: expected token ids"),
        ([[1]], {"limits": Limits(max_new_tokens=0)}, ConfigError, "^max_new_tokens: expected at least 1, got 0"),
        ([[1]], {"limits": Limits(chunk=0)}, ConfigError, "^chunk: expected"),
        ([[1]], {"limits": Limits(stop=["x"])}, ConfigError, "^stop: expected a tokenizer"),
        ([[1]], {"sampling": [SamplingConfig()] * 2}, ConfigError, "^sampling: expected one configuration for 1"),
    ],
)
def test_what_can_not_be_generated_is_refused(
    attention: Stack, prompts: list[list[int]], options: dict[str, Any], error: type[SubquadError], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(attention, prompts, **options)


def test_logits_that_are_not_finite_stop_with_the_row(attention: Stack) -> None:
    with torch.no_grad():
        attention.embed.weight[7] = torch.nan
    with pytest.raises(DivergenceError, match="^prompt 1: expected finite logits"):
        generate(attention, [[1], [7]], limits=Limits(max_new_tokens=3))


def test_a_mixer_that_looks_ahead_is_refused(attention: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    card = dataclasses.replace(methods("mixers")["attention"], causal=False)
    monkeypatch.setattr(request, "methods", lambda family: {"attention": card})
    with pytest.raises(UnsupportedError, match="^layer 0: expected a causal mixer"):
        generate(attention, [[1]])
