"""`subquad inspect` on a small saved model: what it writes is what the library finds, and what `convert` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.cli.inspect import run
from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import place_heads
from subquad.core.errors import ConfigError
from subquad.evals.perplexity import perplexity
from subquad.evals.speed import attention_kept
from subquad.evals.text import load_text
from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    layer = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
    stack = Stack(ModelConfig(vocab_size=256, d_model=16, d_mlp=32, layers=(layer,) * LAYERS, tied=True)).double()
    with torch.no_grad():
        stack.embed.weight.mul_(30)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(stack, folder, PreTrainedTokenizerFast(tokenizer_object=core))
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"Line {i} says {i * i % 97}. " for i in range(200)))
    return str(file)


def inspect(what: str, model: str, text: str, **options: Any) -> None:
    settings = {"text": text, "window": 8, "sinks": 2, "context": 64, "tokens": 256, "needles": 2}
    run(what, model, needle_length=[500, 600], device="cpu", **settings | options)


def test_heads_are_chosen_nested_and_convert_reads_them(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "heads.json", tmp_path / "heads.html"
    inspect("heads", model, text, keep=[0.25, 0.5], search="greedy", picks=2, distractors=1, as_json=file, report=page)
    found = json.loads(file.read_text())
    assert list(found["kept"]) == ["0.5", "0.25"]
    assert found["heads"] == {str(i): 2 for i in range(LAYERS)}
    assert [row["kept"] for row in found["rounds"]] == [2, 4]
    assert found["alone"] == []
    few, many = ({(i, h) for i, heads in found["kept"][k].items() for h in heads} for k in ("0.25", "0.5"))
    assert few < many
    assert (len(few), len(many)) == (2, 4)
    assert {(str(u["layer"]), u["heads"][0]) for u in found["rounds"][0]["changed"]} == few
    assert set(found["joint"]["0.5"]) == {"chosen", "evenly spread", "evenly spread layers"}
    # The loss in the file is that of the model converted with it.
    loaded = load_model(model)
    kept = {int(i): heads for i, heads in found["kept"]["0.25"].items()}
    student = transplant(loaded.model, place_heads([2] * LAYERS, kept, "attention", {"window": 8, "sinks": 2}))
    assert attention_kept(student, loaded.model) == 0.25
    sample = load_text(text, loaded.tokenizer, 256)
    loss = [float(perplexity(m.eval(), sample, 64).nll_wt.mean()) for m in (student, loaded.model)]
    assert found["joint"]["0.25"]["chosen"]["loss"]["value"] == pytest.approx(loss[0] - loss[1], rel=1e-6)
    assert found["joint"]["0.25"]["chosen"]["cost"] < found["joint"]["0.25"]["evenly spread"]["cost"]
    assert f"--heads {file} --keep 0.25" in found["command"]
    out = capsys.readouterr().out
    assert "heads kept of 8" in out
    assert "evenly spread layers" in page.read_text()


def test_layers_are_ranked_and_listed_for_convert(
    model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "layers.json", tmp_path / "layers.html"
    inspect("layers", model, text, choose=3, refine=1, as_json=file, report=page)
    found = json.loads(file.read_text())
    assert [row["layer"] for row in found["alone"]] == list(range(LAYERS))
    (stays,) = found["kept"]["0.25"]
    layers = ",".join(str(i) for i in range(LAYERS) if i != int(stays))
    assert f"--layers {layers} " in found["command"]
    assert found["kept"]["0.25"][stays] == [0, 1]
    assert f"keep 0.25: {stays}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "options", "says"),
    [
        ("head", {}, "heads"),
        ("heads", {"choose": 2}, "--keep SHARE"),
        ("layers", {"choose": 2, "keep": [0.5]}, "--keep SHARE"),
        ("layers", {"choose": 5}, "at most 4"),
        ("heads", {"keep": [1.0], "needles": 0}, "keep=1.0"),
        ("heads", {"search": "beem", "needles": 0}, "beam"),
    ],
)
def test_bad_options_are_refused(model: str, text: str, what: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        inspect(what, model, text, **options)
