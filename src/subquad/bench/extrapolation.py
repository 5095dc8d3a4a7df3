"""MemMamba against Mamba beyond the length that both were trained at: perplexity of books, and passkeys.

Run it with ``python -m subquad.bench.extrapolation --train books.jsonl.xz --held others.jsonl.xz --runs runs``.
Models of bytes are trained from nothing, each for so many minutes on books and then for so many on passkeys. The same
command goes on where it was stopped; the result is written after the books, and anew after the passkeys.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subquad.bench.plots import refresh_plots
from subquad.bench.results import Result, Row, environment, make_row, result_path
from subquad.core.config import config_to_dict
from subquad.core.errors import DataError
from subquad.data.sources import parse_source
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.characters import Characters
from subquad.evals.learning.model import Learner, layers_of
from subquad.evals.learning.passkey import Passkey
from subquad.evals.learning.stage import TaskStage, answers, tested
from subquad.evals.learning.task import Task, token_batch
from subquad.evals.learning.training import Settings, check_folder
from subquad.evals.stats import Interval, bootstrap_ratio, wilson
from subquad.mixers.memmamba import MemMamba
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Habits, Loop, Progress, StoppedError
from subquad.train.precision import autocast

BENCH, BASELINE = "memmamba", "mamba1"
# Lengths that are measured, in times of the training's.
TIMES = (0.5, 1, 2, 4, 8, 16)
# Of the training's length, the share whose bytes are scored at every length.
SCORED = 4
HABITS = Habits(save_minutes=1.0, log_steps=10)


@dataclass(frozen=True)
class Plan:
    """What is trained and measured.

    Attributes:
        train: source of books, as `subquad.data.parse_source` takes it.
        held: another one, in which a document holds the longest window.
        minutes: of training on books, for each model.
        passkey_minutes: of training on passkeys after it.
        steps: at most, of each training; 0 is no such limit.
        d_model, layers: of the models.
        length: bytes of a training row.
        rows: of a step.
        lr: peak learning rate.
        digits: of a passkey.
        windows: of held-out books.
        questions: passkeys at each length.
        pool, take_above: of MemMamba: notes that are kept, and the importance above which one is taken.
        below: of how many layers below it a MemMamba layer reads the notes too, or of all where there are fewer.
    """

    train: str
    held: str
    minutes: float = 2.5
    passkey_minutes: float = 1.0
    steps: int = 0
    d_model: int = 512
    layers: int = 6
    length: int = 1024
    rows: int = 32
    lr: float = 1e-3
    digits: int = 5
    windows: int = 256
    questions: int = 200
    pool: int = 50
    take_above: float = 0.5
    below: int = 0

    def settings(self, mixer: str, task: Task, name: str, minutes: float) -> Settings:
        """One training of one model."""
        options = {"pool": self.pool, "take_above": self.take_above}
        made = layers_of([mixer], self.layers, self.d_model, {BENCH: options}, task)
        if mixer == BENCH and self.below:
            made = tuple(layer | {"below": min(i, self.below)} for i, layer in enumerate(made))
        sizes = config_to_dict(task.config)
        return Settings(
            name, sizes, made, self.d_model, batch=self.rows, lr=self.lr, steps=self.steps or None, minutes=minutes,
            held_out=self.rows,
        )  # fmt: skip


def trained(model: Learner, settings: Settings, task: Task, folder: RunFolder) -> dict[str, Any]:
    """Train `model` in place, or go on, or take what is there already; steps, bytes and minutes that it took.

    Raises:
        ConfigError: what is there has other settings.
        StoppedError: asked to stop before the time was over; the training is kept.
    """
    check_folder(settings, folder, resume=True)
    folder.note(settings=config_to_dict(settings))
    stage = TaskStage(task, model, Batches(task, settings.seed, settings.batch), probe_rows=settings.held_out)
    budget = Budget(settings.steps and settings.steps * stage.tokens_per_step, settings.minutes)
    loop = Loop(stage, budget, settings.rate(), folder, habits=HABITS, display=Told(folder.path.name), say=print)
    # Kernels are made ready before the clock runs, or who comes first would pay for both.
    with autocast(stage.device):
        stage.step()
    model.zero_grad(set_to_none=True)
    stage.load_state_dict({"at": 0})
    if folder.checkpoint.exists():
        loop.resume(folder.load())
    try:
        loop.run()
    except StoppedError as stop:
        raise StoppedError(f"stopped, and saved in {folder.path}; give the same command again to go on") from stop
    return {"steps": loop.steps, "bytes": loop.tokens, "minutes": round(loop.seconds / 60, 2)}


class Told:
    """Prints a line about a training every ten seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.next = name, 0.0

    def __call__(self, at: Progress) -> None:
        """Told after every log."""
        if time.monotonic() >= self.next or at.share == 1:
            self.next = time.monotonic() + 10
            pace = f"{at.tokens_per_second:,.0f} bytes/s"
            print(f"{self.name}: {at.share:.0%}, step {at.step}, loss {at.loss:.3f}, {pace}", flush=True)


