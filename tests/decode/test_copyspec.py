"""Runs of tokens are found where they stood last, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.engine.draft import Draft, InTurn, parse_drafter
from subquad.engine.engine import Engine
from subquad.engine.generate import Limits, generate
from subquad.engine.history import History
from subquad.engine.request import Piece, Request
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.engine.trace import Look
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack


def tiny() -> Stack:
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    return Stack(ModelConfig(vocab_size=50, d_model=16, d_mlp=32, layers=(layer,)))


def opened(rows: int, capacity: int, gammas: tuple[int, ...] = (3,)) -> CopySpec:
    copy = CopySpec(gammas)
    copy.open(tiny(), rows, capacity)
    return copy


def drained(engine: Engine) -> list[Piece]:
    pieces: list[Piece] = []
    while engine.busy:
        pieces += engine.step()
    return pieces


def guesses(copy: CopySpec, rows: int, k: int) -> list[list[int]]:
    draft: Draft = copy.propose(rows, k, Sampler([SamplingConfig()] * rows), History.start([[0]] * rows, 0))
    return [row[:n] for row, n in zip(draft.tokens_bk.tolist(), draft.length_b.tolist(), strict=True)]


def rescanned(tokens: list[int], gammas: tuple[int, ...], k: int) -> list[int]:
    """The same by looking through all tokens: the latest earlier occurrence of the longest run asked for first."""
    for gamma in gammas:
        for end in range(len(tokens) - 1, gamma - 1, -1):
            if len(tokens) >= gamma and tokens[end - gamma : end] == tokens[-gamma:]:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(k)]
    return []


@pytest.mark.parametrize("gammas", [(3,), (1,), (3, 2, 1), (2, 5)])
def test_guesses_are_those_of_a_rescan_whatever_comes_in_whatever_pieces(gammas: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, capacity = 4, 150
    copy = opened(rows, 1 << 17, gammas)  # so large a table that no two of its few runs share a bucket
    texts = [torch.randint(4, (n,), generator=generator).tolist() for n in (1, 2, 9, 30)]
    copy.put(range(rows), texts)
    while max(map(len, texts)) < capacity - 8:
        assert guesses(copy, rows, 5) == [rescanned(text, gammas, 5) for text in texts]
        tokens_bt = torch.randint(4, (rows, 6), generator=generator)
        n_b = torch.randint(7, (rows,), generator=generator)
        copy.observe(tokens_bt, n_b, torch.zeros(rows, 6, 16))
        for text, new, n in zip(texts, tokens_bt.tolist(), n_b.tolist(), strict=True):
            text += new[:n]


def test_a_row_begins_anew_without_what_stood_there() -> None:
    copy = opened(2, 20)
    copy.put([0, 1], [[1, 2, 3, 4, 1, 2, 3], [5] * 6])
    assert guesses(copy, 2, 2) == [[4, 1], [5, 5]]
    copy.put([0], [[7, 1, 2, 3]])
    assert guesses(copy, 2, 2) == [[], [5, 5]]
    copy.move([1], [0])
    assert guesses(copy, 1, 3) == [[5, 5, 5]]


def cycle() -> Stack:
    """A model of one token after another, 0 1 2 ... 9 0 1 ..."""
    model = tiny().double().requires_grad_(False)
    model.embed.weight.zero_()
    model.lm_head.weight.zero_()
    for name, x in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            x.zero_()
    for token in range(10):
        model.embed.weight[token, token] = 1.0
        model.lm_head.weight[(token + 1) % 10, token] = 1.0
    return model


def test_text_that_repeats_is_given_in_few_rounds() -> None:
    """After a period all guesses stand."""
    model = cycle()
    looks: list[Look] = []
    (got,) = generate(model, [[0, 1]], limits=Limits(60), drafter=CopySpec(), draft_tokens=6, on_look=looks.append)
    assert got.tokens == [(2 + i) % 10 for i in range(60)]
    # Ten single tokens and two more until a run of three has come again, then seven a round.
    assert len(looks) <= 12 + -(-48 // 7)
    assert sum(look.kept for look in looks) == sum(look.guessed for look in looks) == 60 - len(looks)


def test_a_copy_is_read_in_steps_as_long_as_it_has_been_one() -> None:
    """Three guesses for each token that stands alike, rounded up to the ladder; all of them where they stand anyway."""
    copy = opened(3, 40, (3, 2, 1))
    copy.put([0, 1, 2], [[1, 9, 2, 9], [1, 2, 3, 4, 5, 6, 0, 2, 3, 4, 5, 6], [1, 2, 3]])
    draft = copy.propose(3, 15, Sampler([SamplingConfig()] * 3), History.start([[0]] * 3, 0))
    assert draft.length_b.tolist() == [15, 15, 0]
    assert draft.worth_b.tolist() == [3, 15, 0]
    assert draft.cut(7).worth_b.tolist() == [3, 7, 0]
    # What stands behind and does not weigh its guesses is worth all of them.
    behind = Draft(torch.zeros(3, 15, dtype=torch.int64), torch.tensor([15, 15, 9]))
    assert draft.over(behind, 50).worth_b.tolist() == [3, 15, 9]
    assert behind.over(draft, 50).worth_b.tolist() == [15, 15, 9]


def test_rounds_read_what_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that repeats one period: a round reads few guesses where the copy is young, and soon the most."""
    model = cycle()
    looks: list[Look] = []
    engine = Engine(model, rows=1, capacity=100, drafter=CopySpec((3, 2, 1)), on_look=looks.append)

    def choose(slots: int) -> int:
        return 15

    # What a round takes on a shared machine decides nothing here.
    monkeypatch.setattr(engine.pace, "choose", choose)
    engine.submit(Request([0, 1], Limits(90, end_tokens=[])))
    got = [piece.token for piece in drained(engine)]
    assert got == [(2 + i) % 10 for i in range(90)]
    reads = [look.readable for look in looks]
    # Ten tokens that stand for the first time; then one that has come back, four more with what it brings, and so on.
    assert reads[:11] == [0] * 9 + [3, 15]
    assert set(reads[11:]) == {15}
    assert sum(look.kept for look in looks) == 90 - len(looks)


