"""Training of a model on a task, in the loop of all training, and what it has learned in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError, UnsupportedError
from subquad.core.state import precise
from subquad.evals.learning.batches import Batches
from subquad.evals.learning.model import Learner
from subquad.evals.learning.task import IGNORE, Batch, Task
from subquad.evals.stats import Interval, bootstrap_ratio, wilson
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import FIRST_STEPS, Budget, Display, Habits, Loop, Stage
from subquad.train.optimiser import Rate, slow
from subquad.train.precision import autocast
from subquad.train.recorded import Recorded

# Held-out rows that are looked at on the way, and how often, in steps.
PROBE_ROWS, PROBE_STEPS = 256, 100
# Columns that recorded steps have are a multiple of this, which transforms and tiles like.
WIDTH = 64


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes:
        task: its name.
        sizes: its config.
        layers: of the model.
        d_model: its width.
        d_mlp: of its SwiGLUs; 0 is none, None is two times `d_model`.
        batch: rows of a step.
        lr: peak learning rate.
        weight_decay: of matrices.
        rows: that there are to train on; None draws new ones for every step.
        steps, minutes: when it ends, by what comes first; with minutes alone the rate follows the clock, and no two
            runs are the same.
        held_out: rows that are tested in the end, or all where there are fewer.
        seed: of the model and of all batches.
    """

    task: str
    sizes: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    d_model: int = 64
    d_mlp: int | None = None
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.0
    rows: int | None = None
    steps: int | None = None
    minutes: float | None = None
    held_out: int = 1000
    seed: int = 0

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
        """The learning rate's course, which refuses what is none."""
        return Rate(self.lr, weight_decay=self.weight_decay)


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


