"""The engine itself: rows join, leave, move and pause; guesses, ends and refusals change nobody's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from subquad.core.errors import ConfigError, DataError
from subquad.core.registry import methods
from subquad.engine.draft import Draft, Drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import generate
from subquad.engine.request import Limits, Piece, Request
from subquad.engine.sampler import History, Sampler, SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 29
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
# One example of each registered mixer that decodes.
MIXERS = {
    slug: {"mixer": slug, **next(iter(card.examples.values()))}
    for slug, card in methods("mixers").items()
    if card.causal and card.splittable
}
PROMPTS = [[1, 2, 3], [5], [9, 8, 17, 6, 5, 4, 3, 2, 1, 10, 11], [4, 4, 20, 21, 22]]


def build(layer: Mapping[str, Any]) -> Stack:
    torch.manual_seed(0)
    bare = {k: v for k, v in layer.items() if k != "d_model"}
    model = Stack(ModelConfig(V, layer.get("d_model", 32), 48, (bare,)))
    with torch.no_grad():
        for p in model.parameters():  # far from uniform logits, and no special starts
            p.add_(0.1 * torch.randn_like(p))
    return model.double().requires_grad_(False)


@pytest.fixture
def model() -> Stack:
    return build(ATTENTION)


def plain(model: Stack, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """Greedy continuations, each prompt alone."""
    limits = Limits(n, end_tokens=[])
    return [generate(model, [prompt], limits=limits)[0].tokens for prompt in prompts]


def drain(engine: Engine, before_step: Callable[[int], None] = lambda step: None) -> dict[int, list[Piece]]:
    """All pieces of every request."""
    got: dict[int, list[Piece]] = {}
    step = 0
    while engine.busy:
        before_step(step)
        for piece in engine.step():
            assert not got.get(piece.row) or got[piece.row][-1].finish is None
            got.setdefault(piece.row, []).append(piece)
        step += 1
        assert step < 500
    return got


def tokens(pieces: Sequence[Piece]) -> list[int]:
    return [piece.token for piece in pieces]


class Oracle(Drafter):
    """Knows what comes, and makes the first ``right(text, round)`` guesses right and the next ones wrong.

    Args:
        texts: prompt and true continuation of every request.
        right: right guesses, of a text by its number and how many rounds it has had.
    """

    def __init__(self, texts: Sequence[Sequence[int]], right: Callable[[int, int], int]) -> None:
        self.texts, self.right = [list(text) for text in texts], right
        # Of each slot, the number of its text, how much of it is told, and its rounds.
        self.slots: list[tuple[int, int, int]] = []

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack], behind: Drafter | None) -> Self:
        raise NotImplementedError

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        self.slots = [(0, 0, 0)] * rows

    def prepare(self, rows: int, k: int) -> None:
        pass

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        for row, prompt in zip(rows, prompts, strict=True):
            told = list(prompt)
            text = next(i for i, text in enumerate(self.texts) if text[: len(told)] == told)
            self.slots[row] = (text, len(told), 0)

    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        guesses: list[list[int]] = []
        for text, told, turn in self.slots[:rows]:
            coming = [*self.texts[text][told : told + k], *[0] * k][:k]
            right = self.right(text, turn)
            guesses.append([t if i < right else (t + 1) % V for i, t in enumerate(coming)])
        return Draft(torch.tensor(guesses), torch.full((rows,), k))

    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        assert hidden_btd.shape[:2] == tokens_bt.shape
        for slot, (row, n) in enumerate(zip(tokens_bt.tolist(), n_b.tolist(), strict=True)):
            text, told, turn = self.slots[slot]
            if n:
                assert row[:n] == self.texts[text][told : told + n]
                self.slots[slot] = (text, told + n, turn + 1)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self.slots[target] = self.slots[source]


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


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(chr(ord("A") + i) for i in ids)


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


def test_what_does_not_fit_is_refused_and_nothing_else_is_touched(model: Stack) -> None:
    expected = plain(model, PROMPTS[:2], 6)
    engine = Engine(model, rows=2, capacity=16)
    assert engine.submit(Request(PROMPTS[0], Limits(6, end_tokens=[]))) == 0
    got = engine.step()
    bad = [
        (lambda: Request([1] * 10, Limits(8)), ConfigError, "^request 1: expected at most 16 tokens .* 10 and 8 new"),
        (lambda: Request([1], Limits(0)), ConfigError, "^max_new_tokens"),
        (lambda: Request([1], Limits(4, stop=["x"])), ConfigError, "^stop: expected a tokenizer"),
        (lambda: Request([1], Limits(4, stop=[""]), tokenizer=Letters()), ConfigError, "^stop: expected strings"),
        (lambda: Request([], Limits(4)), DataError, "^request 1: expected at least one token"),
        (lambda: Request([1, V], Limits(4)), DataError, f"^request 1: expected token ids .* got {V}"),
        (lambda: Request([-1], Limits(4)), DataError, "^request 1: expected token ids"),
        (lambda: Request([1], Limits(4), SamplingConfig(temperature=-1)), ConfigError, "^temperature"),
        (lambda: Request([1], Limits(4), SamplingConfig(top_p=math.nan)), ConfigError, "^top_p"),
    ]
    for make, error, message in bad:
        with pytest.raises(error, match=message):
            engine.submit(make())
    assert (engine.live, engine.busy) == (1, True)
    # A row as long as the capacity fits: the last token is never read.
    assert engine.submit(Request([1] * 11, Limits(6, end_tokens=[]))) == 1
    assert engine.submit(Request(PROMPTS[1], Limits(6, end_tokens=[]))) == 2
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == expected[0]
    assert tokens(rest[2]) == expected[1]
    assert tokens(rest[1]) == plain(model, [[1] * 11], 6)[0]


@pytest.mark.parametrize(
    ("prompt", "limits", "error"),
    [([1.5, 2], Limits(4), DataError), ([1], Limits(4, end_tokens=[2**70]), ConfigError)],
    ids=["a prompt of fractions", "an end token beyond 64 bits"],
)
def test_what_no_tensor_holds_is_refused_before_it_stops_all_others(
    model: Stack, prompt: Any, limits: Limits, error: type[Exception]
) -> None:
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([1], Limits(4, end_tokens=[])))
    with pytest.raises(error):
        engine.submit(Request(prompt, limits))
    assert tokens(drain(engine)[0]) == plain(model, [[1]], 4)[0]


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"capacity": 0}, {"chunk": 0}, {"rounds": 0}, {"drafter": True, "draft_tokens": 0}]
)
def test_an_engine_of_nothing_is_refused(model: Stack, options: dict[str, Any]) -> None:
    if "drafter" in options:
        options = options | {"drafter": Oracle([], lambda text, turn: 0)}
    make: Any = Engine
    with pytest.raises(ConfigError, match="expected"):
        make(model, **({"rows": 1, "capacity": 4} | options))


def test_a_request_is_forgotten_wherever_it_stands(model: Stack) -> None:
    """In the queue, while its prompt is read, and while it decodes; its slot serves the next one."""
    expected = plain(model, PROMPTS, 9)
    engine = Engine(model, rows=2, capacity=32, chunk=3)
    for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[1], PROMPTS[3], PROMPTS[2]):
        engine.submit(Request(prompt, Limits(9, end_tokens=[])))
    first = engine.step()
    assert {piece.row for piece in first} == {0}
    assert engine.live == 2
    assert [engine.cancel(row) for row in (0, 1, 2)] == [True] * 3
    assert (engine.live, engine.busy) == (0, True)
    got = drain(engine)
    assert set(got) == {3, 4}
    assert (tokens(got[3]), tokens(got[4])) == (expected[3], expected[2])
    assert not any(engine.cancel(row) for row in (0, 1, 2, 3, 4, 5, -1))


@pytest.mark.parametrize(("mixer", "rounds"), [*((mixer, 2) for mixer in MIXERS), ("attention", 1)])
def test_a_row_that_is_paused_again_and_again_goes_on_where_it_stood(mixer: str, rounds: int) -> None:
    """While its prompt is read and while it decodes; noise, penalties and the number of tokens left go with it."""
    model = build(MIXERS[mixer])
    settings = [SamplingConfig(temperature=0.8, presence_penalty=1.0 * (i != 1), seed=i) for i in range(4)]
    limits = Limits(11, end_tokens=[])
    expected = [
        generate(model, [p], limits=limits, sampling=[s])[0].tokens for p, s in zip(PROMPTS, settings, strict=True)
    ]
    # The one without a penalty comes first, so that counts are made room for while it waits.
    engine = Engine(model, rows=2, capacity=32, chunk=4, rounds=rounds)
    order = [1, 2, 0, 3]
    for i in order:
        engine.submit(Request(PROMPTS[i], limits, settings[i]))
    assert not engine.pause(0)

    def pause(step: int) -> None:
        if step % 2 == 1:
            engine.pause(step // 2 % 4)

    got = drain(engine, pause)
    assert [tokens(got[row]) for row in range(4)] == [expected[i] for i in order]
    assert not engine.pause(0)


def test_a_paused_row_waits_first_in_the_queue_and_can_be_cancelled(model: Stack) -> None:
    engine = Engine(model, rows=1, capacity=16)
    for _ in range(3):
        engine.submit(Request([1, 2], Limits(3, end_tokens=[])))
    engine.step()
    assert engine.pause(0)
    assert not engine.pause(0)
    assert engine.live == 0
    assert {piece.row for piece in engine.step()} == {0}
    assert engine.pause(0)
    assert engine.cancel(0)
    assert set(drain(engine)) == {1, 2}


def test_several_rounds_between_two_looks_give_their_tokens_at_once(model: Stack) -> None:
    engine = Engine(model, rows=3, capacity=32, rounds=4)
    for prompt, n in zip(PROMPTS, (9, 4, 2), strict=False):
        engine.submit(Request(prompt, Limits(n, end_tokens=[])))
    counts: list[list[int]] = []
    while engine.busy:
        pieces = engine.step()
        counts.append([sum(piece.row == row for piece in pieces) for row in range(3)])
    assert counts == [[4, 4, 2], [4, 0, 0], [1, 0, 0]]
    assert [look.tokens for look in engine.looks] == [10, 4, 1]
    assert [look.rows for look in engine.looks] == [3, 1, 1]


def test_penalties_of_a_newcomer_do_not_touch_a_row_under_way(model: Stack) -> None:
    """Room for counts is made while the first row decodes with noise of its own."""
    sampling = SamplingConfig(temperature=1.0, seed=3)
    limits = Limits(10, end_tokens=[])
    penalised = SamplingConfig(temperature=1.0, repetition_penalty=1.8, frequency_penalty=0.5, seed=4)
    expected = [generate(model, [[5]], limits=limits, sampling=[s])[0].tokens for s in (sampling, penalised)]
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([5], limits, sampling))
    got = engine.step() + engine.step()
    engine.submit(Request([5], limits, penalised))
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == expected[0]
    assert tokens(rest[1]) == expected[1]


def test_a_row_that_was_paused_before_counts_had_room_goes_on_with_its_own_noise(model: Stack) -> None:
    """It comes back together with the first row that has a penalty."""
    limits = Limits(10, end_tokens=[])
    settings = [SamplingConfig(temperature=1.0, seed=3), SamplingConfig(temperature=1.0, presence_penalty=2.0, seed=4)]
    expected = [generate(model, [[5]], limits=limits, sampling=[s])[0].tokens for s in settings]
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([5], limits, settings[0]))
    got = engine.step() + engine.step()
    assert engine.pause(0)
    engine.submit(Request([5], limits, settings[1]))
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == expected[0]
    assert tokens(rest[1]) == expected[1]


def test_end_tokens_of_a_newcomer_do_not_touch_a_row_under_way(model: Stack) -> None:
    (free,) = plain(model, [[5]], 10)
    engine = Engine(model, rows=2, capacity=16)
    engine.submit(Request([5], Limits(10, end_tokens=[free[6]])))
    got = engine.step()
    engine.submit(Request([5], Limits(10, end_tokens=sorted({*range(V)} - {*free[:4]}))))
    rest = drain(engine)
    assert tokens(got) + tokens(rest[0]) == free[: free.index(free[6]) + 1]
    assert tokens(rest[1]) == free[: len(rest[1])]
    assert rest[1][-1].finish == "end"
    assert free[len(rest[1]) - 1] not in free[:4]


def test_the_state_is_allocated_once_and_its_bytes_are_told(model: Stack) -> None:
    engine = Engine(model, rows=3, capacity=32)
    before = engine.nbytes
    assert before == model.init_state(3, 32, device="meta").nbytes
    engine.submit(Request([1, 2, 3], Limits(5)))
    drain(engine)
    assert engine.nbytes == before
    assert not engine.captured
