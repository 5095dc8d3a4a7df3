"""Two processes train as one does, replicated or sharded, and go on from each other's checkpoints."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from subquad.core.errors import ConfigError, DataError, UnsupportedError
from subquad.core.layout import Layout
from subquad.data import Batch, Source, TokenStream
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train import loop as loops
from subquad.train import pipeline
from subquad.train.checkpoint import RunFolder
from subquad.train.logits import Origin, fill
from subquad.train.loop import Budget, Habits, Loop, Stage, StoppedError
from subquad.train.losses import scored_bt, token_kl
from subquad.train.memory import Plan
from subquad.train.optimiser import Rate, adamw
from subquad.train.parallel import Processes, gathered, joined, shard_, sharded
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import Phase, Recipe
from subquad.train.stages import Machine, kinds, load_stage

FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
FAR = {"mixer": "windowed_linear", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "window": 3, "sinks": 1, "features": 5}
BATCH, TIME, STEPS = 4, 12, 5
CPU, RATE = torch.device("cpu"), Rate(lr=1e-2, clip=0.05)


def models(tied=True):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "d_model": 16, "d_mlp": 24, "tied": tied}
    teacher = Stack(ModelConfig(layers=(FULL, FULL), **sizes)).double().requires_grad_(False)
    # The embedding's own start is so small that nothing would be learnt.
    teacher.embed.weight.mul_(20)
    student = Stack(ModelConfig(layers=(FULL, FAR), **sizes)).double()
    return teacher, student


class Copy(Stage):
    """The student learns the teacher's distribution, from rows with very different numbers of labels."""

    name = "copy"

    def __init__(self, teacher, student, processes, rows=None):
        self.teacher, self.student, self.processes, self.rows = teacher, student, processes, rows
        self.device, self.tokens_per_step, self.at = CPU, BATCH * TIME, 0
        self.new = [p for n, p in student.named_parameters() if ".mixer." in n]
        self.old = [p for n, p in student.named_parameters() if ".mixer." not in n]
        self.clipped = [self.new, self.old]

    def step(self):
        generator = torch.Generator().manual_seed(self.at)
        tokens = torch.randint(31, (BATCH, TIME), generator=generator)
        wanted = torch.arange(TIME) < torch.tensor([[12], [3], [7], [0]]).roll(self.at, 0)
        self.at += 1
        whole = scored_bt(Layout.dense(BATCH, TIME), wanted).sum()
        total = 0
        for part in self.processes.parts(BATCH, self.rows):
            layout = Layout.dense(*tokens[part].shape)
            share = scored_bt(layout, wanted[part]).sum().double() / whole
            hidden = self.student.hidden(tokens[part], layout)
            target = self.teacher.hidden(tokens[part], layout)
            heads = self.student.lm_head.weight, self.teacher.lm_head.weight
            loss = share * token_kl(hidden, heads[0], target, heads[1], layout, wanted[part])
            loss.backward()
            total = total + loss.detach()
        return {"loss": total, "pair": torch.stack([total, 2 * total])}

    def weights(self):
        return self.student.state_dict()

    def load_weights(self, weights):
        self.student.load_state_dict(weights)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def loop(folder, teacher, student, processes, rows=None):
    stage = Copy(teacher, student, processes, rows)
    budget = Budget(STEPS * BATCH * TIME)
    # One process logs every step, and several log all at once: that changes no figure.
    habits = Habits(log_steps=1 if processes.world == 1 else STEPS)
    return Loop(stage, budget, RATE, RunFolder(folder), processes=processes, habits=habits)


def halfway(of):
    of.step()
    of.step()
    of.save()


@contextmanager
def bfloat16():
    """Training on a CPU computes as on a GPU."""
    before, kinds = loops.autocast, {"device_type": "cpu", "dtype": torch.bfloat16}
    loops.autocast = lambda device, *, keep_casts: torch.autocast(**kinds, cache_enabled=keep_casts)
    yield
    loops.autocast = before


