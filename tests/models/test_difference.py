"""Differences: what did not change takes no room, what did comes back, and only on the teacher it was taken from."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.registry import load, methods
from subquad.models import difference
from subquad.models.checkpoint import config_json, save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.counterpart import Base
from subquad.models.difference import apply_difference, digest, read_manifest, write_difference
from subquad.models.load import check_pair, load_model
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel

ATTENTION = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
CONFIG = ModelConfig(vocab_size=64, d_model=32, d_mlp=48, layers=(ATTENTION,) * 3, tied=True, eos_tokens=(2,))
OPTIONS = {
    "windowed_linear": {"features": 6, "window": 7, "sinks": 2},
    "parallel": {
        "parts": [
            {"mixer": "windowed_linear", "kv_heads": [1], "features": 6, "window": 7},
            {"mixer": "attention", "kv_heads": [0]},
        ]
    },
}
MIXERS = [slug for slug, card in methods("mixers").items() if card.from_attention]


@pytest.fixture(autouse=True)
def nothing_is_few(monkeypatch):
    """Models here are so small that all of their tensors would be stored whole."""
    monkeypatch.setattr(difference, "FEW", 4)


def words(names="a b c <e>", cut=False):
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names.split())}, unk_token="<e>"))
    if cut:
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")


def named(model, name="teacher", tokenizer=None):
    return LoadedModel(model, tokenizer, name, name, "apache-2.0")


def teacher_of(config=CONFIG, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = Stack(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def converted(teacher, placement):
    """The data-free start of a student: these mixers, by layer, in place of the teacher's attention."""
    student, layers = copy.deepcopy(teacher), list(teacher.config.layers)
    for i, slug in placement.items():
        source = teacher.blocks[i].mixer.weights()
        mixer = load("mixers", slug).from_attention(source, None, **OPTIONS.get(slug, {}))
        student.blocks[i].mixer = mixer
        layers[i] = {"mixer": slug} | {k: v for k, v in dataclasses.asdict(mixer.config).items() if k != "d_model"}
    student.config = dataclasses.replace(teacher.config, layers=tuple(layers))
    return student


def trained(student, parts=("mixer", "norm"), by=0.01):
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if any(part in name for part in parts):
                p.add_(by * torch.randn_like(p))
    return student


def bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def off(rebuilt, student, start=None):
    """The largest ``|rebuilt - student| / |student - start|`` of a tensor; from zero where there is no start."""
    ours, theirs = rebuilt.state_dict(), student.state_dict()
    base = {k: torch.zeros_like(v) for k, v in theirs.items()} if start is None else start.state_dict()
    return max(float((ours[k] - theirs[k]).norm() / (theirs[k] - base[k]).norm().clamp(min=1e-30)) for k in theirs)


# -- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", MIXERS)
def test_a_start_without_training_stores_nothing_that_came_from_the_teacher(tmp_path, slug):
    teacher = teacher_of()
    student = converted(teacher, {1: slug})
    manifest = write_difference(named(student, "student"), named(teacher), tmp_path / "d.safetensors")
    stored = {name for name, entry in manifest.entries.items() if entry.nbytes}
    projections = {n for n in manifest.entries if n.endswith(("proj.weight", "proj.bias")) and "blocks.1.mixer" in n}
    own = {n for n in projections if any(part in n for part in ("z_proj", "dt_proj", "beta_proj"))}
    assert len(projections - own) >= 4
    assert not stored & (projections - own)
    assert all(n.startswith("blocks.1.mixer.") for n in stored)
    # Whatever was stored in bfloat16 was rounded once; all else is the student's, bit for bit.
    back = apply_difference(tmp_path / "d.safetensors", named(teacher)).model
    assert off(back, student) < 2**-8
    assert json.dumps(config_json(back.config)) == json.dumps(config_json(student.config))


def test_heads_are_found_wherever_they_went(tmp_path):
    teacher = teacher_of()
    student = trained(converted(teacher, {0: "mamba2", 1: "parallel", 2: "windowed_linear"}))
    entries = write_difference(named(student), named(teacher), tmp_path / "d.safetensors").entries
    names = {k: "blocks.1.mixer." + v for k, v in {"q": "qkv.q_proj.weight", "o": "o_proj.weight"}.items()}
    assert entries["blocks.1.mixer.parts.0.qkv.q_proj.weight"].base == Base(names["q"], 1.0, 0, 8, (2, 3))
    assert entries["blocks.1.mixer.parts.1.qkv.q_proj.weight"].base == Base(names["q"], 1.0, 0, 8, (0, 1))
    assert entries["blocks.1.mixer.parts.0.o_proj.weight"].base == Base(names["o"], 1.0, 1, 8, (2, 3))
    assert entries["blocks.0.mixer.qkv.q_proj.weight"].base == Base("blocks.0.mixer.qkv.q_proj.weight", 8**-0.5)
    assert entries["blocks.0.mixer.out_proj.weight"].base == Base("blocks.0.mixer.o_proj.weight")
    assert entries["blocks.2.mixer.qkv.v_proj.weight"].base == Base("blocks.2.mixer.qkv.v_proj.weight")
    assert entries["blocks.2.mixer.k_map_weight"].base is None
    weights = {"w": torch.arange(12.0).reshape(6, 2)}
    assert Base("w", 2.0, 0, 2, (2, 0, 2)).of(weights).tolist() == (2 * weights["w"][[4, 5, 0, 1, 4, 5]]).tolist()


