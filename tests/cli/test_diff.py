"""`subquad diff` and `subquad apply`: a student as a small file, and back from it on the same teacher only."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad import cli
from subquad.core.registry import load
from subquad.models.card import ModelCard
from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "rotary": {"theta": 1e4, "dim": 16}}
CONFIG = ModelConfig(vocab_size=258, d_model=32, d_mlp=600, layers=(LAYER, LAYER), max_positions=64, eos_tokens=(257,))


def tokenizer():
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, a student of it with everything trained, a text, all in one folder."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("models")
    teacher = Stack(CONFIG)
    save_pretrained(teacher, where / "teacher", tokenizer())
    student = copy.deepcopy(teacher)
    mixer = load("mixers", "windowed_linear").from_attention(teacher.blocks[1].mixer.weights(), window=4, features=6)
    student.blocks[1].mixer = mixer
    layer = {"mixer": "windowed_linear"} | {k: v for k, v in dataclasses.asdict(mixer.config).items() if k != "d_model"}
    student.config = dataclasses.replace(CONFIG, layers=(LAYER, layer))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * (p.std() + 0.01) * torch.randn_like(p))
    card = ModelCard(name="Half of it", license="mit", recipe={"seed": 3})
    save_pretrained(student, where / "student", tokenizer(), card)
    (where / "student" / "run.json").write_text(json.dumps({"settings": {"keep": 0.5}, "finished": True}))
    (where / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 12)
    return where


def run(capsys, *args, code=0):
    capsys.readouterr()
    assert cli.main([str(a) for a in args]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def kl(student, other, text):
    """``KL(student || other)`` per token, by the definition."""
    tokens_bt = torch.tensor([student.tokenizer(text).input_ids[:512]])
    with torch.no_grad():
        p, q = (one.model.double()(tokens_bt)[0, :-1].log_softmax(-1) for one in (student, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_there_and_back(folders, tmp_path, capsys):
    path, out = tmp_path / "half.safetensors", tmp_path / "back"
    text = folders / "text.txt"
    arguments = ["--out", path, "--check", "--text", text, "--device", "cpu"]
    printed = run(capsys, "diff", folders / "student", folders / "teacher", *arguments)
    mixer = load_model(folders / "student").model.blocks[1].mixer
    assert re.search(rf"new windowed_linear +{len(mixer.state_dict())} +0 +0\.0", printed)
    assert f"half.safetensors: {path.stat().st_size / 2**20:.1f} MiB" in printed
    student, back = load_model(folders / "student"), load_model(path)
    assert back.license == "mit"
    told = float(re.search(r"= (\S+) nats a token, 511 tokens", printed)[1])
    assert 0 <= told < 1e-5
    run(capsys, "apply", folders / "teacher", path, "--out", out)
    whole = load_model(out)
    ours, theirs = whole.model.state_dict(), back.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (out / "README.md").read_text() == (folders / "student" / "README.md").read_text()
    assert whole.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    answers = [
        run(capsys, "generate", model, "It was", "--max-new-tokens", "8", "--device", "cpu") for model in (path, out)
    ]
    assert answers[0] == answers[1]


def test_a_low_rank_costs_what_the_check_says(folders, tmp_path, capsys):
    sizes, told = [], []
    for rank in ("0", "2"):
        path = tmp_path / f"{rank}.safetensors"
        arguments = ["--out", path, "--rank", rank, "--check", "--text", folders / "text.txt", "--device", "cpu"]
        printed = run(capsys, "diff", folders / "student", folders / "teacher", *arguments)
        sizes.append(path.stat().st_size)
        told.append(float(re.search(r"= (\S+) nats a token", printed)[1]))
    assert sizes[1] < sizes[0] / 2
    student, cut = load_model(folders / "student"), load_model(path)
    assert told[1] > 100 * told[0]
    assert told[1] == pytest.approx(kl(student, cut, (folders / "text.txt").read_text()), rel=0.01)


def test_recipe_and_licence_are_in_the_head(folders, tmp_path, capsys):
    from subquad.models.difference import read_manifest

    path = tmp_path / "half.safetensors"
    run(capsys, "diff", folders / "student", folders / "teacher", "--out", path, "--dtype", "float32")
    manifest = read_manifest(path)
    assert (manifest.recipe, manifest.license, manifest.dtype) == ({"keep": 0.5}, "mit", "float32")
    assert "# Half of it" in manifest.card
    assert max(entry.error for entry in manifest.entries.values()) == 0


def test_what_is_wrong_is_one_line(folders, tmp_path, capsys):
    path = tmp_path / "half.safetensors"
    student, teacher = folders / "student", folders / "teacher"
    run(capsys, "diff", student, teacher, "--out", path)
    for args, message in (
        (["diff", student, teacher, "--out", tmp_path / "half"], "expected a name in .safetensors"),
        (["diff", student, teacher, "--out", path, "--dtype", "bfloat"], "unknown 'bfloat'; did you mean 'bfloat16'"),
        (["apply", student, path, "--out", tmp_path / "x"], "expected the teacher teacher .* got student"),
        (["apply", teacher, tmp_path / "no.safetensors", "--out", tmp_path / "x"], "got nothing there"),
        (["apply", teacher, path, "--out", "."], "expected a folder of its own"),
    ):
        error = run(capsys, *args, code=2)
        assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