def whole(weights):
    return {k: x.clone() for k, x in gathered(weights).items()}


def work(out):
    """What each of two processes does."""
    torch.set_num_threads(1)
    ends = {}
    with joined(CPU) as processes:
        teacher, student = models()
        # What a process has computed for itself may differ: the first one's counts.
        student.norm.weight.data.add_(processes.rank * 1e-3)
        loop(out / "replicated", teacher, student, processes, rows=1).run()
        ends["replicated"] = whole(student.state_dict())

        teacher, student = models()
        shard_(teacher, processes)
        with sharded(student, processes) as spread:
            assert all(isinstance(p, DTensor) for p in (*spread.parameters(), *teacher.parameters()))
            loop(out / "sharded", teacher, spread, processes, rows=1).run()
        ends["sharded"] = whole(student.state_dict())

        teacher, student = models()
        with sharded(student, processes) as spread:
            halfway(loop(out / "middle", teacher, spread, processes))

        teacher, student = models()
        with sharded(student, processes) as spread:
            resumed = loop(out / "single", teacher, spread, processes)
            resumed.resume(resumed.folder.load())
            resumed.run()
        ends["resumed by two"] = whole(student.state_dict())

        teacher, student = (model.float() for model in models())
        with sharded(student, processes) as spread, bfloat16():
            loop(out / "cast", teacher, spread, processes, rows=1).run()

        teacher, student = models()
        with sharded(student, processes) as spread:
            stage = Copy(teacher, spread, processes)
            stage.step()
            adamw(stage.new, stage.old, RATE, device=torch.device("cuda")).step()  # the fused form
        ends["fused"] = whole(student.state_dict())
        if processes.main:
            torch.save(ends, out / "ends.pt")


