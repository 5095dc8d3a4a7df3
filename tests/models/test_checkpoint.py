"""Checkpoints: bit for bit there and back, replaced whole or not at all, and plain words when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from subquad.core.errors import CheckpointError, ConfigError
from subquad.models import checkpoint
from subquad.models.card import ModelCard
from subquad.models.checkpoint import from_pretrained, save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    d_mlp=24,
    layers=(ATTENTION, ATTENTION | {"window": 4, "sinks": 1}),
    tied=True,
    eos_tokens=(2, 3),
)


def model_of(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    return Stack(config)


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def untied():
    return ModelConfig(**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__} | {"tied": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", [CONFIG, untied()], ids=["tied", "untied"])
def test_round_trip_bit_for_bit(tmp_path, dtype, config):
    model = model_of(config).to(dtype)
    save_pretrained(model, tmp_path / "m")
    back = from_pretrained(tmp_path / "m")
    assert same_bits(model, back)
    assert back.config == config
    assert (back.lm_head.weight is back.embed.weight) == config.tied
    assert all(p.requires_grad for p in back.parameters())
    assert from_pretrained(tmp_path / "m", dtype=torch.float64).dtype == torch.float64


def test_mixed_dtypes_stay_as_they_are(tmp_path):
    model = model_of().to(torch.bfloat16)
    model.norm.float()
    save_pretrained(model, tmp_path / "m")
    assert same_bits(model, from_pretrained(tmp_path / "m"))


def test_shards_with_an_index(tmp_path):
    model = model_of()
    save_pretrained(model, tmp_path / "m", shard_bytes=4000)
    index = json.loads((tmp_path / "m" / checkpoint.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert files == {p.name for p in (tmp_path / "m").glob("*.safetensors")}
    assert same_bits(model, from_pretrained(tmp_path / "m"))
    save_pretrained(model, tmp_path / "m")
    assert [p.name for p in sorted((tmp_path / "m").glob("model*"))] == ["model.safetensors"]
    assert same_bits(model, from_pretrained(tmp_path / "m"))


def test_saving_replaces_the_model_and_keeps_what_others_put_there(tmp_path):
    folder = tmp_path / "m"
    save_pretrained(model_of(), folder)
    (folder / "report.html").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_bytes(b"x")
    new = model_of(seed=1)
    save_pretrained(new, folder)
    assert same_bits(new, from_pretrained(folder))
    assert (folder / "report.html").read_text() == "mine"
    assert (folder / "figures" / "a.png").read_bytes() == b"x"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_with_another_model_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="'llama', which saving would destroy"):
        save_pretrained(model_of(), tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_the_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path):
        with pytest.raises(CheckpointError, match="got the one you are in; choose another, or a new one below"):
            save_pretrained(model_of(), folder)
    save_pretrained(model_of(), "below")
    assert same_bits(model_of(), from_pretrained("below"))


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failing", ["save_file", "render", "_sync"])
def test_an_error_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing, existing):
    old, folder = model_of(), tmp_path / "m"
    if existing:
        save_pretrained(old, folder)
    real, calls = getattr(checkpoint, failing), []

    def full(*args, **kwargs):
        calls.append(args)
        if failing == "save_file" and len(calls) == 1:
            return real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*(is intact|left behind); free some space"):
        save_pretrained(model_of(seed=1), folder, shard_bytes=4000)
    assert [p.name for p in tmp_path.iterdir()] == (["m"] if existing else [])
    if existing:
        assert same_bits(old, from_pretrained(folder))


CHILD = """
import os, resource, signal, sys
import torch
from subquad.models import checkpoint
from subquad.models.checkpoint import from_pretrained, save_pretrained

folder, how = sys.argv[1], sys.argv[2]
model = from_pretrained(folder)
torch.nn.init.ones_(model.embed.weight)

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        save_pretrained(model, folder)
    except checkpoint.CheckpointError as error:
        sys.exit(f"refused: {error}")
elif how == "writing":
    checkpoint.render = die
else:
    from pathlib import Path
    rename, seen = Path.rename, []
    def renamed(self, to):
        if seen:
            die()
        seen.append(to)
        return rename(self, to)
    Path.rename = renamed
