"""Preferences: what is refused before anything is loaded, and, where trl is installed, that the chosen answer gains."""

import importlib.util
import json
import math

import pytest
import torch

from subquad.cli import main
from subquad.core.errors import ConfigError, DataError, DivergenceError
from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.dpo import Preference, last_step, read_pairs

ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
MAMBA = {"mixer": "mamba2", "n_heads": 2, "key_dim": 8, "value_dim": 8}
WITH_TRL = importlib.util.find_spec("trl") is not None
PAIR = {"prompt": "Say a letter: ", "chosen": "b b b b", "rejected": "a a a a"}


@pytest.fixture
def hybrid(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<end>": 0} | {c: i + 1 for i, c in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    model = Stack(ModelConfig(300, 16, 24, (ATTENTION, MAMBA), max_positions=256, eos_tokens=(0,)))
    save_pretrained(model, tmp_path / "m", PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"))
    return tmp_path / "m"


def written(tmp_path, *records):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_pairs(tmp_path):
    assert read_pairs(written(tmp_path, PAIR | {"score": 3}, PAIR)) == [PAIR, PAIR]
    with pytest.raises(DataError, match="no.jsonl: expected a file of preferences, got none"):
        read_pairs(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="pairs.jsonl: expected preferences, got an empty file"):
        read_pairs(written(tmp_path))
    with pytest.raises(DataError, match=r"pairs.jsonl:2: expected the fields prompt, chosen, rejected, got prompt"):
        read_pairs(written(tmp_path, PAIR, {"prompt": "x"}))
    (tmp_path / "pairs.jsonl").write_text("{")
    with pytest.raises(DataError, match="pairs.jsonl:1: expected one JSON object a line"):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(ConfigError, match=r"dpo: expected beta, lr, epochs > 0"):
        Preference(beta=0)


def test_a_step_that_is_not_finite_ends_it():
    log = [{"loss": 0.7, "grad_norm": 2.0}, {"loss": 0.5, "grad_norm": 1.0, "note": "x"}, {"train_runtime": 3.0}]
    assert last_step(log) == {"loss": 0.5, "grad_norm": 1.0}
    for name, value in (("loss", math.nan), ("grad_norm", math.inf)):
        with pytest.raises(
            DivergenceError, match=f"dpo: expected a finite {name}, got {value} in step 1 of 2; nothing"
        ):
            last_step([log[0] | {name: value}, *log[1:]])


def test_without_trl_it_says_what_to_install(tmp_path, hybrid, monkeypatch, capfd):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest))
    pairs = written(tmp_path, PAIR)
    assert main(["prefer", str(hybrid), "--pairs", str(pairs), "--out", str(tmp_path / "out")]) == 2
    assert "error: dpo needs trl, which is not installed; pip install subquad[dpo]" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not WITH_TRL, reason="trl is not installed")
def test_the_chosen_answer_gains(tmp_path, hybrid, capfd):
    pairs, out = written(tmp_path, *[PAIR] * 16), tmp_path / "out"
    command = ["prefer", str(hybrid), "--pairs", str(pairs), "--out", str(out), "--lr", "1e-2", "--device", "cpu"]
    assert main([*command, "--beta", "0.1", "--batch", "2"]) == 0
    assert "saved in" in capfd.readouterr().out
    before, after = (load_model(folder) for folder in (hybrid, out))

    def margin(loaded):
        scores = []
        for answer in ("chosen", "rejected"):
            text = loaded.tokenizer(PAIR["prompt"] + PAIR[answer], add_special_tokens=False)["input_ids"]
            start = len(loaded.tokenizer(PAIR["prompt"], add_special_tokens=False)["input_ids"])
            logp = loaded.model(torch.tensor([text])).log_softmax(-1)[0, :-1]
            scores.append(sum(float(logp[t - 1, text[t]]) for t in range(start, len(text))))
        return scores[0] - scores[1]

    with torch.no_grad():
        assert margin(after) > margin(before) + 1
