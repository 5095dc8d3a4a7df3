"""Training of a model on a task, in the loop of all training, and what it has learned in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.model import Learner
from subquad.evals.learning.stage import TaskStage, held_out, tested
from subquad.evals.learning.task import IGNORE, Task
from subquad.evals.stats import Interval, bootstrap_ratio, wilson
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Display, Habits, Loop, StoppedError
from subquad.train.optimiser import Rate


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes:
        task: its name.
        sizes: its config.
        layers: of the model.
        d_model: its width.
        d_mlp: of its SwiGLUs; 0 is none, None is two times `d_model`.
        norm: one of `subquad.evals.learning.model.NORMS`.
        batch: rows of a step.
        lr: peak learning rate.
        warmup: share of the run in which the rate rises to it.
        weight_decay: of matrices.
        rows: that there are to train on; None draws new ones for every step.
        steps, minutes: when it ends, by what comes first; with minutes alone the rate follows the clock, and no two
            runs are the same.
        held_out: rows that are tested in the end, or all where there are fewer.
        seed: of the model and of all batches.
        start: folder of a run whose weights this one begins with, of an easier size of the task, say; None draws them.
    """

    task: str
    sizes: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    d_model: int = 64
    d_mlp: int | None = None
    norm: str = "rms"
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    rows: int | None = None
    steps: int | None = None
    minutes: float | None = None
    held_out: int = 1000
    seed: int = 0
    start: str | None = None

    def __post_init__(self) -> None:
        """Refuse what trains or tests nothing."""
        if self.steps is None and self.minutes is None:
            raise ConfigError("expected --steps or --minutes, got neither; give the run an end")
        for name, value in (
            ("steps", self.steps),
            ("minutes", self.minutes),
            ("batch", self.batch),
            ("rows", self.rows),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name}: expected more than 0, got {value:g}; nothing would be learned")
        if self.held_out < 1 or self.d_model < 2:
            raise ConfigError(f"expected held-out rows and a width from 2, got {self.held_out} and {self.d_model}")
        self.rate()

    def rate(self) -> Rate:
        """The learning rate's course, down to 0, which refuses what is none; moments as all the papers' runs have."""
        return Rate(self.lr, warmup=self.warmup, weight_decay=self.weight_decay, floor=0.0, betas=(0.9, 0.999))


@dataclass(frozen=True)
class Learned:
    """What came of a run.

    Attributes:
        accuracy: share of the held-out answers that are right.
        commonest: the same of saying always what is most often right.
        loss: mean cross-entropy of these answers, in nats.
        course: steps done, minutes, and held-out accuracy then, of fewer rows.
        steps, minutes: of training.
        parameters: of the model.
        rows: that were tested.
    """

    accuracy: Interval
    commonest: float
    loss: float
    course: list[tuple[int, float, float]]
    steps: int
    minutes: float
    parameters: int
    rows: int


def accuracy_of(right_n: Tensor, asked_n: Tensor) -> Interval:
    """Share of right answers with a 95 % interval over rows, whose answers may hang together.

    Wilson's where a row has one answer, or where every row has the same share, of which a bootstrap knows nothing;
    else the bootstrap's.
    """
    share_n = right_n / asked_n
    if bool((share_n == share_n[0]).all()) and float(share_n[0]) in (0.0, 1.0):
        return wilson(int(share_n.sum()), len(share_n))
    if bool((asked_n == 1).all()):
        return wilson(int(right_n.sum()), len(right_n))
    return bootstrap_ratio(right_n, asked_n)


def check_folder(settings: Settings, folder: RunFolder, *, resume: bool) -> dict[str, Any]:
    """What is known of the run in `folder`, nothing where there is none.

    Raises:
        ConfigError: it holds a run and `resume` is not given, or one with other settings.
    """
    facts, now = folder.facts(), config_to_dict(settings)
    if not resume and (facts or folder.checkpoint.exists()):
        raise ConfigError(f"--out {folder.path}: holds a run already; give --resume to go on, or another folder")
    was = facts.get("settings", now)
    changed = ", ".join(f"{k} {was.get(k)} (now {now.get(k)})" for k in now if was.get(k) != now.get(k))
    if changed:
        raise ConfigError(f"--resume: expected the settings of the run in {folder.path}, got {changed}; give the same")
    return facts