def two_processes(what, out):
    """Run a function of this file in two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, what, str(out)]
    running = [subprocess.Popen(command, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
    assert [p.wait(timeout=240) for p in running] == [0, 0]


def figures(folder):
    return [{k: line[k] for k in ("step", "tokens", "lr", "loss", "pair", "gradient")} for line in folder.lines()]


def close(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_train_as_one(tmp_path):
    teacher, student = models()
    first = {k: x.clone() for k, x in student.state_dict().items()}
    loop(tmp_path / "one", teacher, student, Processes(CPU)).run()
    want, lines = student.state_dict(), figures(RunFolder(tmp_path / "one"))
    assert len(lines) == STEPS and any(line["gradient"] > 0.05 for line in lines)  # clipping has something to do
    assert not torch.allclose(want["norm.weight"], first["norm.weight"], atol=1e-3)

    _, student = models()
    halfway(loop(tmp_path / "single", teacher, student, Processes(CPU)))

    two_processes("work", tmp_path)

    ends = torch.load(tmp_path / "ends.pt")
    assert ends.keys() == {"replicated", "sharded", "resumed by two", "fused"}
    _, student = models()
    stage = Copy(teacher, student, Processes(CPU))
    stage.step()
    adamw(stage.new, stage.old, RATE, device=CPU).step()
    close(ends.pop("fused"), student.state_dict())
    for end in ends.values():
        close(end, want)
    for name, start in (("replicated", 0), ("sharded", 0), ("single", 2)):
        got = figures(RunFolder(tmp_path / name))[-(STEPS - start) :]
        for a, b in zip(got, lines[start:], strict=True):
            for key, value in b.items():
                assert a[key] == pytest.approx(value, rel=1e-9), (name, key)

    teacher, student = (model.float() for model in models())
    with bfloat16():
        loop(tmp_path / "one cast", teacher, student, Processes(CPU), rows=1).run()
    got, cast = (figures(RunFolder(tmp_path / name))[0] for name in ("cast", "one cast"))
    assert got["gradient"] == pytest.approx(cast["gradient"], rel=1e-4)

    teacher, student = models()
    alone = loop(tmp_path / "middle", teacher, student, Processes(CPU))
    alone.resume(alone.folder.load())
    assert alone.steps == 2
    alone.run()
    close(student.state_dict(), want)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_parts_of_a_batch_add_up_to_it(rows):
    teacher, student = models(tied=False)
    whole = Copy(teacher, student, Processes(CPU)).step()
    want = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    parts = Copy(teacher, student, Processes(CPU), rows=rows).step()
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    for p, grad in zip(student.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-14)


def test_every_row_is_trained_on_once():
    for world, rows in ((1, None), (2, None), (3, 1), (2, 2), (2, 5)):
        taken = [list(range(12))[part] for r in range(world) for part in Processes(CPU, r, world).parts(12, rows)]
        assert sorted(i for part in taken for i in part) == list(range(12))
        assert max(len(part) for part in taken) == min(rows or 12, 12 // world)
    with pytest.raises(ConfigError, match="--batch 8: expected a multiple of the 3 processes; give 9"):
        Processes(CPU, 0, 3).parts(8)


# -- every stage --------------------------------------------------------------------------------------------------

# Of a stage that is not named here, the defaults.
OPTIONS = {
    "align": {"align": {"passes": 2}},
    "distill": {"distill": {"labels": 0.5}},
    "stepwise": {"stepwise half": {"converted": 0.5}, "stepwise": {}},
    "supervise": {"supervise": {}, "supervise adapters": {"rank": 2}},
    "distill_cached": {"distill_cached": {"cache": "CACHE", "labels": 0.5}},
}
NEW = {"align": ("*.k_map_*",), "stepwise": ("*.k_map_*",)}  # the rest at the lower rate
PHASES = [
    Phase(kind, RATE, name=name, tokens=STEPS * BATCH * TIME, new=NEW.get(name, ()), options=options)
    for kind in kinds()
    for name, options in OPTIONS.get(kind, {kind: {}}).items()
]


def spreads(phase):
    return load_stage(phase.stage).spreads and phase.name != "supervise adapters"


class Letters:
    eos_token_id = 0
    chat_template = None

    def __call__(self, text, *, add_special_tokens, verbose):
        return {"input_ids": [[c % 30 + 1 for c in t.encode()] for t in text]}

    def get_vocab(self):
        return {"letters": 31}


class Uneven(TokenStream):
    """Rows of a batch have very different numbers of labels."""

    def __next__(self):
        tokens = super().__next__().tokens_bt
        return Batch(tokens, tokens % torch.tensor([[1], [3], [9], [31]]) == 0)


def uneven(batch=BATCH):
    texts = [f"document {i} says " + " ".join(str(i * j % 97) for j in range(30)) for i in range(60)]
    return Uneven([Source("m", lambda: iter(texts))], Letters(), batch=batch, time=TIME, chunk_tokens=600)


def converted():
    """A teacher, and a student with other mixers in its first and last layer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "d_model": 16, "d_mlp": 24}
    teacher = Stack(ModelConfig(layers=(FULL, FULL, FULL), **sizes)).double().requires_grad_(False)
    teacher.embed.weight.mul_(20)
    student = Stack(ModelConfig(layers=(FAR, FULL, FAR), **sizes)).double()
    return teacher, student


def train(phase, folder, processes, **options):
    """Train by one phase; the student's weights at the end."""
    teacher, student = converted()
    if "cache" in phase.options:
        cache = folder.parent / "cache"
        phase = replace(phase, options=phase.options | {"cache": str(cache)})
        origin = Origin.of("teacher", teacher, 4, uneven())
        processes.first(lambda: fill(cache, teacher, uneven(), origin, STEPS * BATCH * TIME) and None)
    said = []
    fit(
        Models(teacher, student, (0, 2)),
        lambda _: uneven(),
        Recipe((phase,)),
        RunFolder(folder),
        seq=TIME,
        processes=processes,
        habits=Habits(log_steps=STEPS),
        say=said.append,
        **options,
    )
    return whole(student.state_dict()), said