class TaskStage(Stage):
    """Minimise the cross-entropy of a task's answers; now and then, look at held-out rows.

    Args:
        task: what is learned.
        model: trained in place.
        batches: by step.
        say: told in a line what is settled on the way.
    """

    name = "learn"

    def __init__(self, task: Task, model: Learner, batches: Batches, say: Callable[[str], None] | None = None) -> None:
        self.task, self.model, self.batches, self.say = task, model, batches, say
        self.device = next(model.parameters()).device
        self.tokens_per_step = batches.rows * task.length
        self.new, self.old = list(model.parameters()), list[nn.Parameter]()
        self.clipped: Sequence[Sequence[nn.Parameter]] = [self.new]
        self.most = slow(model)
        self._at, self._rows = 0, batches.rows
        # In the first steps it turns out how many rows fit into memory.
        self._plain: int | float = FIRST_STEPS if self.device.type == "cuda" else math.inf
        self._recorded: Recorded | None = None
        self._padded = False
        self._probe = held_out(task, batches.seed, PROBE_ROWS)

    def step(self) -> dict[str, Tensor]:
        """One batch, some rows at a time."""
        figures: dict[str, Tensor] = {}
        if self._at % PROBE_STEPS == 0:
            right_n, asked_n, _ = tested(self.model, self._probe, self._rows)
            figures["held_out"] = right_n.sum() / asked_n.sum()
        batch = self.batches(self._at)
        self._at += 1
        self._plain -= 1
        loss, accuracy = self._replay(batch) if self._plain < 0 and self._rows >= len(batch) else self._by_parts(batch)
        return {"loss": loss, "accuracy": accuracy, **figures}

    def _by_parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of a batch, and its gradients, as many rows at a time as fit."""
        count = (batch.targets != IGNORE).sum().to(self.device)
        parts = (batch.rows(start, start + self._rows).to(self.device) for start in range(0, len(batch), self._rows))
        losses, rights = zip(*(self._part(part, count) for part in parts), strict=True)
        return torch.stack(losses).sum(), torch.stack(rights).sum()

    def _part(self, part: Batch, count: Tensor) -> tuple[Tensor, Tensor]:
        """What some rows add to loss and accuracy of a batch with `count` answers, and to the gradients."""
        loss_n, right_n = answers(self.model(part), part.targets)
        share = loss_n.sum() / count
        share.backward()  # pyright: ignore[reportUnknownMemberType]
        return share.detach(), right_n.sum() / count

    def _replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`_by_parts` of a whole batch with the launches of a recorded step, where the step can be recorded."""
        padded = batch.is_padded or batch.inputs.shape[1] < self.task.length
        if self._recorded is None:
            self._padded = padded
        if padded and not self._padded:
            return self._by_parts(batch)
        if self._padded:
            batch = batch.widened(-(-self.task.length // WIDTH) * WIDTH)
        # Of locked memory copies wait for no earlier step.
        inputs = [x.pin_memory() for x in (batch.inputs, batch.targets, batch.lengths_b)]

        def run(inputs: Tensor, targets: Tensor, lengths_b: Tensor) -> tuple[Tensor, Tensor]:
            # A weight that was cast before would stay as it is for ever.
            with autocast(self.device, keep_casts=False):
                return self._part(Batch(inputs, targets, lengths_b, padded), (targets != IGNORE).sum())

        if self._recorded is None:
            try:
                self._recorded = Recorded(run, [x.to(self.device) for x in inputs], self.new)
            except UnsupportedError as error:
                self._plain = math.inf
                if self.say is not None:
                    self.say(f"steps are launched kernel by kernel: {error}")
                return self._by_parts(batch)
        loss, accuracy = self._recorded(*inputs)
        return loss, accuracy

    def fewer_rows(self) -> int | None:
        """Half as many rows at once from now on; None where it is one already."""
        if self._rows == 1:
            return None
        self._rows //= 2
        return self._rows

    def weights(self) -> dict[str, Tensor]:
        """The model's."""
        return self.model.state_dict()

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""
        self.model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Any]:
        """The next step."""
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set it."""
        self._at = state["at"]


def answers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every answer in nats, 0 where none is asked for, and whether it is right."""
    loss = F.cross_entropy(
        logits.flatten(0, -2).to(precise(logits.dtype)), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return loss.view_as(targets), (logits.argmax(-1) == targets) & (targets != IGNORE)


@torch.no_grad()
def tested(model: Learner, batch: Batch, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right answers, answers asked for, and summed cross-entropy of each row.

    Args:
        model: as it is.
        batch: on any device.
        rows: at once.
    """
    device = next(model.parameters()).device
    found: list[list[Tensor]] = []
    for start in range(0, len(batch), rows):
        part = batch.rows(start, start + rows).to(device)
        with autocast(device):
            loss, right = answers(model(part), part.targets)
        sums = (x.view(len(part), -1).sum(1) for x in (right, part.targets != IGNORE, loss))
        found.append([x.cpu() for x in sums])
    right_n, asked_n, loss_n = (torch.cat(x) for x in zip(*found, strict=True))
    return right_n, asked_n, loss_n


def held_out(task: Task, seed: int, rows: int) -> Batch:
    """So many rows of the test, or all that there are."""
    return task.batch("test", seed, 0, rows if task.held_out is None else min(rows, task.held_out))


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

    Raises:
        ConfigError: as in `check_folder`.
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
    model = Learner(task, settings.layers, settings.d_model, settings.d_mlp).to(device)
    batches = Batches(task, settings.seed, settings.batch, workers, settings.rows, say)
    stage = TaskStage(task, model, batches, say)
    tokens = None if settings.steps is None else settings.steps * stage.tokens_per_step
    budget = Budget(tokens, settings.minutes)
    loop = Loop(stage, budget, settings.rate(), folder, habits=habits, display=display, say=say)
    folder.note(settings=config_to_dict(settings))
    if folder.checkpoint.exists():
        checkpoint = folder.load()
        folder.rewind([stage.name], stage.name, checkpoint["step"])
        loop.resume(checkpoint)
    try:
        loop.run()
    finally:
        batches.close()
    learned = _test(settings, stage, loop)
    folder.note(learned=asdict(learned))
    return learned


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
