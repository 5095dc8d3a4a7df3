"""Guesses are the prompt's next tokens; after an edit they are again, as soon as it is clear where the row stands."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.decode.aggressive import Aggressive
from subquad.engine.draft import Draft, Drafter, InTurn, parse_drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import Limits, generate
from subquad.engine.history import History
from subquad.engine.request import Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

V = 101
LAYER = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
CPU = torch.device("cpu")


def successor(vocab_size: int = V) -> Stack:
    """A model whose greedy token is always the last one plus 1, modulo the vocabulary."""
    model = Stack(ModelConfig(vocab_size, vocab_size + 3, 16, (LAYER,)))
    with torch.no_grad():
        model.embed.weight.copy_(torch.eye(vocab_size, vocab_size + 3))
        model.lm_head.weight.copy_(torch.eye(vocab_size, vocab_size + 3).roll(1, 0))
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.zero_()
    return model.double().requires_grad_(False)


def opened(drafter: Drafter, rows: int = 1, capacity: int = 300) -> Aggressive:
    drafter.open(successor(), rows, capacity)
    return drafter


def guesses(drafter: Aggressive, k: int, rows: int = 1) -> list[list[int]]:
    sampler = Sampler([SamplingConfig()] * rows, CPU)
    draft = drafter.propose(rows, k, sampler, History.start([[0]] * rows, 0))
    assert draft.q_bkv is None and draft.tokens_bk.shape == (rows, k) and draft.tokens_bk.dtype == torch.int64
    return [row[:n] for row, n in zip(draft.tokens_bk.tolist(), draft.length_b.tolist(), strict=True)]


def tell(drafter: Drafter, *rows: Sequence[int]) -> None:
    """New tokens of the first rows; what is padded does not count."""
    width = max(map(len, rows)) + 1
    tokens_bt = torch.tensor([[*row, *[77] * (width - len(row))] for row in rows])
    drafter.observe(tokens_bt, torch.tensor([len(row) for row in rows]), torch.zeros(len(rows), width, 4))


def rounds(drafter: Aggressive, prompt: Sequence[int], output: Sequence[int], k: int) -> list[list[int]]:
    """The guesses of every round of a row that writes `output`."""
    drafter.put([0], [prompt])
    asked: list[list[int]] = []
    done = 0
    while done < len(output):
        guess = guesses(drafter, k)[0]
        asked.append(guess)
        pairs = zip(guess, output[done:], strict=False)
        stood = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        tell(drafter, output[done : done + stood + 1])
        done += stood + 1
    return asked


# A prompt: an instruction, the text to rewrite from 10 on, and what opens the answer.
PROMPT = [1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 4, 5]


@pytest.mark.parametrize(
    ("suffix", "output", "expected"),
    [
        # As it is: out of step for one token, then everything.
        ((1,), range(10, 20), [[], [11, 12, 13], [15, 16, 17], [19, 4, 5]]),
        ((2,), range(10, 20), [[], [], [12, 13, 14], [16, 17, 18]]),
        # Substitution, insertion and deletion: back after as many tokens as the suffix has.
        ((1,), [10, 11, 90, 13, 14, 15], [[], [11, 12, 13], [], [14, 15, 16]]),
        ((2,), [10, 11, 90, 13, 14, 15], [[], [], [12, 13, 14], [], [], [15, 16, 17]]),
        ((1,), [10, 11, 90, 12, 13, 14], [[], [11, 12, 13], [], [13, 14, 15]]),
        ((2,), [10, 11, 90, 12, 13, 14], [[], [], [12, 13, 14], [], [], [14, 15, 16]]),
        ((1,), [10, 11, 14, 15, 16], [[], [11, 12, 13], [15, 16, 17]]),
        ((2,), [10, 11, 14, 15, 16], [[], [], [12, 13, 14], [], [16, 17, 18]]),
        # The shortest that occurs is enough.
        ((1, 2), [10, 11, 90, 13, 14], [[], [11, 12, 13], [], [14, 15, 16]]),
        # Nothing of the prompt, and what stands in front of the text.
        ((1, 2), [90, 91, 92], [[], [], []]),
        ((2,), [16, 17, 18, 11, 12, 13], [[], [], [18, 19, 4], [], [13, 14, 15]]),
    ],
)
def test_guesses_follow_the_edits(suffix: tuple[int, ...], output: Sequence[int], expected: list[list[int]]) -> None:
    assert rounds(opened(Aggressive(suffix)), PROMPT, list(output), 3) == expected


def test_the_last_tokens_of_the_prompt_count() -> None:
    """A pair whose first token is the prompt's last finds the text by its first token."""
    drafter = opened(Aggressive((2,)))
    drafter.put([0], [[1, 5, 30, 31, 32, 33, 30, 5]])
    assert guesses(drafter, 2) == [[]]
    tell(drafter, [30])
    assert guesses(drafter, 2) == [[31, 32]]
    drafter.put([0], [[1, 5, 30, 31, 32, 1, 5]])
    assert guesses(drafter, 2) == [[30, 31]]


