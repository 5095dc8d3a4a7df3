"""A head as drafter: its training form is what it does when it guesses, and one command trains one that is good."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from subquad.core.errors import CheckpointError, ConfigError
from subquad.core.layout import Layout
from subquad.data import Batch
from subquad.decode.draft_head import DraftHead
from subquad.engine import head_draft
from subquad.engine.draft import parse_drafter
from subquad.engine.generate import Limits, generate
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.draft_head import Head, load_head, save_head, untrained
from subquad.models.head_config import HeadConfig, usual_aux_layers
from subquad.models.stack import Stack
from subquad.ops import backends, linear_loss
from subquad.train.draft_head import compare, guess, guessable, measure, scored

from .conftest import V

Models = Callable[[str], Stack]
FEW = [2, 3, 5, 7, 11, 13]


def head_for(model: Stack, window: int = 6, ids: list[int] | None = None, aux: tuple[int, ...] = ()) -> Head:
    config = HeadConfig.like(model.config, window, kept=len(ids or []), target="it", aux_layers=aux)
    head = untrained(config, ids or []).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double())
    return head.requires_grad_(False)


@pytest.mark.parametrize("aux", [(), (0, 1)])
def test_a_head_begins_with_the_stream_standing_for_itself(aux: tuple[int, ...], models: Models) -> None:
    model = models("attention")
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(-2, 3, 32).double())
    tokens_bt = torch.randint(V, (2, 7))
    stream_btd = model.hidden(tokens_bt)
    head = untrained(HeadConfig.like(model.config, 4, aux_layers=aux)).double().begin_(model)
    seen_btd = head.fused(model.hidden(tokens_bt, aux_layers=aux))
    first, second = head.unroll(model, seen_btd, tokens_bt, 2)
    torch.testing.assert_close(first, stream_btd, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[:, 1:4], stream_btd[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slug", ["attention", "mamba2"])
def test_the_training_form_is_what_guessing_does(slug: str, models: Models) -> None:
    """Behind every column of two pieces: true pairs committed, then guesses on guesses, of the text's own tokens."""
    model = models(slug)
    window, steps = 6, 3
    head = head_for(model, window)
    tokens_bt = torch.randint(V, (2, 11))
    stream_btd = model.hidden(tokens_bt)
    unrolled = head.unroll(model, stream_btd, tokens_bt, steps)
    for column in range(11):
        start = column // window * window
        for s in range(min(steps, column - start + 1)):
            true = slice(start, column - s + 1)
            n = column - s + 1 - start
            state = head.init_pool(2, 4)
            pairs = (stream_btd[:, true], tokens_bt[:, true])
            out_btd, update = head.read(model, *pairs, state, Layout.dense(2, n))
            state, vectors = update.commit(), [out_btd[:, -1]]
            for i in range(s):
                guessed = (torch.stack(vectors, 1), tokens_bt[:, column - s + 1 : column - s + 2 + i])
                out_btd, _ = head.read(model, *guessed, state, Layout.dense(2, i + 1, start_b=state.seen_b))
                vectors.append(out_btd[:, -1])
            torch.testing.assert_close(unrolled[s][:, column], vectors[-1], rtol=1e-10, atol=1e-12)


def test_guesses_follow_the_pairs_that_stood(models: Models) -> None:
    """Two rows that kept different numbers of tokens in several rounds, against a read of all pairs at once."""
    model = models("attention")
    head = head_for(model, ids=FEW)
    drafter = DraftHead(head)
    drafter.open(model, 3, 40)
    drafter.put([0, 1], [[1, 2], [3]])
    sampler, history = Sampler([SamplingConfig()] * 3), History.start([[0]] * 2, 0)
    assert drafter.propose(2, 3, sampler, history).length_b.tolist() == [0, 0]
    told: list[list[tuple[torch.Tensor, int]]] = [[], []]
    for n in ([1, 1], [3, 0], [2, 4], [0, 2], [4, 4]):
        tokens_bt, hidden_btd = torch.randint(V, (2, 4)), torch.randn(2, 4, 32, dtype=torch.float64)
        drafter.observe(tokens_bt, torch.tensor(n), hidden_btd)
        for row, count in enumerate(n):
            told[row] += [(hidden_btd[row, i], int(tokens_bt[row, i])) for i in range(count)]
        drafter.propose(2, 3, sampler, history)  # changes nothing
        draft = drafter.propose(2, 3, sampler, history)
        assert draft.length_b.tolist() == [3, 3]
        for row, pairs in enumerate(told):
            assert draft.tokens_bk[row].tolist() == chain(model, head, pairs, 3)
    drafter.move([1], [2])
    history = History.start([[0]] * 3, 0)
    assert drafter.propose(3, 3, sampler, history).tokens_bk[2].tolist() == chain(model, head, told[1], 3)


@pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
def test_guesses_read_on_in_the_ring_as_in_states_of_their_own(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """More guesses than a ring has room for behind its window, and fewer, before and after it has gone around."""
    monkeypatch.setattr(head_draft, "FEW_PAIRS", 3)
    model = models("attention").float()
    model = model.cuda() if torch.cuda.is_available() else model
    head, found = head_for(model, window=4, ids=FEW).float(), dict[str, list[list[list[int]]]]()
    for backend in ("torch", "triton"):
        with backends.use(backend), torch.random.fork_rng():
            torch.manual_seed(0)
            drafter = DraftHead(head)
            drafter.open(model, 2, 80)
            sampler, history = Sampler([SamplingConfig()] * 2, model.device), History.start([[0]] * 2, 0, model.device)
            found[backend] = []
            for n, k in (([1, 3], 7), ([3, 2], 3), ([2, 3], 5)):
                told = torch.randint(V, (2, 3)), torch.tensor(n), torch.randn(2, 3, 32)
                drafter.observe(*(x.to(model.device) for x in told))
                found[backend].append(drafter.propose(2, k, sampler, history).tokens_bk.tolist())
    assert found["triton"] == found["torch"]


@pytest.mark.skipif(not (torch.cuda.is_available() or backends.interpreted()), reason="needs Triton")
def test_kernels_guess_and_judge_the_same_tokens(models: Models) -> None:
    """Whole rounds, of a head that guesses some tokens, at a temperature: noise and coins are the same."""
    model = models("attention").float()
    model = model.cuda() if torch.cuda.is_available() else model
    head, found = head_for(model, ids=FEW).float(), list[list[list[int]]]()
    for backend in ("torch", "triton"):
        with backends.use(backend):
            sampling, limits = SamplingConfig(temperature=0.7, seed=3), Limits(6, end_tokens=[])
            drafter, prompts = DraftHead(head), [[1, 2, 3, 4, 5], [7, 9]]
            some = generate(model, prompts, limits=limits, sampling=sampling, drafter=drafter, draft_tokens=3)
            found.append([one.tokens for one in some])
    assert found[0] == found[1]


def test_a_head_reads_prompts_in_pieces(models: Models) -> None:
    """Longer ones than its window too; a row that begins anew knows nothing of the one before."""
    model = models("attention")
    head = head_for(model, ids=FEW)
    drafter = DraftHead(head)
    drafter.open(model, 3, 40)
    sampler, history = Sampler([SamplingConfig()] * 3), History.start([[0]] * 3, 0)
    told: list[list[tuple[torch.Tensor, int]]] = [[], [], []]
    for rows, n, t in (([2, 0], [5, 1], 5), ([0, 2], [9, 20], 20)):
        tokens_bt, hidden_btd = torch.randint(V, (2, t)), torch.randn(2, t, 32, dtype=torch.float64)
        drafter.hear(rows, tokens_bt, torch.tensor(n), hidden_btd)
        for i, row in enumerate(rows):
            told[row] += [(hidden_btd[i, c], int(tokens_bt[i, c])) for c in range(n[i])]
    drafter.put([0, 2], [[1, 2], [3]])
    draft = drafter.propose(3, 3, sampler, history)
    assert draft.length_b.tolist() == [3, 0, 3]
    for row in (0, 2):
        assert draft.tokens_bk[row].tolist() == chain(model, head, told[row], 3)
    drafter.drop([2])
    assert drafter.propose(3, 3, sampler, history).length_b.tolist() == [3, 0, 0]


@pytest.mark.parametrize("aux", [(), (0,), (0, 1)])
@pytest.mark.parametrize("prompt", [[3], [3, 1, 4, 1, 5]])
def test_a_head_is_trained_on_the_pairs_that_the_engine_gives(
    aux: tuple[int, ...], prompt: list[int], models: Models
) -> None:
    """What the drafter has read of prompt and rounds, behind the last token, is what is trained there."""
    model = models("mamba2")
    drafter = DraftHead(head_for(model, window=16, aux=aux))
    limits = Limits(10 - len(prompt), end_tokens=[])
    (result,) = generate(model, [prompt], limits=limits, drafter=drafter, draft_tokens=2)
    text_1t = torch.tensor([[*prompt, *result.tokens]])
    guess_bnd, target_bnd, scored_bn = guess(model, drafter._head, text_1t, scored(text_1t, None, 16, 1))[0]
    torch.testing.assert_close(guess_bnd[:, 8], drafter._pool.stream_bd, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(target_bnd[:, 8], model.hidden(text_1t)[:, 9])
    assert scored_bn[0].tolist() == [True] * 9 + [False]


def chain(model: Stack, head: Head, pairs: list[tuple[torch.Tensor, int]], k: int) -> list[int]:
    """The likeliest guesses behind `pairs`, by one read of everything each."""
    few_md, guesses = guessable(model, head), list[int]()
    streams, tokens = [x for x, _ in pairs], [token for _, token in pairs]
    start = (torch.stack(streams)[None], torch.tensor([tokens]))
    out_btd, update = head.read(model, *start, head.init_pool(1, 4), Layout.dense(1, len(pairs)))
    state, vectors = update.commit(), [out_btd[0, -1]]
    for _ in range(k):
        guesses.append(int(head.ids_m[(few_md @ vectors[-1]).argmax()]))
        read = (torch.stack(vectors)[None], torch.tensor([guesses]))
        layout = Layout.dense(1, len(guesses), start_b=state.seen_b)
        vectors.append(head.read(model, *read, state, layout)[0][0, -1])
    return guesses


def test_a_vocabulary_holds_the_guesses_and_changes_no_token(models: Models, prompts: list[list[int]]) -> None:
    model, limits = models("mamba2"), Limits(max_new_tokens=12, end_tokens=[4])
    held = DraftHead(head_for(model, ids=FEW))
    expected = generate(model, prompts, limits=limits)
    assert generate(model, prompts, limits=limits, drafter=held, draft_tokens=3) == expected
    coupled = DraftHead(head_for(model, ids=FEW), coupled=True)
    sampling = SamplingConfig(temperature=1.0, seed=2)
    expected = generate(model, prompts, limits=limits, sampling=sampling)
    got = generate(model, prompts, limits=limits, sampling=sampling, drafter=coupled, draft_tokens=3)
    assert got == expected
    held.open(model, 1, 20)
    held.put([0], [[1]])
    held.observe(torch.tensor([[6]]), torch.tensor([1]), torch.randn(1, 1, 32, dtype=torch.float64))
    draft = held.propose(1, 4, Sampler([SamplingConfig(temperature=1.0)]), History.start([[0]], 0))
    assert draft.q_bkv is not None
    assert {int(t) for t in draft.tokens_bk.flatten()} <= set(FEW)
    assert set(draft.q_bkv.sum((0, 1)).nonzero().flatten().tolist()) <= set(FEW)


def test_a_head_stands_behind_copies(models: Models, prompts: list[list[int]]) -> None:
    model, limits = models("gla"), Limits(max_new_tokens=20, end_tokens=[])
    both = parse_drafter(["copyspec,gammas=2+1", "draft_head,window=4"], models)
    for sampling in (SamplingConfig(), SamplingConfig(temperature=0.5, seed=1)):
        got = generate(model, prompts, limits=limits, sampling=sampling, drafter=both, draft_tokens=3)
        assert [len(g.tokens) for g in got] == [20] * len(prompts)
        if not sampling.temperature:
            assert got == generate(model, prompts, limits=limits)
    with pytest.raises(ConfigError, match="name it last"):
        parse_drafter(["draft_head,window=4", "copyspec"], models)


@pytest.mark.parametrize("aux", [(), (1,)])
def test_a_head_comes_back_as_it_was_saved(aux: tuple[int, ...], models: Models, tmp_path: Path) -> None:
    model = models("attention")
    head = head_for(model, ids=FEW, aux=aux)
    (tmp_path / "log.jsonl").write_text("kept")
    save_head(head, tmp_path / "head")
    again = load_head(tmp_path / "head")
    assert again.config == head.config
    assert again.ids_m.tolist() == FEW
    assert all(torch.equal(x.float(), again.state_dict()[name].float()) for name, x in head.state_dict().items())
    drafter = parse_drafter([f"draft_head,path={tmp_path / 'head'}"], models)
    assert isinstance(drafter, DraftHead)
    with pytest.raises(ConfigError, match="expected a model of vocab_size 23 as it has, got 29"):
        drafter.open(Stack(ModelConfig(29, 32, 48, model.config.layers)), 1, 8)
    with pytest.raises(ConfigError, match="expected a model of d_model 32 as it has, got 64"):
        drafter.open(Stack(ModelConfig(V, 64, 48, model.config.layers)), 1, 8)
    if aux:
        with pytest.raises(ConfigError, match="expected aux_layers from 0 to 0, got 1"):
            drafter.open(Stack(ModelConfig(V, 32, 48, model.config.layers[:1])), 1, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "subquad"}, "expected a draft head"),
        ({"schema": 9}, "expected schema 1, got 9"),
        ({"wndow": 3}, "did you mean 'window'"),
        ({"d_mlp": 7}, "could not be read"),
        ({"n_heads": 5}, "even parts"),
        ({"kept": 99}, "kept in 0..23"),
        ({"aux_layers": [1, 0]}, "aux_layers that ascend"),
    ],
)
def test_a_folder_that_holds_no_head_is_refused(
    change: dict[str, Any], message: str, models: Models, tmp_path: Path
) -> None:
    save_head(head_for(models("attention")), tmp_path / "head")
    config = tmp_path / "head/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_head(tmp_path / "head")


