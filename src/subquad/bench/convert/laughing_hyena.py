"""A Hyena language model trained here and distilled at several orders: what that costs in perplexity.

On a GPU it has 105 M parameters and trains by the clock, in as many runs as it takes: with ``--work`` the same command
goes on where the last one was cut, and what is trained is distilled at once. How fast both generate is
`subquad.bench.engine.laughing_hyena`'s.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.harness import Bench
from subquad.convert.laughing_hyena import distil
from subquad.evals.learning.characters import Characters
from subquad.evals.learning.model import Learner
from subquad.evals.learning.training import Settings, learn
from subquad.models.stack import Stack
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Habits, Progress, StoppedError
from subquad.train.precision import autocast

ORDERS = (4, 8, 16, 24, 32)
# Of the sines of the filters' networks. From the published 14 on filters begin as noise, which minutes of training do
# not smooth: they learn less, and no few modes stand for them.
FREQUENCY = 1.0
# Of training on a GPU, where nothing else is asked for.
MINUTES = 12.0
# Rows of a held-out forward pass, and tokens that are read one by one.
ROWS, STEPPED = 16, 256


def run(bench: Bench) -> None:
    """Byte by byte, on books where they are given, else on the manual that Python brings along."""
    bench.name = "laughing_hyena"
    cuda = bench.device.type == "cuda"
    full = (1024, 10, 1024, 64, 512) if cuda else (64, 2, 512, 4, 32)
    d, depth, length, rows, held = bench.size(full, smoke=(16, 1, 32, 2, 8))
    if bench.data is None:
        text = Characters.Config("pydoc", length)
    else:
        train, valid = (str(bench.data / f"{name}.jsonl.xz") for name in ("train", "valid"))
        text = Characters.Config(train, length, test=valid)
    layer = {"mixer": "hyena", "max_len": length, "frequency": FREQUENCY}
    clocked = cuda or bench.minutes > 0
    settings = Settings(
        "characters",
        {"text": bench.data.name if bench.data else "pydoc", "length": length},
        (layer,) * depth,
        d_model=d,
        batch=rows,
        lr=6e-4 if cuda else 3e-3,
        weight_decay=0.1 if cuda else 0.0,
        steps=None if clocked else bench.size(200, smoke=3),
        minutes=(bench.minutes or MINUTES) if clocked else None,
        held_out=held,
    )
    with TemporaryDirectory() if bench.work is None else nullcontext(str(bench.work)) as folder:
        task = Characters(text)
        teacher, minutes = trained(bench, settings, task, RunFolder(Path(folder)))
    held_bt = task.batch("test", settings.seed, 0, held).inputs.to(bench.device)
    start = perplexity(teacher, held_bt)
    bench.say(f"{bench.name}: trained for {minutes:.1f} minutes to a perplexity of {start:.3f} a byte")
    shape = {
        "parameters": sum(p.numel() for p in teacher.parameters()), "d": d, "layers": depth, "t": length,
        "train_minutes": round(minutes, 2), "text": settings.sizes["text"], "held_out_bytes": held_bt.numel(),
        "frequency": FREQUENCY,
    }  # fmt: skip
    student = teacher
    for order in bench.size(ORDERS, smoke=(8,)):
        began = time.perf_counter()
        made = distil(teacher, modes=order // 2, bound=None)
        student, errors = made.student, sorted(one.l2 for one in made.fits)
        seconds = time.perf_counter() - began
        ratio = perplexity(student, held_bt) / start
        middle = errors[len(errors) // 2]
        bench.say(f"{bench.name}: order {order} in {seconds:.1f} s, {ratio:.5f} x the perplexity, l2 {middle:.2e}")
        bench.value(
            f"ppl_ratio.order{order}", ratio, "1", "lower",
            shape=shape | {"ppl": start, "l2_median": middle, "l2_largest": errors[-1], "distil_seconds": seconds},
        )  # fmt: skip
    few_bt = held_bt[:1, :STEPPED]
    bench.gate("steps equal one shot", stepped(student, few_bt), student(few_bt), rtol=1e-3)


def trained(bench: Bench, settings: Settings, task: Characters, folder: RunFolder) -> tuple[Stack, float]:
    """The model of a run that is begun, gone on with, or finished already, and its minutes of training.

    Raises:
        StoppedError: asked to stop before the time was over; the run is kept.
    """
    told = time.monotonic() - 10.0

    def display(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= 10.0:
            told = time.monotonic()
            bench.say(
                f"{bench.name}: step {progress.step}, loss {progress.loss:.3f} nats a byte, "
                f"{progress.tokens_per_second:,.0f} bytes/s, {progress.seconds_left:.0f} s left"
            )

    habits = Habits(save_minutes=2.0, log_steps=10)
    try:
        learned = learn(
            settings, task, folder, resume=True, device=bench.device, habits=habits, display=display, say=bench.say
        )
    except StoppedError as stop:
        raise StoppedError("stopped, and saved; give the same command again to go on, with --work") from stop
    model = Learner(task, settings.layers, settings.d_model)
    model.load_state_dict(folder.load()["weights"])
    assert isinstance(model.stack, Stack)
    return model.stack.to(bench.device).requires_grad_(False).eval(), learned.minutes


@torch.no_grad()
def perplexity(model: Stack, tokens_bt: Tensor) -> float:
    """Of a byte, over rows from their beginning, in the arithmetic of training."""
    total = torch.zeros((), dtype=torch.float64, device=tokens_bt.device)
    for part_bt in tokens_bt.split(ROWS):
        with autocast(model.device):
            logits_btv = model(part_bt[:, :-1])
        total += F.cross_entropy(logits_btv.flatten(0, 1).float(), part_bt[:, 1:].flatten(), reduction="sum")
    return float((total / tokens_bt[:, 1:].numel()).exp())


@torch.no_grad()
def stepped(model: Stack, tokens_bt: Tensor) -> Tensor:
    """Logits token by token."""
    state, out = model.init_state(len(tokens_bt)), list[Tensor]()
    for t in range(tokens_bt.shape[1]):
        hidden_btd, update = model.read(tokens_bt[:, t : t + 1], state)
        state = update.commit()
        out.append(model.head(hidden_btd))
    return torch.cat(out, dim=1)
