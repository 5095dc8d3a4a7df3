"""The engine itself: guesses, ends, moves and rows that diverge change nobody's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.pace import IN_VAIN
from subquad.engine.request import Limits, Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.stack import Stack
from subquad.ops import step

from .conftest import MIXERS, PROMPTS, Letters, Oracle, V, build, drain, plain, tokens


def bursts(n: int, k: int, right: Callable[[int], int]) -> list[int]:
    """Tokens of each round of a row of n tokens: the right guesses, of at most k and what is left but one, and one."""
    out: list[int] = []
    while sum(out) < n:
        out.append(1 + min(right(len(out)), k, n - sum(out) - 1))
    return out


@pytest.mark.parametrize(
    ("mixer", "forced"),
    [*(("attention", right) for right in range(5)), *((mixer, "mixed") for mixer in MIXERS), ("mamba2", 4)],
)
def test_forced_numbers_of_right_guesses_give_the_same_tokens_in_as_many_rounds(mixer: str, forced: int | str) -> None:
    model, n, k = build(MIXERS[mixer]), 11, 4
    expected = plain(model, PROMPTS, n)

    def right(text: int, turn: int) -> int:
        return forced if isinstance(forced, int) else (3 * text + 2 * turn + text * turn) % (k + 1)

    drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], right)
    engine = Engine(model, rows=4, capacity=32, drafter=drafter, draft_tokens=k, rounds=1)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    seen: dict[int, list[int]] = {row: [] for row in range(4)}
    got: dict[int, list[int]] = {row: [] for row in range(4)}
    while engine.busy:
        pieces = engine.step()
        for row in {piece.row for piece in pieces}:
            mine = [piece.token for piece in pieces if piece.row == row]
            got[row] += mine
            seen[row].append(len(mine))
    assert [got[row] for row in range(4)] == expected
    wanted = [bursts(n, k, lambda turn, text=text: right(text, turn)) for text in range(4)]
    assert [seen[row] for row in range(4)] == wanted
    assert len(engine.looks) == max(map(len, wanted))
    # A row's last round guesses no more than it may give.
    for i, look in enumerate(engine.looks):
        assert look.tokens == sum(row[i] for row in wanted if i < len(row))
        left = [n - sum(row[:i]) for row in wanted if i < len(row)]
        assert look.guessed == sum(min(k, rest - 1) for rest in left)
        assert (look.rows, look.k, look.rounds) == (len(left), k, 1)


@pytest.mark.parametrize("n", [1, 4, 13])
def test_a_look_counts_the_guesses_that_stood_those_of_last_rounds_too(model: Stack, n: int) -> None:
    expected = plain(model, PROMPTS, n)
    drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], lambda text, turn: 4)
    engine = Engine(model, rows=4, capacity=32, drafter=drafter, draft_tokens=4, rounds=1)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    drain(engine)
    for look in engine.looks:
        assert look.kept == look.tokens - look.rows
        assert look.kept == look.guessed


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("at", range(6))
def test_an_end_token_inside_a_block_ends_the_row_there(model: Stack, rounds: int, at: int) -> None:
    n, prompt = 12, PROMPTS[2]
    (free,) = plain(model, [prompt], n)
    end = free[at]
    expected = free[: free.index(end) + 1]
    drafter = Oracle([prompt + free], lambda text, turn: 5)
    engine = Engine(model, rows=2, capacity=32, drafter=drafter, draft_tokens=5, rounds=rounds)
    engine.submit(Request(prompt, Limits(n, end_tokens=[end])))
    other = engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    got = drain(engine)
    assert tokens(got[0]) == expected
    assert [piece.finish for piece in got[0]] == [None] * (len(expected) - 1) + ["end"]
    assert tokens(got[other]) == free
    # On the device, too, nothing is given behind the end.
    assert sum(look.tokens for look in engine.looks) == len(expected) + n


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("guessed", [False, True])
def test_rows_of_all_lengths_share_few_slots(model: Stack, rounds: int, guessed: bool) -> None:
    """Each leaves when it has its own number of tokens, and the next one takes its slot."""
    lengths = [1, 7, 2, 12, 1, 5, 3, 9]
    prompts = [PROMPTS[i % 4] + [i] for i in range(8)]
    expected = [plain(model, [p], n)[0] for p, n in zip(prompts, lengths, strict=True)]
    drafter = Oracle([p + e for p, e in zip(prompts, expected, strict=True)], lambda text, turn: (text + turn) % 4)
    engine = Engine(
        model, rows=3, capacity=32, drafter=drafter if guessed else None, draft_tokens=3, rounds=rounds, chunk=4
    )
    for prompt, n in zip(prompts, lengths, strict=True):
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    assert (engine.live, engine.busy) == (0, True)
    got = drain(engine)
    assert [tokens(got[row]) for row in range(8)] == expected
    assert all(got[row][-1].finish == "length" for row in range(8))
    assert (engine.live, engine.busy) == (0, False)
    assert engine.step() == []


@pytest.mark.parametrize(("mixer", "rounds"), [*((mixer, 3) for mixer in MIXERS), ("attention", 1)])
def test_rows_move_up_when_half_of_the_batch_has_left(mixer: str, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The early ones stand first, so that all that goes on must move, settings and history with it."""
    model = build(MIXERS[mixer])
    prompts = [*PROMPTS, *[[*p, 7] for p in PROMPTS]]
    settings = [
        SamplingConfig(temperature=0.9 * (i % 2), repetition_penalty=1 + 0.4 * (i == 6), seed=i) for i in range(8)
    ]
    limits = [Limits(2 if i < 5 else 14, end_tokens=[], chunk=4) for i in range(8)]
    expected = [
        generate(model, [p], limits=limit, sampling=[s])[0].tokens
        for p, limit, s in zip(prompts, limits, settings, strict=True)
    ]
    sizes: list[int] = []
    head = Stack.head

    def spy(self: Stack, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return head(self, hidden)

    monkeypatch.setattr(Stack, "head", spy)
    engine = Engine(model, rows=8, capacity=32, rounds=rounds)
    for prompt, limit, config in zip(prompts, limits, settings, strict=True):
        engine.submit(Request(prompt, limit, config))
    got = drain(engine)
    assert [tokens(got[row]) for row in range(8)] == expected
    assert (sizes[0], sizes[-1]) == (8, 3)
    assert set(sizes) == {8, 3}


def test_rows_with_guesses_move_too() -> None:
    model = build(MIXERS["mamba2"])
    lengths = [2, 2, 2, 15]
    expected = [plain(model, [p], n)[0] for p, n in zip(PROMPTS, lengths, strict=True)]
    drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], lambda text, turn: turn % 3)
    engine = Engine(model, rows=4, capacity=32, drafter=drafter, draft_tokens=2, rounds=2)
    for prompt, n in zip(PROMPTS, lengths, strict=True):
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    got = drain(engine)
    assert [tokens(got[row]) for row in range(4)] == expected
    assert drafter.slots[0][0] == 3