@pytest.mark.parametrize("options", ["", ",path=x,window=3", ",window=few", ",window=3,coupled=yes"])
def test_options_that_name_no_head_are_refused(options: str, models: Models) -> None:
    with pytest.raises(ConfigError, match="expected path=FOLDER"):
        parse_drafter([f"draft_head{options}"], models)


def test_columns_are_scored_where_the_model_says_what_comes() -> None:
    """A piece of 4 columns: the third guess in a row needs two columns before it; labels stand two columns on."""
    tokens_bt = torch.zeros(1, 7, dtype=torch.int64)
    rows = scored(tokens_bt, None, 4, 3)[:, 0].int().tolist()
    assert rows == [[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0, 0]]
    wanted_bt = torch.tensor([[True, True, False, True, False, False, True]])
    assert scored(tokens_bt, wanted_bt, 4, 1)[0, 0].int().tolist() == [0, 1, 0, 0, 1, 0, 0]


def test_guesses_are_compared_over_the_whole_vocabulary(models: Models) -> None:
    model = models("attention")
    head = head_for(model, ids=FEW)
    guess_btd, target_btd = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    same_bt, stands_bt = compare(model, guessable(model, head), head.ids_m, guess_btd, target_btd)
    p_tv = model.head(target_btd)[0].softmax(-1)
    q_tv = torch.zeros(5, V, dtype=torch.float64)
    q_tv[:, FEW] = (guess_btd[0] @ model.lm_head.weight[FEW].T).softmax(-1)
    torch.testing.assert_close(stands_bt[0], torch.minimum(p_tv, q_tv).sum(-1))
    assert torch.equal(same_bt[0].bool(), p_tv.argmax(-1) == q_tv.argmax(-1))
    kl = linear_loss.kl(target_btd[0], model.lm_head.weight, target_btd[0], model.lm_head.weight, torch.ones(5))
    assert abs(float(kl)) < 1e-12