def test_an_ambiguous_suffix_guesses_nothing() -> None:
    prompt = [20, 21, 30, 20, 21, 31, 9]
    for suffix in ((1,), (2,), (1, 2)):
        drafter = opened(Aggressive(suffix))
        drafter.put([0], [prompt])
        tell(drafter, [20, 21])
        assert guesses(drafter, 2) == [[]]
        tell(drafter, [31])
        assert guesses(drafter, 2) == [[9]]


def test_a_longer_suffix_decides_between_places() -> None:
    prompt = [40, 20, 21, 30, 31, 41, 20, 21, 50, 51, 9]
    for suffix, expected in (((2,), []), ((1, 2, 3), [50, 51]), ((3,), [50, 51])):
        drafter = opened(Aggressive(suffix))
        drafter.put([0], [prompt])
        # In one block, since 41 alone leads to the place too.
        tell(drafter, [90, 41, 20, 21])
        assert guesses(drafter, 2) == [expected]


def test_what_is_ahead_decides_before_what_is_behind() -> None:
    """A pair that occurs twice is no longer ambiguous once its first occurrence has been passed."""
    prompt = [20, 21, 30, 31, 32, 20, 21, 33, 34, 9]
    drafter = opened(Aggressive((2,)))
    drafter.put([0], [prompt])
    tell(drafter, [30, 31])
    tell(drafter, [32])
    assert guesses(drafter, 3) == [[20, 21, 33]]
    tell(drafter, [80])
    tell(drafter, [20, 21])
    assert guesses(drafter, 3) == [[33, 34, 9]]


def test_a_place_that_did_not_stand_is_forgotten() -> None:
    """A token that leads far ahead by chance must not put the true place behind the row."""
    prompt = [10, 11, 12, 13, 14, 15, 16, 12, 13, 60, 61, 9]
    drafter = opened(Aggressive((1,)))
    drafter.put([0], [prompt])
    tell(drafter, [14, 15])
    tell(drafter, [16])
    tell(drafter, [61])
    assert guesses(drafter, 1) == [[9]]
    tell(drafter, [12])
    assert guesses(drafter, 2) == [[13, 60]]


def test_the_end_of_the_prompt_ends_the_guesses() -> None:
    drafter = opened(Aggressive((1,)))
    drafter.put([0], [[6, 7, 8]])
    tell(drafter, [6])
    assert guesses(drafter, 5) == [[7, 8]]
    tell(drafter, [7, 8])
    assert guesses(drafter, 5) == [[]]
    # What stands behind the prompt is the row's own output, and no source.
    tell(drafter, [6])
    assert guesses(drafter, 5) == [[7, 8]]


def test_what_was_not_kept_does_not_move_the_pointer() -> None:
    """Behind a guess that fell the model often writes what the prompt has there."""
    drafter = opened(Aggressive((1,)), rows=2)
    prompt = [30, 20, 21, 22, 40, 20, 21, 22, 41, 20, 23]
    drafter.put([0, 1], [prompt, prompt])
    tell(drafter, [30], [30])
    drafter.observe(torch.tensor([[20, 21, 22], [20, 21, 22]]), torch.tensor([1, 0]), torch.zeros(2, 3, 4))
    assert guesses(drafter, 2, rows=2) == [[21, 22], [20, 21]]


