"""A block of guesses in one read: its training form is what it does, and each guess knows the prefix alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.data import Batch
from subquad.decode.draft_head import DraftHead
from subquad.decode.gad import Gad
from subquad.engine.draft import parse_drafter
from subquad.engine.generate import Limits, generate
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.draft_head import BlockHead, load_head, save_head, untrained
from subquad.models.head_config import HeadConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.draft_head import guessable, measure

from .conftest import V

Models = Callable[[str], Stack]
FEW = [2, 3, 5, 7, 11, 13]


def head_for(model: Stack, window: int = 6, ids: list[int] | None = None, guesses: int = 4) -> BlockHead:
    config = HeadConfig.like(model.config, window, kept=len(ids or []), target="it", guesses=guesses)
    head = untrained(config, ids or []).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double())
    assert isinstance(head, BlockHead)
    return head.requires_grad_(False)


@pytest.mark.parametrize("slug", ["attention", "mamba2"])
@pytest.mark.parametrize("window", [6, 5, 16])
def test_the_training_form_is_what_guessing_does(slug: str, window: int, models: Models) -> None:
    """Behind anchors of all pieces, some of which are cut short: true pairs committed, then all masks in one read."""
    model = models(slug)
    steps, t = 4, 11
    head = head_for(model, window)
    stream_btd, tokens_bt = torch.randn(2, t, 32, dtype=torch.float64), torch.randint(V, (2, t))
    unrolled = head.unroll(model, stream_btd, tokens_bt, steps)
    assert unrolled[0].shape == (2, t, 32)
    seen = set[tuple[int, int]]()
    for s in range(steps):
        columns = range(t)[head.columns(s, t)]
        assert unrolled[s].shape[1] == len(columns)
        for i, column in enumerate(columns):
            start = column // window * window
            if column - s < start:
                continue
            true = slice(start, column - s + 1)
            n = column - s + 1 - start
            pairs = (stream_btd[:, true], tokens_bt[:, true])
            out_btd, update = head.read(model, *pairs, head.init_pool(2, 4), Layout.dense(2, n))
            ahead_bkd = head.ahead(model, out_btd[:, -1], s + 1, update.commit())
            torch.testing.assert_close(unrolled[s][:, i], ahead_bkd[:, s], rtol=1e-10, atol=1e-12)
            seen.add((s, column))
    assert len(seen) > t + 3


def test_a_guess_is_the_same_however_many_are_asked_for(models: Models) -> None:
    model = models("attention")
    head = head_for(model)
    pairs = (torch.randn(2, 5, 32, dtype=torch.float64), torch.randint(V, (2, 5)))
    out_btd, update = head.read(model, *pairs, head.init_pool(2, 4), Layout.dense(2, 5))
    state = update.commit()
    four, two, one = (head.ahead(model, out_btd[:, -1], k, state) for k in (4, 2, 1))
    torch.testing.assert_close(two, four[:, :2])
    torch.testing.assert_close(one, four[:, :1])
    assert (four[:, 1:] - four[:, :-1]).abs().amin(dim=(0, 2)).gt(0).all()


def test_guesses_are_drawn_from_what_the_prefix_alone_says(models: Models) -> None:
    """Rows of one prefix and other seeds guess otherwise, from the same distributions; beyond the block nothing."""
    model = models("attention")
    head, rows, guesses = head_for(model, ids=FEW), 64, 4
    drafter = Gad(head)
    drafter.open(model, rows, 40)
    drafter.put(range(rows), [[1]] * rows)
    sampler = Sampler([SamplingConfig(temperature=1.0, seed=i) for i in range(rows)])
    history = History.start([[0]] * rows, 0)
    assert drafter.propose(rows, 3, sampler, history).length_b.tolist() == [0] * rows
    pairs = (torch.randn(1, 5, 32, dtype=torch.float64), torch.randint(V, (1, 5)))
    drafter.observe(pairs[1].expand(rows, -1), torch.full((rows,), 5), pairs[0].expand(rows, -1, -1))
    drafter.propose(rows, 3, sampler, history)  # changes nothing
    draft = drafter.propose(rows, 6, sampler, history)
    assert draft.tokens_bk.shape == (rows, 6) and draft.length_b.tolist() == [guesses] * rows
    out_btd, update = head.read(model, *pairs, head.init_pool(1, 4), Layout.dense(1, 5))
    ahead_kd = head.ahead(model, out_btd[:, -1], guesses, update.commit())[0]
    q_kv = torch.zeros(guesses, V, dtype=torch.float64)
    q_kv[:, FEW] = (ahead_kd @ guessable(model, head).T).softmax(-1)
    assert draft.q_bkv is not None and draft.q_bkv.shape == (rows, 6, V)
    torch.testing.assert_close(draft.q_bkv[:, :guesses], q_kv.expand(rows, -1, -1))
    assert all(len(set(draft.tokens_bk[:, i].tolist())) > 1 for i in range(guesses))
    greedy = drafter.propose(rows, 4, Sampler([SamplingConfig()] * rows), history)
    assert greedy.q_bkv is None and greedy.tokens_bk.tolist() == [q_kv.argmax(-1).tolist()] * rows


def test_what_is_coupled_gives_the_tokens_of_plain_decoding(models: Models, prompts: list[list[int]]) -> None:
    model, limits = models("mamba2"), Limits(max_new_tokens=12, end_tokens=[4])
    sampling = SamplingConfig(temperature=1.0, seed=2)
    coupled = Gad(head_for(model, ids=FEW), coupled=True)
    expected = generate(model, prompts, limits=limits, sampling=sampling)
    got = generate(model, prompts, limits=limits, sampling=sampling, drafter=coupled, draft_tokens=5)
    assert got == expected


def test_a_block_head_stands_behind_copies(models: Models, prompts: list[list[int]]) -> None:
    model, limits = models("gla"), Limits(max_new_tokens=20, end_tokens=[])
    both = parse_drafter(["copyspec,gammas=2+1", "gad,window=4,guesses=2"], models)
    assert generate(model, prompts, limits=limits, drafter=both, draft_tokens=4) == generate(
        model, prompts, limits=limits
    )
    got = generate(model, prompts, limits=limits, sampling=SamplingConfig(0.5), drafter=both, draft_tokens=4)
    assert [len(g.tokens) for g in got] == [20] * len(prompts)


def test_a_block_head_comes_back_as_it_was_saved(models: Models, tmp_path: Path) -> None:
    model = models("attention")
    head = head_for(model, ids=FEW)
    save_head(head, tmp_path / "head")
    again = load_head(tmp_path / "head")
    assert isinstance(again, BlockHead) and again.config == head.config
    assert again.masks_kd.shape == (3, 32)
    assert all(torch.equal(x.float(), again.state_dict()[name].float()) for name, x in head.state_dict().items())
    assert isinstance(parse_drafter([f"gad,path={tmp_path / 'head'}"], models), Gad)
    with pytest.raises(ConfigError, match="expected a head that guesses one token in a read, got 4.*gad"):
        parse_drafter([f"draft_head,path={tmp_path / 'head'}"], models)
    save_head(untrained(HeadConfig.like(model.config, 4)), tmp_path / "single")
    with pytest.raises(ConfigError, match="expected a head that guesses several tokens in a read, got 1.*draft_head"):
        parse_drafter([f"gad,path={tmp_path / 'single'}"], models)
    assert isinstance(parse_drafter([f"draft_head,path={tmp_path / 'single'}"], models), DraftHead)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "expected path=FOLDER"),
        (",path=x,window=3", "expected path=FOLDER"),
        (",window=3,guesses=1", "at least 2 guesses"),
        (",window=3,guesses=many", "guesses=K of an untrained head"),
        (",window=3,coupled=yes", "coupled=true or false"),
        (",window=3,gueses=3", "did you mean 'guesses'"),
    ],
)
def test_options_that_name_no_block_head_are_refused(options: str, message: str, models: Models) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_drafter([f"gad{options}"], models)


def test_a_block_head_has_as_many_steps_as_guesses(models: Models) -> None:
    model = models("attention")
    with pytest.raises(ConfigError, match="expected 1 to 4 steps, got 5"):
        head_for(model).unroll(model, torch.randn(1, 5, 32).double(), torch.zeros(1, 5, dtype=torch.int64), 5)
    config = HeadConfig.like(model.config, 4)
    with pytest.raises(ConfigError, match="expected at least 2 guesses, got 1"):
        BlockHead(config)


def test_one_command_trains_a_block_head(
    tmp_path: Path, byte_model: Callable[[Stack], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From text to a folder that --draft takes: the loss falls, every guess gets better, and the tokens stay."""
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "rotary": {"theta": 1e4, "dim": 16}}
    torch.manual_seed(0)
    model = Stack(ModelConfig(258, 32, 64, (layer,) * 3, max_positions=256))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    folder, text, out = byte_model(model), tmp_path / "text.jsonl", tmp_path / "head"
    lines = [json.dumps({"text": f"{i} bottles of water on the wall, {i} bottles of water. " * 8}) for i in range(60)]
    text.write_text("\n".join(lines))
    arguments = ["draft", folder, "--head", "--guesses", "4", "--data", str(text), "--tokens", "20k", "--seq", "64"]
    arguments += ["--batch", "8", "--lr", "0.01", "--window", "32", "--eval-tokens", "600", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "tokens a round of 4" in said and f"--draft gad,path={out}" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    head, loaded = load_head(out), load_model(folder)
    assert head.config.aux_layers == (0, 1)
    ids_n = torch.tensor(loaded.tokenizer.encode("97 bottles of water on the wall, 97 bottles of water. " * 3))
    before, after = (
        measure(loaded.model, one, Batch(ids_n[None]), 4) for one in (untrained(head.config).begin_(loaded.model), head)
    )
    assert all(new > old + 0.02 for old, new in zip(before.acceptance, after.acceptance, strict=True))
    prompt, limits = [ids_n[:9].tolist()], Limits(20)
    drafter = parse_drafter([f"gad,path={out}"], lambda name: loaded.model)
    expected = generate(loaded.model, prompt, limits=limits)
    assert generate(loaded.model, prompt, limits=limits, drafter=drafter, draft_tokens=4) == expected


def test_only_a_head_guesses_several_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["draft", "x", "--out", "y", "--data", "pydoc", "--layers", "2", "--guesses", "4"]) == 2
    assert "--guesses: expected --head" in capsys.readouterr().err