@pytest.mark.parametrize("rounds", [1, 4])
def test_logprobs_are_those_of_the_model_and_of_plain_decoding(model: Stack, rounds: int) -> None:
    n = 9
    expected = plain(model, PROMPTS, n)
    alone = [generate(model, [p], limits=Limits(n, end_tokens=[]), logprobs=True)[0].logprobs for p in PROMPTS]
    drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], lambda text, turn: (text + turn) % 4)
    engine = Engine(model, rows=3, capacity=32, drafter=drafter, draft_tokens=3, rounds=rounds, logprobs=True)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    got = drain(engine)
    for row, prompt in enumerate(PROMPTS):
        scores = torch.tensor([piece.logprob for piece in got[row]])
        logits_tv = model(torch.tensor([prompt + expected[row]]))[0, len(prompt) - 1 : -1]
        exact_t = logits_tv.log_softmax(-1).gather(1, torch.tensor(expected[row])[:, None])[:, 0]
        # Float32 of two terms, each rounded, a sum of V exponentials, and their difference: V + 8 roundings at most.
        most = (V + 8) * 2.0**-24 * max(1.0, float(logits_tv.abs().max()) + math.log(V))
        assert (scores.double() - exact_t).abs().max() <= most
        assert (scores - torch.tensor(alone[row])).abs().max() <= 2 * most