def test_all_guesses_are_tokens_behind_one_that_is_none() -> None:
    drafter = opened(Aggressive((1,)))
    drafter.put([0], [[6, 7, 8]])
    tell(drafter, [6, -1])
    draft = drafter.propose(1, 8, Sampler([SamplingConfig()], CPU), History.start([[0]], 0))
    assert draft.length_b.tolist() == [0]
    assert draft.tokens_bk.min() >= 0


class Plain:
    """The rule of `Aggressive` in lists, for one row."""

    def __init__(self, suffix: Sequence[int], prompt: Sequence[int]) -> None:
        self.suffix, self.source, self.told, self.sure = suffix, list(prompt), list(prompt), 0
        self.at = self.seek()

    def seek(self) -> int | None:
        for gamma in self.suffix:
            last, ends = self.told[-gamma:], range(gamma, len(self.source))
            if len(last) < gamma:
                continue
            places = [end for end in ends if self.source[end - gamma : end] == last]
            ahead = [end for end in places if end > self.sure]
            if len(ahead or places) == 1:
                return (ahead or places)[0]
        return None

    def observe(self, tokens: Sequence[int]) -> None:
        in_step = self.at is not None
        for token in tokens:
            in_step = in_step and self.at is not None and self.source[self.at : self.at + 1] == [token]
            if in_step and self.at is not None:
                self.at = self.sure = self.at + 1
            self.told.append(token)
        if not in_step:
            self.at = self.seek()

    def guess(self, k: int) -> list[int]:
        return [] if self.at is None else self.source[self.at : self.at + k]


def edited(prompt: Sequence[int], rng: random.Random, size: int) -> list[int]:
    """The prompt with one token in six replaced, put behind another or left out."""
    output: list[int] = []
    for token in prompt:
        kind = rng.randrange(18)
        output += [[rng.randrange(size)], [rng.randrange(size), token], []][kind] if kind < 3 else [token]
    return output


@pytest.mark.parametrize("suffix", [(1,), (2,), (1, 2, 3), (4, 2)])
def test_it_is_the_plain_rule_on_random_edits(suffix: tuple[int, ...]) -> None:
    """Rows of several lengths side by side, tokens that repeat, rounds of any width, idle ones too."""
    rng, rows = random.Random(5), 4
    drafter = opened(Aggressive(suffix), rows)
    for size in (8, 50):
        prompts = [[rng.randrange(size) for _ in range(n)] for n in (1, 2, 30, 80)]
        outputs = [edited([*prompt, *prompt[::3], *prompt][:120], rng, size) for prompt in prompts]
        drafter.put(range(rows), prompts)
        plain = [Plain(suffix, prompt) for prompt in prompts]
        seen = 0
        while any(outputs):
            expected = [row.guess(3) for row in plain]
            assert guesses(drafter, 3, rows) == expected
            seen += sum(map(len, expected))
            widths = [rng.randrange(5) for _ in outputs]
            new = [output[:n] for output, n in zip(outputs, widths, strict=True)]
            outputs = [output[n:] for output, n in zip(outputs, widths, strict=True)]
            for row, tokens in zip(plain, new, strict=True):
                row.observe(tokens)
            tell(drafter, *new)
        assert seen > 20


def test_rows_are_independent_and_move() -> None:
    drafter = opened(Aggressive((1,)), rows=4)
    drafter.put([0, 1, 3], [[10, 11, 12, 13], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34, 35]])
    tell(drafter, [10], [], [], [31])
    assert guesses(drafter, 2, rows=4) == [[11, 12], [], [], [32, 33]]
    drafter.move([3], [2])
    assert guesses(drafter, 2, rows=3) == [[11, 12], [], [32, 33]]
    drafter.put([3], [[31, 40, 41, 31]])
    assert guesses(drafter, 2, rows=4) == [[11, 12], [], [32, 33], [40, 41]]
    tell(drafter, [12], [21, 22], [90])
    tell(drafter, [], [], [33])
    assert guesses(drafter, 2, rows=3) == [[13], [23, 24], [34, 35]]