def test_only_answers_are_guessed_and_compared(models: Models) -> None:
    """A guess is scored where its label counts; those of other columns change no figure."""
    model = models("attention")
    head = head_for(model, ids=FEW)
    tokens_bt = torch.randint(V, (3, 12))
    wanted_bt = torch.rand(3, 12) < 0.5
    whole, some = (measure(model, head, Batch(tokens_bt, wanted), 2) for wanted in (None, wanted_bt))
    scored_sbt = scored(tokens_bt, wanted_bt, head.config.window, 2)
    for s, (guess_btd, target_btd, scored_bt) in enumerate(guess(model, head, tokens_bt, scored_sbt)):
        same_bt, stands_bt = compare(model, guessable(model, head), head.ids_m, guess_btd, target_btd)
        assert some.agreement[s] == pytest.approx(float(same_bt[scored_bt].mean()), rel=1e-6)
        assert some.acceptance[s] == pytest.approx(float(stands_bt[scored_bt].mean()), rel=1e-6)
    assert some.tokens == int(scored_sbt[0].sum()) < whole.tokens == 3 * 11


@pytest.mark.parametrize(("layers", "aux"), [(1, ()), (2, ()), (3, (0, 1)), (16, (4, 9)), (30, (9, 19))])
def test_a_head_sees_a_third_and_two_thirds_of_a_model(layers: int, aux: tuple[int, ...], models: Models) -> None:
    layer = models("attention").config.layers[0]
    assert usual_aux_layers(ModelConfig(V, 32, 48, (layer,) * layers)) == aux