@pytest.mark.parametrize("slug", MIXERS)
def test_training_comes_back_to_the_precision_of_what_is_stored(tmp_path, slug):
    """Of a difference, the change itself is kept to 8 bits, which is far more than 8 bits of the value."""
    teacher = teacher_of(dtype=torch.float64)
    start = converted(teacher, {0: slug, 2: slug})
    student = trained(copy.deepcopy(start), parts=("",))
    worst = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        path = tmp_path / f"{dtype}.safetensors"
        manifest = write_difference(named(student), named(teacher), path, dtype=dtype)
        back = apply_difference(path, named(teacher)).model
        worst[dtype] = off(back, student)
        assert worst[dtype] == pytest.approx(max(entry.error for entry in manifest.entries.values()), rel=1e-6)
        for name, entry in manifest.entries.items():
            if entry.base is not None:
                gone = (back.state_dict()[name] - student.state_dict()[name]).norm()
                change = (student.state_dict()[name] - entry.base.of(teacher.state_dict())).norm()
                assert entry.lost == pytest.approx(float(gone / change), rel=1e-6)
                assert entry.lost < 2**-8
    assert worst[torch.bfloat16] < 2**-8
    assert worst[torch.float32] < 2**-24
    assert worst[torch.float64] == 0


def test_of_value_and_difference_the_more_exact_is_stored(tmp_path):
    teacher = teacher_of()
    student = converted(teacher, {1: "windowed_linear"})
    weight = student.blocks[1].mixer.qkv.q_proj.weight
    far = student.blocks[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(0.01 * torch.randn_like(weight))
        far.copy_(far + 100)  # as far from the teacher's as from zero, and exact as a value
        far.copy_(far.bfloat16())
    entries = write_difference(named(student), named(teacher), tmp_path / "d.safetensors").entries
    assert entries["blocks.1.mixer.qkv.q_proj.weight"].form == "difference"
    assert entries["blocks.1.mixer.qkv.q_proj.weight"].error < 2**-9 * 0.1
    assert (entries["blocks.0.mlp.up_proj.weight"].form, entries["blocks.0.mlp.up_proj.weight"].error) == ("value", 0)
    assert entries["blocks.0.mlp.down_proj.weight"].form == "same"


def test_small_tensors_are_stored_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(difference, "FEW", 128)
    teacher = teacher_of()
    student = trained(converted(teacher, {1: "mamba2"}), parts=("",))
    path = tmp_path / "d.safetensors"
    entries = write_difference(named(student), named(teacher), path).entries
    back = apply_difference(path, named(teacher)).model.state_dict()
    for name, value in student.state_dict().items():
        if value.numel() <= 128:
            assert torch.equal(back[name], value)
            assert entries[name].nbytes == 4 * value.numel()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once_and_unchanged_tensors_never(tmp_path, tied):
    teacher = teacher_of(dataclasses.replace(CONFIG, tied=tied))
    student = trained(converted(teacher, {1: "windowed_linear"}), parts=("embed",))
    path = tmp_path / "d.safetensors"
    manifest = write_difference(named(student), named(teacher), path)
    with safe_open(str(path), "pt") as file:
        stored = set(file.keys())
    assert {name for name in stored if "blocks.1.mixer" not in name} == {"embed.weight"}
    back = apply_difference(path, named(teacher)).model
    assert (back.lm_head.weight is back.embed.weight) == tied
    assert torch.equal(back.lm_head.weight, teacher.lm_head.weight) != tied
    assert manifest.nbytes == sum(x.numel() * x.itemsize for x in load_file(path).values())
    assert manifest.student_nbytes == sum(p.numel() * p.itemsize for p in student.parameters())


def test_a_student_of_another_dtype_comes_back_in_it(tmp_path):
    teacher = teacher_of()
    student = trained(converted(teacher, {1: "mamba2"})).to(torch.bfloat16)
    path = tmp_path / "d.safetensors"
    manifest = write_difference(named(student), named(teacher), path)
    assert bits(apply_difference(path, named(teacher)).model, student)  # bfloat16 holds bfloat16
    assert manifest.entries["blocks.0.mlp.up_proj.weight"].form == "same"
    assert student.blocks[1].mixer.state_dict().keys() and "float32" in {e.dtype for e in manifest.entries.values()}


# -- low rank ---------------------------------------------------------------------------------------------------------


def test_factors_give_back_a_change_of_low_rank_and_the_nearest_of_a_full_one(tmp_path):
    teacher = teacher_of(dtype=torch.float64)
    student = converted(teacher, {1: "windowed_linear"})
    up, down = student.blocks[0].mlp.up_proj.weight, student.blocks[2].mlp.down_proj.weight
    with torch.no_grad():
        up.add_(0.01 * torch.randn(48, 2).double() @ torch.randn(2, 32).double())
        down.add_(0.01 * torch.randn(32, 48).double())
        student.blocks[1].mixer.qkv.q_proj.weight.add_(0.01 * torch.randn(32, 32))
    path = tmp_path / "d.safetensors"
    options = {"dtype": torch.float64, "rank": 3}
    entries = write_difference(named(student), named(teacher), path, **options).entries
    assert entries["blocks.0.mlp.up_proj.weight"].form == "factors"
    assert entries["blocks.0.mlp.up_proj.weight"].nbytes == 3 * (48 + 32) * 8
    assert entries["blocks.0.mlp.up_proj.weight"].lost < 1e-12
    # A new mixer is never cut.
    assert entries["blocks.1.mixer.qkv.q_proj.weight"].error == 0
    size_r = torch.linalg.svdvals((down - teacher.blocks[2].mlp.down_proj.weight).detach())
    best = float(size_r[3:].norm() / size_r.norm())
    got = entries["blocks.2.mlp.down_proj.weight"].lost
    assert best <= got * (1 + 1e-9) < best * 1.01
    assert got > 0.5  # noise has no low rank, and the figure says so
    back = apply_difference(path, named(teacher)).model
    assert off(back, student, converted(teacher, {1: "windowed_linear"})) == pytest.approx(got, rel=1e-6)
    first = path.read_bytes()
    write_difference(named(student), named(teacher), path, **options)
    assert path.read_bytes() == first


def test_factors_only_where_they_are_smaller(tmp_path):
    teacher = teacher_of()
    student = trained(copy.deepcopy(teacher), parts=("mlp", "embed", "norm"))
    entries = write_difference(named(student), named(teacher), tmp_path / "d.safetensors", rank=20).entries
    assert {e.form for name, e in entries.items() if "mlp" in name} == {"difference"}  # 20 (48 + 32) > 48 * 32
    entries = write_difference(named(student), named(teacher), tmp_path / "d.safetensors", rank=19).entries
    assert {e.form for name, e in entries.items() if "mlp" in name} == {"factors"}
    assert {e.form for name, e in entries.items() if "norm" in name} <= {"difference", "value"}
    with pytest.raises(ConfigError, match="rank=-1: expected 0 or more"):
        write_difference(named(student), named(teacher), tmp_path / "d.safetensors", rank=-1)


# -- what doesn't fit -------------------------------------------------------------------------------------------------


def test_another_teacher_is_refused(tmp_path):
    teacher = teacher_of()
    path = tmp_path / "d.safetensors"
    write_difference(named(converted(teacher, {1: "mamba2"})), named(teacher), path)
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.blocks[2].mlp.up_proj.weight.mul_(1.001)
    message = rf"expected the teacher teacher \(teacher, digest {digest(teacher)[:12]}\), got cousin \(digest "
    with pytest.raises(CheckpointError, match=message):
        apply_difference(path, named(other, "cousin"))
    for name in ("embed.weight", "blocks.0.mlp.up_proj.weight"):  # one number anywhere, in matrices of any width
        other = copy.deepcopy(teacher)
        with torch.no_grad():
            other.get_parameter(name)[1, 3] *= 1.01
        assert digest(other) != digest(teacher), name
    assert digest(teacher.to(torch.float64)) == digest(teacher.to(torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_mlp": 40}, "student: expected the d_mlp of teacher, 48, got 40"),
        ({"vocab_size": 65}, "expected the vocab_size of teacher, 64, got 65"),
        ({"layers": (ATTENTION,) * 2}, "expected the 3 layers of teacher, got 2"),
    ],
)
def test_models_that_never_belonged_together_are_refused(tmp_path, change, message):
    other = teacher_of(dataclasses.replace(CONFIG, **change))
    with pytest.raises(ConfigError, match=message):
        write_difference(named(other, "student"), named(teacher_of()), tmp_path / "d.safetensors")


def test_damaged_and_foreign_files_say_so(tmp_path):
    teacher, path = teacher_of(), tmp_path / "d.safetensors"
    with pytest.raises(CheckpointError, match="expected a file, got nothing there"):
        read_manifest(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="expected a file that `subquad diff` wrote"):
        read_manifest(path)
    write_difference(named(trained(converted(teacher, {1: "mamba2"}))), named(teacher), path)
    good = path.read_bytes()
    with safe_open(str(path), "pt") as file:
        head = json.loads(file.metadata()[difference.KEY])
    tensors = load_file(path)

    def write(values, weights):
        save_file(weights, path, metadata={difference.KEY: json.dumps(values)})

    name = "blocks.1.mixer.out_proj.weight"
    entries = head["entries"]
    for values, weights, error, message in (
        (head | {"schema": 9}, tensors, CheckpointError, "expected schema 1, got 9; install the version"),
        (
            head,
            {k: v for k, v in tensors.items() if k != name},
            CheckpointError,
            f"{name}: expected shape .32, 32., got none",
        ),
        (head, tensors | {name: tensors[name][:1]}, CheckpointError, f"{name}: .*32, 32., got .1, 32."),
        (head | {"teachr": 1}, tensors, ConfigError, "unknown key 'teachr'; did you mean 'teacher'"),
        ({k: v for k, v in head.items() if k != "teacher"}, tensors, ConfigError, "teacher: expected name, spec"),
        (
            head | {"entries": entries | {name: entries[name] | {"form": "wavelets"}}},
            tensors,
            UnsupportedError,
            "form 'wavelets'",
        ),
        (
            head | {"entries": entries | {name: entries[name] | {"dtype": "load"}}},
            tensors,
            CheckpointError,
            "expected a dtype of torch, got 'load'",
        ),
        (
            head | {"entries": entries | {name: entries[name] | {"base": {"name": "blocks.9.o"}}}},
            tensors,
            CheckpointError,
            "expected blocks.9.o in the teacher, got none",
        ),
    ):
        write(values, weights)
        with pytest.raises(error, match=message):
            apply_difference(path, named(teacher))
    path.write_bytes(good[:-9])
    with pytest.raises(CheckpointError, match="could not be read"):
        read_manifest(path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    teacher, path = teacher_of(), tmp_path / "d.safetensors"
    write_difference(named(converted(teacher, {1: "mamba2"})), named(teacher), path)
    good = path.read_bytes()

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(difference, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device.*free some space"):
        write_difference(named(converted(teacher, {1: "gla"})), named(teacher), path)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["d.safetensors"]


# -- as a model -------------------------------------------------------------------------------------------------------


def test_load_model_takes_a_difference(tmp_path):
    save_pretrained(teacher_of(), tmp_path / "teacher", words())
    teacher = load_model(tmp_path / "teacher")
    student = trained(converted(teacher.model, {1: "windowed_linear"}))
    path = tmp_path / "half.safetensors"
    write_difference(named(student, "half", words()), teacher, path, recipe={"seed": 3}, card="# Half")
    loaded = load_model(path)
    assert bits(loaded.model, apply_difference(path, teacher).model)
    assert (loaded.name, loaded.spec, loaded.license) == ("half", str(path), "apache-2.0")
    assert loaded.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert load_model(path, dtype=torch.float64).model.dtype == torch.float64
    manifest = read_manifest(path)
    assert (manifest.recipe, manifest.card, manifest.dtype, manifest.rank) == ({"seed": 3}, "# Half", "bfloat16", 0)
    # The difference to a student that is a difference itself.
    further = trained(converted(loaded.model, {2: "gla"}), parts=("blocks.2.mixer",))
    write_difference(named(further, "further"), loaded, tmp_path / "further.safetensors")
    assert off(load_model(tmp_path / "further.safetensors").model, further) < 2**-8
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="its teacher teacher could not be loaded .*`subquad apply TEACHER"):
        load_model(path)


# -- a larger teacher for a smaller start -----------------------------------------------------------------------------


def test_a_pair_speaks_of_the_same_tokens():
    small = named(teacher_of(), "small", words())
    large = dataclasses.replace(CONFIG, d_model=16, d_mlp=8, layers=(ATTENTION,) * 5)
    check_pair(named(teacher_of(large), "large", words()), small)
    for model, tokenizer, message in (
        (teacher_of(), None, "large: expected a tokenizer beside the weights, got none"),
        (teacher_of(), words("a c b <e>"), "for the teacher large and small, got two: the id of 'b' is 2 in one and 1"),
        (teacher_of(), words("a b c <e> d"), "the number of tokens is 5 in one and 4 in the other; take two models"),
        (teacher_of(), words(cut=True), "for the teacher large and small, got two: token 1 of .* in one"),
        (teacher_of(dataclasses.replace(CONFIG, vocab_size=80)), words(), "embedding of 80 rows .* large has, got 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_pair(named(model, "large", tokenizer), small)
