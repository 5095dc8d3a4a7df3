"""Two processes train as one does, replicated or sharded, and go on from each other's checkpoints."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train import loop as loops
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Habits, Loop, Stage
from subquad.train.losses import scored_bt, token_kl
from subquad.train.optimiser import Rate, adamw
from subquad.train.parallel import Processes, gathered, joined, shard_, sharded

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

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    running = [subprocess.Popen(command, env=env | {"RANK": r, "LOCAL_RANK": r}) for r in "01"]
    assert [p.wait(timeout=120) for p in running] == [0, 0]

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


if __name__ == "__main__":
    work(Path(sys.argv[1]))