save_pretrained(model, folder)
"""


@pytest.mark.parametrize("how", ["writing", "between the renames", "full"])
def test_a_process_killed_or_out_of_space_while_saving_leaves_the_old_checkpoint(tmp_path, how):
    old, folder = model_of(), tmp_path / "m"
    save_pretrained(old, folder)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), how]
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if how == "full":
        assert "refused" in child.stderr
        assert "is intact" in child.stderr
    else:
        assert child.returncode == -signal.SIGKILL, child.stderr
    assert same_bits(old, load_model(folder).model)
    new = model_of(seed=1)
    save_pretrained(new, folder)
    assert same_bits(new, from_pretrained(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_pretrained(model_of(), tmp_path / "m", shard_bytes=4000)
    finally:
        os.umask(before)
    files = list((tmp_path / "m").iterdir())
    assert len(files) > 4
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def edited(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: w.pop("blocks.1.mlp.up_proj.weight"),
            r"missing tensor blocks\.1\.mlp\.up_proj\.weight; .*incomplete",
        ),
        (
            lambda w: w.update({"norm.weigth": w.pop("norm.weight")}),
            r"unknown tensor norm\.weigth; missing tensor norm\.weight; check",
        ),
        (lambda w: w.update({"norm.weight": torch.ones(7)}), r"norm\.weight: expected shape \(16,\), got \(7,\)"),
        (lambda w: [w.pop(k) for k in list(w) if "blocks.1" in k], r"missing tensors blocks.* and \d+ more"),
    ],
    ids=["missing", "unknown", "misshapen", "many"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    save_pretrained(model_of(), tmp_path / "m")
    edited(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=words):
        from_pretrained(tmp_path / "m")


def test_configs_that_do_not_fit_are_named(tmp_path):
    folder = tmp_path / "m"
    save_pretrained(model_of(), folder)
    good = json.loads((folder / "config.json").read_text())
    layer = good["layers"][0]
    for values, error, words in (
        (good | {"d_modle": 16}, ConfigError, r"config\.json: unknown key 'd_modle'; did you mean 'd_model'"),
        (good | {"layers": [layer | {"heads": 2}] * 2}, ConfigError, "mixer attention: unknown key 'heads'"),
        (good | {"layers": [layer | {"mixer": "atention"}] * 2}, ConfigError, "did you mean 'attention'"),
        ({k: v for k, v in good.items() if k != "d_mlp"}, ConfigError, "expected d_mlp"),
        (good | {"schema": 99}, CheckpointError, "expected schema 1, got 99"),
        (good | {"model_type": "llama"}, CheckpointError, "load it as a teacher"),
        ([1], CheckpointError, "expected an object"),
    ):
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(error, match=words):
            from_pretrained(folder)


def test_older_schemas_are_migrated(tmp_path, monkeypatch):
    folder, model = tmp_path / "m", model_of()
    save_pretrained(model, folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"schema": 0, "width": values.pop("d_model")}
    (folder / "config.json").write_text(json.dumps(values))
    monkeypatch.setitem(
        checkpoint.MIGRATIONS, 0, lambda v: {**{k: x for k, x in v.items() if k != "width"}, "d_model": v["width"]}
    )
    assert same_bits(model, from_pretrained(folder))


def test_damaged_or_absent_files_say_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a folder with config\.json"):
        from_pretrained(tmp_path / "nothing")
    folder = tmp_path / "m"
    save_pretrained(model_of(), folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: could not be read"):
        from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could not be read"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: could not be read"):
        from_pretrained(folder)


def test_card_tokenizer_and_licence_travel_along(tmp_path, capfd):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="<e>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<e>", chat_template="{{ messages[0]['content'] }}"
    )
    card = ModelCard(
        name="Half",
        teacher="org/teacher",
        license="apache-2.0",
        data="books | essays",
        recipe={"steps": 100},
        evaluation={"perplexity, 1024 tokens": 21.123456789},
    )
    save_pretrained(model_of(), tmp_path / "m", tokenizer, card)
    capfd.readouterr()
    loaded = load_model(tmp_path / "m")
    assert capfd.readouterr() == ("", "")
    assert loaded.license == "apache-2.0"
    assert loaded.tokenizer("b a").input_ids == [1, 0]
    assert loaded.tokenizer.chat_template == tokenizer.chat_template
    text = (tmp_path / "m" / "README.md").read_text()
    for words in (
        'base_model: "org/teacher"',
        "| 0 | attention",
        "| 1 | attention",
        "window 4",
        "| steps | 100 |",
        "21.1235",
    ):
        assert words in text