def test_without_logprobs_there_are_none(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=8)
    engine.submit(Request([1], Limits(3, end_tokens=[])))
    assert all(math.isnan(piece.logprob) for piece in drain(engine)[0])


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("at", [0, 3, 6, 10])
def test_a_stop_string_inside_a_burst_ends_the_row_and_spares_the_others(model: Stack, rounds: int, at: int) -> None:
    """What was drawn behind it is given to nobody, and the next request in its slot is not touched by it."""
    n = 14
    expected = plain(model, PROMPTS, n)
    texts = ["".join(map(Letters().decode, [[t] for t in row])) for row in expected]
    stop = texts[2][at : at + 2]
    found = texts[2].index(stop)
    drafter = Oracle([p + e for p, e in zip(PROMPTS, expected, strict=True)], lambda text, turn: 4)
    engine = Engine(model, rows=2, capacity=32, drafter=drafter, draft_tokens=4, rounds=rounds)
    engine.submit(Request(PROMPTS[2], Limits(n, end_tokens=[], stop=[stop]), tokenizer=Letters()))
    engine.submit(Request(PROMPTS[0], Limits(n, end_tokens=[]), tokenizer=Letters()))
    engine.submit(Request(PROMPTS[3], Limits(n, end_tokens=[]), tokenizer=Letters()))
    got = drain(engine)
    assert tokens(got[0]) == expected[2][: found + 2]
    assert "".join(piece.text for piece in got[0]) == texts[2][:found]
    assert got[0][-1].finish == "stop"
    for row, prompt in ((1, 0), (2, 3)):
        assert tokens(got[row]) == expected[prompt]
        assert "".join(piece.text for piece in got[row]) == texts[prompt]
        assert got[row][-1].finish == "length"


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("guessed", [False, True])
def test_a_row_that_diverges_ends_and_its_neighbours_do_not_notice(mixer: str, guessed: bool) -> None:
    """A token of NaN, in a prompt; also the request that comes into its slot is as it should be."""
    model, n = build(MIXERS[mixer]), 8
    clean = [[1, 2, 3], [9, 8, 7, 6, 5], [4, 4, 20]]
    expected = plain(model, clean, n)
    texts = [p + e for p, e in zip(clean, expected, strict=True)]
    # In no text, no padding, and no wrong guess.
    poison = min({*range(1, V)} - {t + wrong for text in texts for t in text for wrong in (0, 1)})
    model.embed.weight[poison] = torch.nan
    drafter = Oracle([*texts, [1, poison, 2] + [0] * n], lambda text, turn: 2 if text < 3 else 0)
    engine = Engine(model, rows=3, capacity=16, drafter=drafter if guessed else None, draft_tokens=2, rounds=2)
    for prompt in (clean[0], [1, poison, 2], clean[1], clean[2]):
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    got = drain(engine)
    assert [(piece.token, piece.finish) for piece in got[1]] == [(-1, "diverged")]
    assert [tokens(got[row]) for row in (0, 2, 3)] == expected


def test_a_cheap_drafter_is_compared_with_what_came_while_nothing_is_read() -> None:
    """Looks without guesses tell the pace how many there would have been and would have stood; tokens are the same."""
    model, n = build(MIXERS["mamba2"]), 24
    expected = plain(model, PROMPTS[:1], n)
    for right, stands in ((4, True), (0, False)):
        drafter = Oracle([PROMPTS[0] + expected[0]], lambda *_, right=right: right)
        drafter.always = False
        engine = Engine(model, rows=1, capacity=40, drafter=drafter, rounds=4)
        engine.pace.choose = lambda slots=1: 0
        engine.submit(Request(PROMPTS[0], Limits(n, end_tokens=[])))
        got: list[int] = []
        while engine.busy:
            got += [piece.token for piece in engine.step()]
        assert got == expected[0]
        assert all(look.guessed == 0 for look in engine.looks)
        assert (engine.pace.accepted > 0.9) == stands
        assert (engine.pace.accepted < 0.4) == (not stands)


