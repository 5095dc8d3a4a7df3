"""The phases of a recipe on one machine: streams of several lengths, memory, arithmetic and clipping."""

import copy
import dataclasses
import os
import signal

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.models import flops
from subquad.train import loop as loops
from subquad.train import memory, pipeline
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Habits, StoppedError
from subquad.train.memory import GIB, Needs
from subquad.train.optimiser import Rate
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import Phase, Recipe
from subquad.train.stages import Machine, kinds, make_stage
from subquad.train.stages.align import Align, listen
from subquad.train.stages.distill import Distill
from subquad.train.stages.matrix import Matrix
from subquad.train.stages.stepwise import Stepwise, halfway

RATE = Rate(lr=1e-2)


def run(job, recipe, folder, streams, **options):
    fit(Models(job.teacher, job.student, job.layers), streams, recipe, RunFolder(folder), **options)


def lines(folder, keys=("stage", "step", "tokens", "loss", "gradient", "lr")):
    return [{k: line[k] for k in keys} for line in RunFolder(folder).lines()]


# -- data ---------------------------------------------------------------------------------------------------------

# Lengths take turns, and the last phase goes on where the first ended.
TURNS = Recipe(
    (
        Phase("align", RATE, name="a", tokens=3 * 24, seq=6, options={"passes": 2}),
        Phase("distill", RATE, name="b", tokens=2 * 24),
        Phase("distill", RATE, name="c", tokens=3 * 24, seq=6),
        Phase("distill", RATE, name="d", tokens=3 * 24),
    )
)


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_run_whose_phases_differ_in_length_goes_on_bit_for_bit(tmp_path, monkeypatch, make_work, make_stream, stop):
    def streams():
        made = {}
        return lambda seq: made.setdefault(seq, make_stream(24 // seq, seq))

    whole = make_work()
    run(whole, TURNS, tmp_path / "whole", streams(), seq=12)
    want = lines(tmp_path / "whole")
    assert len(want) == 11

    done, plain = [], loops.Loop.step

    def step(self):
        plain(self)
        done.append(1)
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(done) == stop + 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "step", step)
        with pytest.raises(StoppedError):
            run(make_work(), TURNS, tmp_path / "broken", streams(), seq=12)
        # Killed a step after a checkpoint of a run that was resumed itself.
        options = {"resume": True, "habits": Habits(save_steps=1)}
        with pytest.raises(KeyboardInterrupt):
            run(make_work(), TURNS, tmp_path / "broken", streams(), seq=12, **options)
    again = make_work()
    run(again, TURNS, tmp_path / "broken", streams(), seq=12, resume=True)
    assert lines(tmp_path / "broken") == want
    for a, b in zip(again.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(a, b)


# -- memory -------------------------------------------------------------------------------------------------------


def trained(folder, job, phase, batch=4, **options):
    said = []
    source = options.pop("source")(batch, 12)
    job.teacher.double(), job.student.double()
    run(job, Recipe((phase,)), folder, lambda _: source, say=said.append, **options)
    return said, [p.clone() for p in job.student.parameters()]


def near(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)  # AdamW divides by what may be small


@pytest.mark.parametrize("kind", ["align", "distill", "stepwise"])
def test_what_fits_is_planned_and_said_and_changes_nothing(tmp_path, monkeypatch, make_work, make_stream, kind):
    phase = Phase(kind, Rate(lr=1e-3), tokens=4 * 48)
    said, want = trained(tmp_path / "one", make_work(), phase, source=make_stream)
    assert len(said) == 1 and said[0].startswith(f"{kind}: a batch at once: about ")
    monkeypatch.setattr(memory, "measure", lambda *_, **__: Needs(0, GIB, GIB // 2))
    monkeypatch.setattr(pipeline, "free_bytes", lambda _: int(2.5 * GIB))
    said, got = trained(tmp_path / "two", make_work(), phase, source=make_stream)
    assert said == [f"{kind}: 2 of 4 sequences at once: about 2.0 GiB of 2.5 GiB free"]
    near(got, want)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    # Who says it is not asked.
    monkeypatch.setattr(pipeline, "plan_memory", None)
    said, got = trained(tmp_path / "three", make_work(), phase, source=make_stream, machine=Machine(rows=3))
    assert not said
    near(got, want)


def test_planning_draws_nothing(make_work):
    job = make_work()
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    memory.kept_bytes(job.student.blocks[0], job.student, 12, torch.device("cpu"))
    assert torch.equal(torch.rand(3), want)


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, monkeypatch, make_work, make_stream):
    monkeypatch.setattr(pipeline, "free_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match="for one sequence of 12 tokens.*it fits on a device with 1 GiB more"):
        trained(tmp_path, make_work(), Phase("distill", RATE, tokens=48), source=make_stream)
    assert not RunFolder(tmp_path).lines()


@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind != "distill_cached"])
def test_out_of_memory_halves_the_rows_of_every_stage_and_repeats_the_batch(
    tmp_path, monkeypatch, make_work, make_stream, kind
):
    phase = Phase(kind, Rate(lr=1e-3), tokens=4 * 48)
    _, want = trained(tmp_path / "whole", make_work(), phase, source=make_stream)
    job = make_work()
    mixer = job.student.blocks[0].mixer
    method = "mix_values" if kind == "matrix" else "forward"
    plain = getattr(mixer, method)

    def narrow(x, *rest):
        if len(x) > 1 and torch.is_grad_enabled() and RunFolder(tmp_path / "small").checkpoint.exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")
        return plain(x, *rest)

    monkeypatch.setattr(mixer, method, narrow)
    said, got = trained(tmp_path / "small", job, phase, source=make_stream)
    assert said[1:] == [f"out of memory: stage {kind} goes on with {n} rows of a batch at a time" for n in (2, 1)]
    near(got, want)
    for a, b in zip(lines(tmp_path / "small"), lines(tmp_path / "whole"), strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-9)


@pytest.mark.parametrize("kind", [Align, Matrix])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_layer_give_the_gradient_of_the_whole(make_work, make_stream, kind, rows):
    found = []
    for machine in (Machine(), Machine(rows=rows)):
        job = make_work()
        job.teacher.double(), job.student.double()
        stage = kind(dataclasses.replace(job, stream=make_stream(4, 12), machine=machine))
        figures = stage.step()
        found.append((figures, [p.grad for p in (*stage.new, *stage.old)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-14)


def test_a_teacher_is_heard_the_same_in_parts(make_work):
    teacher = make_work().teacher.double()
    tokens = torch.randint(64, (5, 9))
    heard = []
    for rows in (None, 2):
        heard.append([])
        listen(teacher, tokens, [0, 2], lambda *one: heard[-1].append(one[:3]), rows=rows)
    torch.testing.assert_close(heard[0], heard[1], rtol=1e-12, atol=1e-14)


# -- what is trained, and what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("align", {}), ("matrix", {}), ("stepwise", {}), ("stepwise", {"converted": 0.5})]
)
def test_what_new_leaves_out_trains_at_the_lower_rate_and_is_clipped(make_work, kind, options):
    """Every parameter that trains stands in one set that is clipped; no other has a gradient."""
    job = dataclasses.replace(make_work(), new=("*.qkv.*",))
    stage = make_stage(kind, job, options)
    named = dict(job.student.named_parameters())
    layers = (0,) if options else (0, 2)
    mixers = tuple(f"blocks.{i}.mixer." for i in layers)
    new = {name for name in named if name.startswith(mixers) and ".qkv." in name}
    old = {name for name in named if name.startswith(mixers)} - new
    assert new and old and {id(p) for p in stage.new} == {id(named[name]) for name in new}
    assert {id(p) for p in stage.old} == {id(named[name]) for name in old}
    clipped = [id(p) for some in stage.clipped for p in some]
    assert sorted(clipped) == sorted(id(named[name]) for name in new | old)
    assert len(stage.clipped) == (1 if kind == "stepwise" else 2)  # layer by layer where they are apart
    stage.step()
    assert {name for name, p in named.items() if p.grad is not None} <= new | old


def test_stepwise_trains_all_that_it_names(tmp_path, make_work, make_stream):
    """A pattern of what is new may name layers that still wait."""
    job = make_work()
    before = copy.deepcopy(job.student.state_dict())
    phase = Phase("stepwise", RATE, tokens=96, new=("blocks.2.mixer.*",), options={"converted": 0.5})
    run(job, Recipe((phase,)), tmp_path, lambda _: make_stream())
    changed = {name for name, x in job.student.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {n for n, _ in job.student.named_parameters() if n.startswith("blocks.0.mixer.")}


def test_flops_of_each_stage(make_work):
    job, seq = make_work(), 12
    mixers = {i: job.student.blocks[i].mixer for i in (0, 2)}
    apart = sum(flops.training_apart(m, seq) for m in mixers.values())
    heard = flops.forward(job.teacher, seq, layers=3, head=False)
    assert Align(job).flops_per_token() == heard + apart
    assert Align(job, Align.Config(passes=4)).flops_per_token() == heard / 4 + apart
    attention = flops.mixing(job.teacher.blocks[0].mixer, seq)
    assert Matrix(job).flops_per_token() == heard + apart + 2 * attention
    teacher = flops.forward(job.teacher, seq)
    assert Distill(job).flops_per_token() == teacher + flops.training(job.student, seq)
    half = halfway(job.student, job.teacher, [2])
    stage = Stepwise(job, Stepwise.Config(converted=0.5))
    assert stage.flops_per_token() == teacher + flops.training(half, seq, job.student.blocks[0].mixer.parameters())
    whole = make_stage("supervise", make_work(), {})
    assert whole.flops_per_token() == flops.training(whole.student, seq)


def test_on_a_cpu_no_share_of_its_peak_is_told(tmp_path, monkeypatch, make_work, make_stream):
    told = []

    class Told(loops.Loop):
        def __init__(self, *args, flops_per_token, **options):
            told.append(flops_per_token)
            super().__init__(*args, flops_per_token=flops_per_token, **options)

    monkeypatch.setattr(pipeline, "Loop", Told)
    run(make_work(), Recipe((Phase("align", RATE, tokens=24),)), tmp_path, lambda _: make_stream())
    assert told == [None]