def windows(documents: Sequence[bytes], length: int, count: int, apart: int) -> Tensor:
    """So many windows of so many bytes, each within one document, evenly spread: int64 ``[count, length]``.

    Raises:
        DataError: their ends would lie less than `apart` bytes from each other.
    """
    rooms = np.array([max(len(document) - length, 0) for document in documents])
    if rooms.sum() < count * apart:
        raise DataError(
            f"held-out text: expected documents that hold {count} windows of {length:,} bytes, {apart} apart, got "
            f"{len(documents)} of at most {max(map(len, documents), default=0):,}; give longer ones or fewer windows"
        )
    before, found = rooms.cumsum() - rooms, list[Tensor]()
    for offset in np.arange(count) * rooms.sum() // count:
        which = int(np.flatnonzero(before <= offset)[-1])
        start = int(offset - before[which])
        found.append(torch.frombuffer(bytearray(documents[which][start : start + length]), dtype=torch.uint8).long())
    return torch.stack(found)


@torch.no_grad()
def losses(model: Learner, bytes_bt: Tensor, tokens: int) -> Tensor:
    """Cross-entropy of every next byte in nats, ``[b, t - 1]``, about so many `tokens` read at once."""
    batch = token_batch(bytes_bt[:, :-1].numpy(), bytes_bt[:, 1:].numpy())
    device, found = next(model.parameters()).device, list[Tensor]()
    rows = max(1, tokens // batch.inputs.shape[1])
    for start in range(0, len(batch), rows):
        part = batch.rows(start, start + rows).to(device)
        with autocast(device):
            found.append(answers(model(part), part.targets)[0].cpu())
    return torch.cat(found)


def book_rows(plan: Plan, models: Mapping[str, Learner], bytes_bt: Tensor, shape: Mapping[str, Any]) -> list[Row]:
    """Perplexity at every length: of the last bytes, which are the same at each, and of all bytes of the windows."""
    rows: list[Row] = []
    scored = plan.length // SCORED
    for times in TIMES:
        t = int(times * plan.length)
        nats = {name: losses(model, bytes_bt[:, -t - 1 :], plan.rows * plan.length) for name, model in models.items()}
        for what, last in (("ppl", scored), ("ppl_mean", t)):
            found = {}
            for name, loss_bt in nats.items():
                sums_b = loss_bt[:, -last:].double().sum(1)
                found[name] = bootstrap_ratio(sums_b, torch.full_like(sums_b, last)).map(np.exp)
            ours, theirs = found[BENCH], found[BASELINE]
            sizes = {**shape, "t": t, "scored": last, "windows": len(bytes_bt)}
            rows.append(_row(f"{what}.x{times:g}", ours, theirs, "1", "lower", sizes))
            print(f"{rows[-1].id}: {ours.format()}, {BASELINE} {theirs.format()}", flush=True)
    return rows


def passkey_rows(plan: Plan, models: Mapping[str, Learner], shape: Mapping[str, Any]) -> list[Row]:
    """Share of numbers that are said in full, at every length."""
    rows: list[Row] = []
    for times in TIMES:
        t, found = int(times * plan.length), {}
        batch = Passkey(Passkey.Config(t, plan.digits)).batch("test", 0, 0, plan.questions)
        for name, model in models.items():
            right_n, asked_n, _ = tested(model, batch, max(1, plan.rows * plan.length // t))
            found[name] = wilson(int((right_n == asked_n).sum()), len(right_n))
        ours, theirs = found[BENCH], found[BASELINE]
        sizes = {**shape, "t": t, "digits": plan.digits, "questions": plan.questions}
        rows.append(_row(f"passkey.x{times:g}", ours, theirs, "1", "higher", sizes))
        print(f"{rows[-1].id}: {ours.format()}, {BASELINE} {theirs.format()}", flush=True)
    return rows


@torch.no_grad()
def note_rows(model: Learner, bytes_bt: Tensor) -> list[Row]:
    """Of each layer of MemMamba, the share of bytes that leave a note, and the share that read the pool."""
    shares: dict[str, float] = {}
    mixers = [block.mixer for block in model.stack.blocks if isinstance(block.mixer, MemMamba)]

    def hear(name: str, above: float) -> Any:
        def hook(_: object, __: object, score_bt1: Tensor) -> None:
            shares[name] = float((score_bt1.sigmoid() > above).float().mean())

        return hook

    hooks: list[Any] = []
    for i, mixer in enumerate(mixers):
        config = mixer.config
        for what, gate, above in (
            ("taken", mixer.importance, config.take_above),
            ("recalling", mixer.forgotten, config.recall_above),
        ):
            hooks.append(gate.register_forward_hook(hear(f"{what}.layer{i}", above)))
    losses(model, bytes_bt, bytes_bt.numel())
    for hook in hooks:
        hook.remove()
    rows: list[Row] = []
    for name, share in shares.items():
        pool = mixers[0].config.pool
        shape = {"pool": pool, "bytes_held": round(pool / share) if share else None}
        rows.append(make_row(f"{BENCH}.{name}", share, "1", "lower", shape=shape))
        print(f"{rows[-1].id}: {share:.4f} of all bytes", flush=True)
    return rows


def _row(id: str, ours: Interval, theirs: Interval, unit: str, better: str, shape: Mapping[str, Any]) -> Row:
    def limits(of: Interval) -> list[float]:
        return [] if of.low is None or of.high is None else [of.low, of.high]

    return make_row(
        f"{BENCH}.{id}",
        ours.value,
        unit,
        better,
        baseline=BASELINE,
        baseline_value=theirs.value,
        shape={**shape, f"{BASELINE}_interval": limits(theirs)},
        interval=limits(ours),
    )


def run(plan: Plan, runs: Path, out: Path, device: torch.device, command: str) -> Path:
    """Train both, measure both, write the result and its charts.

    Args:
        plan: what is to be done.
        runs: folder of the trainings; one that is there is taken up.
        out: folder of the result.
        device: where it runs.
        command: to be named in the result.

    Returns:
        The result file.

    Raises:
        ConfigError: a training in `runs` has other settings, or a length is too short for a passkey.
        DataError: texts that are missing, broken or too short.
    """
    # Whatever can't be is found before anything is trained.
    keys = {times: Passkey(Passkey.Config(int(times * plan.length), plan.digits)) for times in TIMES}
    held = [document.encode() for document in parse_source(plan.held).open() if isinstance(document, str)]
    longest = int(max(TIMES) * plan.length) + 1
    bytes_bt = windows(held, longest, plan.windows, plan.length // SCORED)
    books = Characters(Characters.Config(plan.train, plan.length))
    made, models, shape = list[Row](), dict[str, Learner](), dict[str, Any]()
    path = result_path(out, BENCH, device)
    env = environment(device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    def write(rows: list[Row]) -> None:
        made.extend(rows)
        Result(BENCH, command, env, list(made)).save(path)
        refresh_plots(path)
        print(f"wrote {path}", flush=True)

    for name in (BASELINE, BENCH):
        settings = plan.settings(name, books, "characters", plan.minutes)
        torch.manual_seed(settings.seed)
        models[name] = Learner(books, settings.layers, plan.d_model).to(device)
        spent = trained(models[name], settings, books, RunFolder(runs / f"{name}.books"))
        shape[name] = {"parameters": sum(p.numel() for p in models[name].parameters()), **spent}
    trained_at = {"trained_at": plan.length, "d_model": plan.d_model, "layers": plan.layers, "rows": plan.rows}
    write(
        note_rows(models[BENCH], bytes_bt[:8, -plan.length - 1 :])
        + book_rows(plan, models, bytes_bt, trained_at | shape)
    )
    for name in (BASELINE, BENCH):
        settings = plan.settings(name, keys[1], "passkey", plan.passkey_minutes)
        shape[name] = trained(models[name], settings, keys[1], RunFolder(runs / f"{name}.passkey"))
    write(passkey_rows(plan, models, trained_at | shape))
    return path


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", required=True, help="text to train on, as in subquad convert --data")
    parser.add_argument("--held", required=True, help="text to measure on: JSONL with a book a line")
    default = {f.name: f.default for f in fields(Plan) if f.default is not MISSING}
    for name, value in default.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trainings, to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves PyTorch's choice")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the result file")
    args = vars(parser.parse_args())
    runs, out, device, threads = (args.pop(name) for name in ("runs", "out", "device", "threads"))
    if threads:
        torch.set_num_threads(threads)
    # Where the texts lie is this machine's own affair.
    said = {"train": Path(args["train"]).name, "held": Path(args["held"]).name}
    said |= {name: args[name] for name, value in default.items() if args[name] != value}
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in said.items())
    command = f"python -m subquad.bench.extrapolation{flags} --runs {runs.name} --device {device}"
    run(Plan(**args), runs, out, torch.device(device), command + (f" --threads {threads}" if threads else ""))


if __name__ == "__main__":
    main()