def learn(
    settings: Settings,
    task: Task,
    folder: RunFolder,
    *,
    resume: bool = False,
    device: torch.device | None = None,
    workers: int = 0,
    habits: Habits | None = None,
    display: Display | None = None,
    say: Callable[[str], None] | None = None,
    stopped: Callable[[Learned], None] | None = None,
) -> Learned:
    """Train a model on `task` as `settings` say, and test it.

    The folder holds ``checkpoint.pt``, ``log.jsonl`` and ``run.json``; a run that is finished there is read, not run
    again, where `resume` allows it.

    Args:
        settings: what the run depends on.
        task: the task they name.
        folder: of this run alone.
        resume: go on from the folder's checkpoint.
        device: the CPU when None.
        workers: processes that make batches.
        habits, display, say: as in `Loop`.
        stopped: told what is learned so far where a signal stops the run.

    Raises:
        ConfigError: as in `check_folder` and `begin`.
        CheckpointError: as in `begin`.
        DivergenceError, StoppedError: as in `Loop.run`.
    """
    facts = check_folder(settings, folder, resume=resume)
    if "learned" in facts:
        found = facts["learned"]
        return Learned(
            **found | {"accuracy": Interval(**found["accuracy"]), "course": [tuple(x) for x in found["course"]]}
        )
    device = device or torch.device("cpu")
    torch.manual_seed(settings.seed)
    model = Learner(task, settings.layers, settings.d_model, settings.d_mlp, settings.norm).to(device)
    batches = Batches(task, settings.seed, settings.batch, workers, settings.rows, say)
    stage = TaskStage(task, model, batches, say)
    tokens = None if settings.steps is None else settings.steps * stage.tokens_per_step
    budget = Budget(tokens, settings.minutes)
    loop = Loop(stage, budget, settings.rate(), folder, habits=habits, display=display, say=say)
    if settings.start is not None and not folder.checkpoint.exists():
        begin(stage, settings.start)
    folder.note(settings=config_to_dict(settings))
    if folder.checkpoint.exists():
        checkpoint = folder.load()
        folder.rewind([stage.name], stage.name, checkpoint["step"])
        loop.resume(checkpoint)
    try:
        loop.run()
    except StoppedError:
        if stopped is not None:
            stopped(_test(settings, stage, loop))
        raise
    finally:
        batches.close()
    learned = _test(settings, stage, loop)
    folder.note(learned=asdict(learned))
    return learned


def check_start(start: str | None) -> None:
    """Refuse a folder to start from that holds no run."""
    if start is not None and not (Path(start) / "checkpoint.pt").exists():
        raise ConfigError(f"--start: expected a run in {start}, got no checkpoint.pt there; name another run's --out")


def begin(stage: TaskStage, start: str) -> None:
    """Give the model the weights of the run in the folder `start`.

    Raises:
        ConfigError: no run is there, or its model is another one.
        CheckpointError: its checkpoint can't be read.
    """
    check_start(start)
    weights, own = RunFolder(Path(start)).load()["weights"], stage.weights()
    shapes, given = ({name: x.shape for name, x in of.items()} for of in (own, weights))
    differs = [name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)]
    if differs:
        raise ConfigError(
            f"--start {start}: expected the weights of a model like this one, got others for {len(differs)} of its "
            f"{len(own)} tensors, {min(differs)} among them; give the mixers, layers, widths and norm of that run"
        )
    stage.load_weights(weights)


def _test(settings: Settings, stage: TaskStage, loop: Loop) -> Learned:
    """All that is said about a model that has learned."""
    rows = held_out(stage.task, settings.seed, settings.held_out)
    right_n, asked_n, loss_n = tested(stage.model, rows, settings.batch)
    counts = rows.targets[rows.targets != IGNORE].bincount()
    course = [
        (line["step"] - 1, line["seconds"] / 60, line["held_out"]) for line in loop.folder.lines() if "held_out" in line
    ]
    accuracy = accuracy_of(right_n, asked_n)
    return Learned(
        accuracy=accuracy,
        commonest=float(counts.max() / counts.sum()),
        loss=float(loss_n.sum() / asked_n.sum()),
        course=[*course, (loop.steps, loop.seconds / 60, accuracy.value)],
        steps=loop.steps,
        minutes=loop.seconds / 60,
        parameters=sum(p.numel() for p in stage.model.parameters()),
        rows=len(right_n),
    )
