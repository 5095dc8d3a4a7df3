"""The first layers of a model as its drafter: sharing its weights, held to a vocabulary, trained by one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subquad import cli
from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.decode.draft_model import DraftModel
from subquad.decode.self_draft import SelfDraft, first_layers
from subquad.engine.draft import parse_drafter
from subquad.engine.generate import Limits, generate
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

Models = Callable[[str], Stack]


def test_the_first_layers_share_their_weights_and_read_like_the_model_cut_there(models: Models) -> None:
    model = models("attention")
    small = first_layers(model, 1)
    assert {x.data_ptr() for x in small.parameters()} <= {x.data_ptr() for x in model.parameters()}
    tokens_bt = torch.randint(23, (2, 9))
    x_btd = model.embed(tokens_bt)
    x_btd = model.blocks[0](x_btd, Layout.dense(2, 9))
    assert torch.equal(small(tokens_bt), model.head(model.norm(x_btd)))


@pytest.mark.parametrize("layers", [0, 2, 5])
def test_a_number_of_layers_that_is_no_part_is_refused(layers: int, models: Models) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 1, got"):
        first_layers(models("attention"), layers)


def test_a_vocabulary_holds_the_guesses_and_changes_no_token(
    models: Models, prompts: list[list[int]], tmp_path: Path
) -> None:
    model, file = models("mamba2"), tmp_path / "vocab.json"
    file.write_text(json.dumps([2, 3, 5, 7, 11, 13]))
    limits = Limits(max_new_tokens=12, end_tokens=[4])
    held = parse_drafter([f"draft_model,model=mamba2,vocab={file}"], models)
    assert isinstance(held, DraftModel)
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0, seed=2)):
        got = generate(model, prompts, limits=limits, sampling=sampling, drafter=held, draft_tokens=3)
        if sampling.temperature == 0:
            assert got == generate(model, prompts, limits=limits)
    held.open(model, 2, 20)
    held.put([0, 1], [[1, 2, 3], [4]])
    held.prepare(2, 4)
    sampler = Sampler([SamplingConfig(temperature=1.0)] * 2)
    draft = held.propose(2, 4, sampler, History.start([[0]] * 2, 0))
    assert {int(t) for t in draft.tokens_bk.flatten()} <= {2, 3, 5, 7, 11, 13}
    # The head over all tokens, the others forbidden, is the same distribution.
    whole = DraftModel(held.model)
    whole.open(model, 2, 20)
    whole.put([0, 1], [[1, 2, 3], [4]])
    others = {t: -torch.inf for t in range(23) if t not in (2, 3, 5, 7, 11, 13)}
    biased = Sampler([SamplingConfig(temperature=1.0, logit_bias=others)] * 2, vocab_size=23)
    other = whole.propose(2, 4, biased, History.start([[0]] * 2, 0))
    assert torch.equal(draft.tokens_bk, other.tokens_bk)
    assert draft.q_bkv is not None
    assert other.q_bkv is not None
    torch.testing.assert_close(draft.q_bkv, other.q_bkv, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("text", "message"), [("[1, x]", "JSON list"), ('["a"]', "JSON list"), ("[99]", "0 to 22")])
def test_a_vocabulary_that_is_none_is_refused(text: str, message: str, models: Models, tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_drafter([f"self_draft,layers=1,vocab={tmp_path / 'v.json'}"], models).open(models("attention"), 1, 8)


def test_one_command_trains_a_drafter_that_guesses_better(
    tmp_path: Path, byte_model: Callable[[Stack], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From text to a folder that --draft takes: the tokens stay, and more of the guesses stand than untrained."""
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "rotary": {"theta": 1e4, "dim": 16}}
    torch.manual_seed(0)
    teacher = Stack(ModelConfig(258, 32, 64, (layer,) * 3, max_positions=256))
    folder = byte_model(teacher)
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} bottles of water on the wall, {i} bottles of water. " * 8}) for i in range(60)]
    text.write_text("\n".join(lines))
    out = tmp_path / "drafter"
    arguments = ["draft", folder, "--out", str(out), "--layers", "1", "--data", str(text), "--tokens", "30k"]
    options = ["--seq", "64", "--batch", "8", "--lr", "0.01", "--vocab", "60", "--window", "32", "--device", "cpu"]
    assert cli.main([*arguments, *options]) == 0, capsys.readouterr().err
    ids = json.loads((out / "vocab.json").read_text())
    assert len(ids) <= 60
    drafter, loaded = load_model(str(out)).model, load_model(folder)
    model = loaded.model
    seen = loaded.tokenizer.encode("17 bottles of water on the wall, 17 bottles of water. ")
    assert [layer["mixer"] for layer in drafter.config.layers] == ["attention"]
    assert drafter.config.layers[0]["window"] == 32
    before, after = (_kl(model, small, seen) for small in (first_layers(model, 1), drafter))
    assert after < 0.7 * before
    assert torch.equal(drafter.embed.weight, model.embed.weight)
    prompt = [seen[:9]]
    expected = generate(model, prompt, limits=Limits(20))
    assert generate(model, prompt, limits=Limits(20), drafter=DraftModel(drafter), draft_tokens=3) == expected
    assert generate(model, prompt, limits=Limits(20), drafter=SelfDraft(1), draft_tokens=3) == expected


@torch.no_grad()
def _kl(model: Stack, small: Stack, tokens: list[int]) -> float:
    p, q = (m(torch.tensor([tokens])).log_softmax(-1) for m in (model, small))
    return float((p.exp() * (p - q)).sum(-1).mean())