def test_what_a_row_has_passed_moves_with_it_and_ends_with_it() -> None:
    """50 is ambiguous in the whole prompt, and not behind 52."""
    prompt = [50, 51, 52, 53, 50, 54]
    drafter = opened(Aggressive((1,)), rows=2)
    drafter.put([1], [prompt])
    tell(drafter, [], [51])
    tell(drafter, [], [52])
    drafter.move([1], [0])
    tell(drafter, [50])
    assert guesses(drafter, 2) == [[54]]
    drafter.put([1], [prompt])
    tell(drafter, [], [50])
    assert guesses(drafter, 2, rows=2) == [[54], []]


def test_a_slot_begins_anew() -> None:
    drafter = opened(Aggressive((1,)))
    assert rounds(drafter, PROMPT, [10, 11], 2) == [[], [11, 12]]
    assert rounds(drafter, [50, 51, 52, 53], [10, 51, 52], 2) == [[], [], [52, 53]]


def run(engine: Engine, prompt: Sequence[int], n: int) -> list[int]:
    engine.submit(Request(prompt, Limits(max_new_tokens=n, end_tokens=[])))
    tokens: list[int] = []
    while engine.busy:
        tokens += [piece.token for piece in engine.step()]
    return tokens


def test_an_engine_copies_a_text_and_gets_over_an_edit() -> None:
    """The model corrects 3 to 8 on the way; all guesses but those of one round stand."""
    model, vocab_size = successor(23), 23
    prompt = [0, 1, 2, 3, 4, 5, 6, 7, 3, *range(9, vocab_size)]
    engine = Engine(model, rows=1, capacity=64, drafter=Aggressive(), draft_tokens=4)
    assert run(engine, prompt, 20) == list(range(20))
    # Rounds give 0, 1 to 5, 6 to 8 of 6, 7, 3 and 9, then 9, 10 to 14, 15 to 19.
    assert [look.tokens for look in engine.looks] == [1, 5, 3, 1, 5, 5]
    assert [look.guessed for look in engine.looks] == [0, 4, 4, 0, 4, 4]
    assert [look.kept for look in engine.looks] == [0, 4, 2, 0, 4, 4]


def test_a_drafter_behind_guesses_where_it_is_out_of_step() -> None:
    behind = parse_drafter(["aggressive,suffix=3", "aggressive,suffix=1"], lambda name: successor())
    model = successor(23)
    prompt = [[*range(23)], [5, 6, 7, 9, 10, 11, 12, 4]]
    limits = Limits(max_new_tokens=15, end_tokens=[])
    expected = generate(model, prompt, limits=limits)
    assert generate(model, prompt, limits=limits, drafter=behind, draft_tokens=3) == expected
    engine = Engine(model, rows=1, capacity=64, drafter=behind, draft_tokens=4)
    assert run(engine, prompt[0], 11) == list(range(11))
    assert [look.tokens for look in engine.looks] == [1, 5, 5]


def test_a_drafter_behind_that_draws_keeps_its_distributions() -> None:
    """A copy counts as drawn with certainty beside what the other has drawn."""

    class Draws(Aggressive):
        def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
            tokens_bk = torch.full((rows, k), 9)
            return Draft(tokens_bk, torch.full((rows,), k), torch.full((rows, k, V), 1 / V))

    drafter = opened(InTurn([Aggressive((1,)), Draws()]), rows=2)
    drafter.put([0, 1], [PROMPT, PROMPT])
    tell(drafter, [90], [10])
    draft = drafter.propose(2, 3, Sampler([SamplingConfig()] * 2, CPU), History.start([[0]] * 2, 0))
    assert draft.tokens_bk.tolist() == [[9, 9, 9], [11, 12, 13]]
    assert draft.length_b.tolist() == [3, 3]
    assert draft.q_bkv is not None
    assert draft.q_bkv[0].eq(1 / V).all()
    assert draft.q_bkv[1].nonzero().tolist() == [[0, 11], [1, 12], [2, 13]]


@pytest.mark.parametrize("suffix", ["", "two", "2+", "-1", "0", "2+0"])
def test_lengths_that_cannot_be_are_refused(suffix: str) -> None:
    with pytest.raises(ConfigError, match="aggressive: expected"):
        Aggressive.build({"suffix": suffix}, lambda name: successor())


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'sufix'"):
        Aggressive.build({"sufix": "2"}, lambda name: successor())