@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
def test_warming_changes_no_token_and_tells_what_rounds_take(mixer: str) -> None:
    model, n = build(MIXERS[mixer]), 12
    expected = plain(model, PROMPTS, n)
    texts = [prompt + more for prompt, more in zip(PROMPTS, expected, strict=True)]
    engine = Engine(model, rows=4, capacity=32, drafter=Oracle(texts, lambda *_: 2), most_drafted=4, rounds=2)
    # As where a round has one shape, on a GPU: else there is nothing to do beforehand.
    engine.warm(Request(PROMPTS[0], Limits(n)))
    assert engine.pace.costs(1) == {}
    engine._rounds.static = True  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ConfigError, match="warm: expected at most 32 tokens as a row has room for, got 3 and 99"):
        engine.warm(Request(PROMPTS[0], Limits(99)))
    # Two ends make room that the first request does not need.
    engine.warm(Request(PROMPTS[0], Limits(n, end_tokens=[V - 1, V - 2])))
    assert all(sorted(engine.pace.costs(slots)) == [IN_VAIN, 0, 1, 3, 4] for slots in (1, 2, 4))
    assert all(cost > 0 for slots in (1, 2, 4) for cost in engine.pace.costs(slots).values())
    assert not engine.busy
    for prompt in PROMPTS:
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    with pytest.raises(ConfigError, match="warm: expected nothing under way, got 4"):
        engine.warm(Request(PROMPTS[0]))
    got = drain(engine)
    assert [tokens(got[row]) for row in range(4)] == expected
    # What a round takes is known, so the first look guesses already.
    assert engine.looks[0].k > 0


@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_a_drafter_is_told_what_plain_rounds_gave(rounds: int) -> None:
    """All at once, in order, with the stream that each token was drawn from."""

    class Witness(Oracle):
        hears = True

        def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
            super().observe(tokens_bt, n_b, hidden_btd)
            assert tokens_bt.shape[1] <= 16
            heard.extend(zip(tokens_bt[0, : n_b[0]].tolist(), hidden_btd[0, : n_b[0]].clone(), strict=True))

    model, n = build(MIXERS["attention"]), 23
    expected, heard = plain(model, PROMPTS[:1], n)[0], list[tuple[int, Tensor]]()
    engine = Engine(model, rows=2, capacity=40, drafter=Witness([PROMPTS[0] + expected], lambda *_: 0), rounds=rounds)
    engine.pace.choose = lambda slots=1: 0
    engine.submit(Request(PROMPTS[0], Limits(n, end_tokens=[])))
    drain(engine)
    assert [token for token, _ in heard] == expected
    hidden_td = model.hidden(torch.tensor([PROMPTS[0] + expected]))[0, len(PROMPTS[0]) - 1 : -1]
    torch.testing.assert_close(torch.stack([stream_d for _, stream_d in heard]), hidden_td)


@pytest.mark.parametrize("mixer", ["s4", "s4d", "laughing_hyena"])
def test_a_round_without_guesses_passes_over_a_state_once(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows keep is known before it is read: nothing reads a state apart, or writes it apart."""
    model = build(MIXERS[mixer])
    want = plain(model, PROMPTS, 6)
    apart: list[int] = []
    for name in ("read", "write_"):
        monkeypatch.setattr(step, name, lambda *args, **options: apart.append(1))
    engine = Engine(model, rows=3, capacity=32, rounds=2)
    for prompt in PROMPTS:
        engine.submit(Request(prompt, Limits(6, end_tokens=[])))
    got = drain(engine)
    assert [tokens(got[row]) for row in sorted(got)] == want
    assert not apart


def test_rounds_are_told_apart_by_all_that_decides_what_they_run() -> None:
    """Bad words of one token leave the room of longer ones, which a verifier must go through one by one."""
    forbids = [SamplingConfig(bad_words_ids=words) for words in ([[1, 2]], [[3]])]
    sampler = Sampler([forbids[0]], vocab_size=V)
    both = [sampler.features]
    sampler.put([0], [forbids[1]])
    both.append(sampler.features)
    assert not sampler.penalises
    assert both[0] != both[1]


def test_many_compiled_rounds_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function for each number of rows and guesses is more than a compiler expects of one piece of code."""
    compiled: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled(fn, backend="eager", **options))
    torch.compiler.reset()
    model, n = build(MIXERS["attention"]), 12
    expected = plain(model, PROMPTS, n)
    texts = [prompt + more for prompt, more in zip(PROMPTS, expected, strict=True)]
    engine = Engine(model, rows=2, capacity=32, drafter=CopySpec(), most_drafted=2, compile=True)
    # So that a few rows are many.
    with torch._dynamo.config.patch(recompile_limit=2):
        engine.warm(Request(PROMPTS[0], Limits(n, end_tokens=[])))
        for i, prompt in enumerate(PROMPTS):
            engine.submit(Request(prompt, Limits(n, end_tokens=[], min_new_tokens=i)))
        got = drain(engine)
    assert [PROMPTS[row] + tokens(got[row]) for row in range(4)] == texts