def stages(out):
    """What each of two processes does: every stage replicated, one row at a time, and spread where that is possible."""
    torch.set_num_threads(1)
    ends, plain = {}, pipeline.plan_memory

    def refuse(*_, shards, **__):
        if shards == 1:
            raise ConfigError("too large for one device")
        return Plan(1, True, 0, 0)

    with joined(CPU) as processes:
        for phase in PHASES:
            ends[phase.name], _ = train(phase, out / phase.name, processes, machine=Machine(rows=1))
            close(ends[phase.name], processes.first(lambda name=phase.name: ends[name]))
            pipeline.plan_memory = refuse
            if spreads(phase):
                ends[f"{phase.name} spread"], said = train(phase, out / f"{phase.name} spread", processes)
                assert said[0].endswith("parameters spread over 2 processes"), said
            else:
                # The same in both, handed on by the first.
                with pytest.raises(ConfigError, match="too large for one device"):
                    train(phase, out / "refused", processes)
            pipeline.plan_memory = plain
        with sharded(converted()[1], processes) as spread:
            for name in ("align", "matrix", "stepwise", "supervise adapters"):
                phase = next(p for p in PHASES if p.name == name)
                with pytest.raises(UnsupportedError, match=f"{phase.stage}: expected whole parameters"):
                    pipeline.make_stage(phase.stage, task(spread, processes), phase.options)
        with pytest.raises(ConfigError, match="--batch 3: expected a multiple of the 2 processes; give 4"):
            pipeline.make_stage("distill", task(converted()[1], processes, uneven(3)), {})

        # What the first does alone: its result and its errors are all processes'.
        assert processes.first(lambda: processes.rank + 7) == 7
        with pytest.raises(DataError, match="no such file"):
            processes.first(lambda: missing(processes.rank))
        found = processes.ahead(lambda: written(out / "first"))
        assert found == ["wrote", "read"][processes.rank]
        assert processes.least(5 - processes.rank) == 4

        # A signal to one stops both after the same step.
        step = Loop.step

        def signalled(self):
            step(self)
            if processes.rank == 1 and self.steps == 2:
                signal.raise_signal(signal.SIGTERM)

        Loop.step = signalled
        with pytest.raises(StoppedError, match="stopped after step 2 of stage distill"):
            train(next(p for p in PHASES if p.name == "distill"), out / "stopped", processes)
        if processes.main:
            torch.save(ends, out / "ends.pt")


def task(student, processes, source=None):
    teacher = converted()[0]
    return pipeline.Work(teacher, teacher, student, (0, 2), source or uneven(), processes=processes)


def missing(rank):
    assert rank == 0
    raise DataError("no such file")


def written(path):
    if path.exists():
        return "read"
    path.write_text("")
    return "wrote"


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Folder and ends of what two processes trained."""
    out = tmp_path_factory.mktemp("stages")
    two_processes("stages", out)
    return out, torch.load(out / "ends.pt")


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_every_stage_trains_by_two_processes_as_by_one(tmp_path, by_two, phase):
    out, ends = by_two
    want, _ = train(phase, tmp_path / "one", Processes(CPU))
    first = converted()[1].state_dict()
    assert any(not torch.allclose(x, first[name], atol=1e-3) for name, x in want.items())
    lines = RunFolder(tmp_path / "one").lines()
    assert len(lines) == STEPS and any(line["gradient"] > RATE.clip for line in lines)
    for name in (phase.name, f"{phase.name} spread")[: 1 + spreads(phase)]:
        close(ends[name], want)
        got = RunFolder(out / name).lines()
        for a, b in zip(got, lines, strict=True):
            for key in b.keys() - {"stage", "seconds", "tokens_per_second"}:
                assert a[key] == pytest.approx(b[key], rel=1e-9), (name, key)


def test_a_signal_to_one_process_stops_both_at_a_checkpoint(by_two):
    assert RunFolder(by_two[0] / "stopped").load()["step"] == 2


if __name__ == "__main__":
    {"work": work, "stages": stages}[sys.argv[1]](Path(sys.argv[2]))
