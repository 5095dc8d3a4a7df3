"""Both stages: what they compute, what they leave alone, and that a stopped run goes on bit for bit."""

import copy
import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from subquad.core.errors import CheckpointError, ConfigError, DivergenceError
from subquad.core.layout import Layout
from subquad.data import Batch, Source, TokenStream
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train import loop as loops
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Habits, Loop, StoppedError
from subquad.train.optimiser import Rate
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import Phase, Recipe, override
from subquad.train.stages import Machine, Work
from subquad.train.stages.align import Align, listen
from subquad.train.stages.distill import Distill

FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
CUT = FULL | {"window": 3}
LAYERS = (0, 2)


class Bytes:
    eos_token_id = 0
    chat_template = None

    def __call__(self, text, *, add_special_tokens, verbose):
        return {"input_ids": [[c % 61 + 1 for c in t.encode()] for t in text]}


def stream(batch=2, time=12):
    texts = [f"document {i} says " + " ".join(str(i * j % 97) for j in range(30)) for i in range(60)]
    return TokenStream([Source("m", lambda: iter(texts))], Bytes(), batch=batch, time=time, chunk_tokens=600)


def models(seed=0):
    """A teacher, and a student that sees three tokens in two of its layers and starts from other mixers there."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "d_model": 16, "d_mlp": 32}
    teacher = Stack(ModelConfig(layers=(FULL,) * 4, **sizes))
    student = Stack(ModelConfig(layers=(CUT, FULL, CUT, FULL), **sizes))
    weights = teacher.state_dict()
    fresh = {
        k: torch.randn_like(v) * 0.1 for k, v in weights.items() if k.startswith(("blocks.0.mixer", "blocks.2.mixer"))
    }
    student.load_state_dict(weights | fresh)
    return teacher, student


def blank():
    """The student with nothing in its new mixers: what a resumed run starts from."""
    student = models()[1]
    with torch.no_grad():
        for i in LAYERS:
            for parameter in student.blocks[i].mixer.parameters():
                parameter.zero_()
    return student


def work(teacher, student, *, train=("*",), **machine):
    return Work(teacher, teacher, student, LAYERS, stream(), train, machine=Machine(**machine))


def run(teacher, student, recipe, folder, source=None, **options):
    source = source or stream()
    fit(Models(teacher, student, LAYERS), lambda _: source, recipe, folder, **options)


STEPS, TOKENS = 9, 9 * 24
FAST = Rate(lr=1e-2)
RECIPES = {
    "align": Recipe((Phase("align", FAST, tokens=TOKENS),)),
    "align cached": Recipe(
        (Phase("align", FAST, tokens=TOKENS, options={"passes": 2, "cache_gb": 3 * 2 * 2 * 2 * 24 * 16 / 2**30}),)
    ),
    "distill": Recipe((Phase("distill", FAST, tokens=TOKENS, options={"labels": 0.5}),)),
    "some of it": Recipe((Phase("distill", FAST, tokens=TOKENS, train=("*mixer*", "*norm*")),)),
    "both": Recipe(
        (Phase("align", Rate(1e-3), tokens=5 * 24, options={"passes": 2}), Phase("distill", Rate(1e-3), tokens=4 * 24))
    ),
    "twice": Recipe(
        (
            Phase("distill", FAST, share=5 / 9, name="short", train=("*mlp*",)),
            Phase("distill", FAST, share=4 / 9, name="long", train=("*mixer*",)),
        )
    ),
}


def losses(folder):
    figures = ("stage", "step", "tokens", "loss", "layers", "kl", "gradient", "lr")
    return [{k: line[k] for k in figures if k in line} for line in folder.lines()]


def test_listen_hears_what_the_blocks_do():
    teacher, _ = models()
    tokens = torch.randint(64, (2, 7))
    layout, heard = Layout.dense(2, 7), {}
    listen(teacher, tokens, [1, 2], lambda i, x, y, _: heard.update({i: (x, y)}))
    x = teacher.embed(tokens)
    for i, block in enumerate(teacher.blocks[:3]):
        if i in heard:
            assert torch.equal(heard[i][0], block.norm1(x))
            assert torch.equal(heard[i][1], block.mixer(block.norm1(x), layout))
        x = block(x, layout)
    assert sorted(heard) == [1, 2]


def test_align_gradients_are_those_of_each_layer_alone():
    teacher, student = models()
    tokens = next(stream()).tokens_bt
    stage = Align(work(teacher, student))
    figures = stage.step()
    for place, i in enumerate(LAYERS):
        kept = {}
        listen(teacher, tokens, [i], lambda _, x, y, __, kept=kept: kept.update(x=x, y=y))
        mixer = copy.deepcopy(student.blocks[i].mixer)
        mixer.zero_grad()
        loss = (mixer(kept["x"]) - kept["y"]).square().sum() / kept["y"].square().sum()
        loss.backward()
        torch.testing.assert_close(figures["layers"][place], loss.detach(), rtol=1e-6, atol=0)
        for a, b in zip(student.blocks[i].mixer.parameters(), mixer.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_align_trains_what_the_patterns_name_and_nothing_else(tmp_path):
    teacher, student = models()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    kept = {k: v.clone() for k, v in teacher.state_dict().items()}
    run(teacher, student, Recipe((Phase("align", Rate(1e-3), tokens=48, train=("*.qkv.*",)),)), RunFolder(tmp_path))
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"blocks.{i}.mixer.qkv.{n}_proj.weight" for i in LAYERS for n in "qkv"}
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())
    with pytest.raises(
        ConfigError, match=r"train blocks.0.mixer.qvk.q_proj.weight: no such .*; did you mean 'blocks.0"
    ):
        Align(work(teacher, student, train=("blocks.0.mixer.qvk.q_proj.weight",)))


def test_align_learns_and_the_cache_is_seen_again(tmp_path):
    teacher, student = models()
    recipe = Recipe((Phase("align", FAST, tokens=80 * 24, options={"passes": 4, "cache_gb": 2**-10}),))
    source = stream()
    read = []
    take = source.__class__.__next__
    source.__class__ = type("Counted", (TokenStream,), {"__next__": lambda s: read.append(1) or take(s)})
    run(teacher, student, recipe, RunFolder(tmp_path), source)
    lines = RunFolder(tmp_path).lines()
    assert len(lines) == 80 and len(read) == 20
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["loss"] == pytest.approx(sum(lines[-1]["layers"]) / 2, rel=1e-6)


def test_distill_brings_the_student_to_the_teacher(tmp_path):
    teacher, student = models()
    kept = {k: v.clone() for k, v in teacher.state_dict().items()}
    run(teacher, student, Recipe((Phase("distill", FAST, tokens=60 * 24),)), RunFolder(tmp_path))
    lines = RunFolder(tmp_path).lines()
    assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())


def test_distill_rates_and_recomputation():
    teacher, student = models()
    stage = Distill(work(teacher, student))
    new = {f"blocks.{i}.mixer.{n}" for i in LAYERS for n, _ in student.blocks[i].mixer.named_parameters()}
    named = {id(p): n for n, p in student.named_parameters()}
    assert {named[id(p)] for p in stage.new} == new
    assert {named[id(p)] for p in stage.old} == set(named.values()) - new
    plain = stage.step()
    grads = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    again = Distill(work(teacher, student, recompute=True)).step()
    assert torch.equal(plain["loss"], again["loss"])
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, student.parameters(), strict=True))
    with pytest.raises(AssertionError):
        Distill(work(teacher, teacher))


def test_compiled_stages_compute_the_same_and_leave_the_models_alone(monkeypatch):
    compile_, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m, dynamic: calls.append(m) or compile_(m, backend="eager"))
    for kind in (Align, Distill):
        steps, students = [], []
        for compiled in (False, True):
            teacher, student = models()
            stage = kind(work(teacher, student, compiled=compiled))
            steps.append(stage.step())
            students.append(student)
        torch.testing.assert_close(steps[0]["loss"], steps[1]["loss"], rtol=1e-6, atol=0)
        for a, b in zip(*(s.named_parameters() for s in students), strict=True):
            assert a[0] == b[0]
            torch.testing.assert_close(a[1].grad, b[1].grad, rtol=1e-5, atol=1e-7)
    assert len(calls) == len(LAYERS) + 8


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
@pytest.mark.parametrize("name", RECIPES)
def test_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, name, stop):
    recipe = RECIPES[name]
    teacher, student = models()
    whole = RunFolder(tmp_path / "whole")
    run(teacher, student, recipe, whole, tokens=TOKENS)
    want = losses(whole)
    assert len(want) == STEPS

    # Stop by a signal after some steps, then by a kill a step after a checkpoint, then run to the end.
    folder = RunFolder(tmp_path / "broken")
    taken = {"steps": 0, "kill": None}
    plain = loops.Loop.step

    def step(self):
        plain(self)
        taken["steps"] += 1
        if taken["steps"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if taken["steps"] == taken["kill"]:
            raise KeyboardInterrupt

    monkeypatch.setattr(loops.Loop, "step", step)
    with pytest.raises(StoppedError, match="--resume to go on"):
        run(teacher, models()[1], recipe, folder, tokens=TOKENS)
    assert losses(folder) == want[:stop]

    taken["kill"] = stop + 2
    with pytest.raises(KeyboardInterrupt):
        run(teacher, blank(), recipe, folder, tokens=TOKENS, resume=True, habits=Habits(save_steps=1))
    resumed = blank()
    run(teacher, resumed, recipe, folder, tokens=TOKENS, resume=True)
    assert losses(folder) == want
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), student.parameters(), strict=True))


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    teacher, student = models()
    folder = RunFolder(tmp_path)
    plain = Align._learn

    def learn(self, i, x, y, layout):
        return plain(self, i, x * (math.nan if len(folder.lines()) == 4 else 1), y, layout)

    monkeypatch.setattr(Align, "_learn", learn)
    message = r"stage align, step 5: expected a finite loss and gradient, got nan .* checkpoint of step 4 is kept"
    with pytest.raises(DivergenceError, match=message):
        run(teacher, student, RECIPES["align"], folder, habits=Habits(save_steps=2))
    checkpoint = folder.load()
    assert checkpoint["step"] == 4
    assert all(torch.isfinite(x).all() for x in checkpoint["weights"].values())


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save({"step": 1})

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device.*the old one is intact; free some space"):
        folder.save({"step": 2})
    assert folder.load()["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_bad_checkpoints(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match="got none; start without --resume"):
        folder.load()
    folder.checkpoint.write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="restore it or start anew"):
        folder.load()
    folder.save({"schema": 0})
    with pytest.raises(CheckpointError, match="expected schema 1, got 0"):
        folder.load()
    folder.save({"stage": "distill", "step": 0})
    teacher, student = models()
    with pytest.raises(CheckpointError, match="expected a checkpoint of align, got one of stage distill"):
        run(teacher, student, RECIPES["align"], folder, resume=True)


def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path):
    RunFolder(tmp_path / "run").save({"step": 7})
    (tmp_path / "run").rename(tmp_path / ".run.previous")
    assert RunFolder(tmp_path / "run").load()["step"] == 7


def test_minutes_end_a_stage(tmp_path, monkeypatch):
    teacher, student = models()
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(loops.time, "monotonic", lambda: next(clock))
    stage = Align(work(teacher, student))
    shown = []
    Loop(stage, Budget(minutes=0.5), Rate(lr=1e-3), RunFolder(tmp_path), display=shown.append).run()
    assert [s.share for s in shown] == sorted(s.share for s in shown)
    assert shown[-1].share == 1 and 5 <= len(shown) <= 10
    assert shown[0].seconds_left == pytest.approx(30 - shown[0].seconds)
    assert all(line["seconds"] > 0 for line in RunFolder(tmp_path).lines())


def test_log_survives_a_torn_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append({"stage": "align", "step": i} for i in range(1, 4))
    with folder.log.open("a") as f:
        f.write('{"stage": "al')
    assert [line["step"] for line in folder.lines()] == [1, 2, 3]
    folder.rewind(("align", "distill"), "align", 2)
    assert [json.loads(line)["step"] for line in folder.log.read_text().splitlines()] == [1, 2]


def test_rates_rise_and_fall():
    rate = Rate(lr=1.0, warmup=0.2, floor=0.1)
    assert [rate.factor(x) for x in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    linear = Rate(lr=1.0, warmup=0.0, floor=0.0, schedule="linear")
    assert [linear.factor(x) for x in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        Rate(lr=1.0, schedule="cosin")
    with pytest.raises(ConfigError, match="tokens or minutes"):
        Budget()
    for budget in ({"minutes": -1.0}, {"minutes": math.nan}, {"tokens": -5}):
        with pytest.raises(ConfigError, match="from 0, got"):
            Budget(**budget)


def test_cache_must_hold_a_batch():
    teacher, student = models()
    with pytest.raises(ConfigError, match="expected cache_gb of at least 2.86e-06 for one batch, got 1e-07"):
        Align(work(teacher, student), Align.Config(passes=2, cache_gb=1e-7))


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    found = []
    for rows in (None, 1):
        teacher, student = (m.double() for m in models())
        task = work(teacher, student, rows=rows)
        stage = Distill(task, Distill.Config(labels=0.3))
        stage.stream = iter([Batch(next(task.stream).tokens_bt, torch.rand(2, 12) > 0.5 * torch.ones(2, 1))])
        torch.manual_seed(1)
        found.append((stage.step()["loss"], [p.grad for p in student.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def test_override():
    recipe = Recipe((Phase("align", Rate(1e-3), share=0.1), Phase("distill", Rate(1e-3), share=0.9)))
    changed = override(
        recipe,
        ["align.tokens=5k", "align.train=*.a,*.b", "align.passes=3", "distill.lr=3e-4", "distill.labels=1"],
    )
    align, distill = changed.phases
    assert (align.tokens, align.train, align.options) == (5000, ("*.a", "*.b"), {"passes": 3})
    assert (distill.rate.lr, distill.options, distill.share) == (3e-4, {"labels": 1}, 0.9)
    assert changed.budgets(1000) == {"align": Budget(5000), "distill": Budget(900)}
    assert list(override(recipe, ["align.tokens=0"]).budgets(1000)) == ["distill"]
    for setting, message in [
        ("align.tokens", "got no '='"),
        ("lr=3", "got no '.'"),
        ("aling.lr=3", "unknown phase 'aling'; did you mean 'align'"),
        ("align.lrr=3", "unknown key 'lrr'; did you mean 'lr'"),
        ("align.labels=3", "unknown key 'labels'"),
        ("align.lr=fast", "expected float, got 'fast'"),
    ]:
        with pytest.raises(ConfigError) as error:
            override(recipe, [setting])
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="phases of different names"):
        Recipe((Phase("align", Rate(1.0)), Phase("align", Rate(1.0))))


def test_what_is_new_is_said_by_patterns():
    teacher, student = models()
    named = {name: id(p) for name, p in student.named_parameters()}
    task = dataclasses.replace(work(teacher, student, train=("*mixer*", "*norm*")), new=("blocks.0.mixer.o_proj.*",))
    stage = Distill(task)
    assert [id(p) for p in stage.new] == [named["blocks.0.mixer.o_proj.weight"]]
    rest = {i for name, i in named.items() if "mixer" in name or "norm" in name}
    assert {id(p) for p in stage.old} == rest - {id(stage.new[0])}
    with pytest.raises(ConfigError, match=r"train blocks.1.mixer.k_map: no such parameter"):
        Distill(dataclasses.replace(task, new=("blocks.1.mixer.k_map",)))