def test_what_stands_behind_guesses_where_no_run_is_found(models: Callable[[str], Stack]) -> None:
    both = parse_drafter(["copyspec,gammas=2", "draft_model,model=attention"], models)
    assert isinstance(both, InTurn)
    target = models("mamba2")
    both.open(target, 2, 20)
    both.put([0, 1], [[1, 2, 3, 1, 2], [4, 5, 6, 7, 8]])
    sampler = Sampler([SamplingConfig(temperature=1.0)] * 2)
    both.prepare(2, 2)
    draft = both.propose(2, 2, sampler, History.start([[0]] * 2, 0))
    assert draft.length_b.tolist() == [2, 2]
    assert draft.tokens_bk[0].tolist() == [3, 1]
    assert draft.q_bkv is not None
    # What is copied is certain; what is drawn has a distribution.
    assert draft.q_bkv[0].amax(-1).tolist() == [1.0, 1.0]
    assert float(draft.q_bkv[1].amax()) < 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("copyspec,gammas=0", "gammas of at least 1"),
        ("copyspec,gammas=x", "gammas like 3 or 3\\+2\\+1, got 'x'"),
        ("copyspec,gama=3", "unknown option 'gama'; did you mean 'gammas'"),
        ("copyspec,gammas", "expected SLUG,KEY=VALUE"),
        ("copypec", "unknown method 'copypec' in decode; did you mean 'copyspec'"),
    ],
)
def test_specs_that_mean_nothing(spec: str, message: str, models: Callable[[str], Stack]) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_drafter([spec], models)
