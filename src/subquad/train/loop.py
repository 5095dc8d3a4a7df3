"""The loop that every stage runs in: budget, rate, clipping, log, checkpoints, interruption, divergence."""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.core.errors import ConfigError, DivergenceError, SubquadError
from subquad.train.checkpoint import RunFolder
from subquad.train.optimiser import Rate, adamw, set_rate
from subquad.train.precision import autocast, matmul_precision


class StoppedError(SubquadError):
    """The run was asked to stop, and stopped after saving."""


@dataclass(frozen=True)
class Budget:
    """When a stage ends: by tokens trained on (every pass counts), by minutes, or by what comes first."""

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        """Refuse a stage without an end."""
        if self.tokens is None and self.minutes is None:
            raise ConfigError("budget: expected tokens or minutes, got neither; give the stage an end")
        for name, value in (("tokens", self.tokens), ("minutes", self.minutes)):
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"budget: expected {name} from 0, got {value}; 0 is no training")

    def progress(self, tokens: int, seconds: float) -> float:
        """Share of the budget that is used; 1 or more is the end."""
        shares = [0.0]
        if self.tokens is not None:
            shares.append(tokens / self.tokens if self.tokens else 1.0)
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes) if self.minutes else 1.0)
        return max(shares)


class Stage(ABC):
    """What is trained on what: one step at a time, resumable.

    Attributes:
        name: in logs and checkpoints.
        tokens_per_step: tokens that a step trains on.
        device: where it runs.
        new, old: parameters at the full and at the lower rate.
        clipped: sets of parameters whose gradients are clipped apart.
    """

    name: str
    tokens_per_step: int
    device: torch.device
    new: list[nn.Parameter]
    old: list[nn.Parameter]
    clipped: Sequence[Sequence[nn.Parameter]]

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """Add one batch's gradients; return detached figures on the device: ``loss``, and vectors per layer."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Every tensor that makes the student another one than it was before this stage."""

    @abstractmethod
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` back."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the stage stands in its data."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where `state_dict` was taken."""


@dataclass(frozen=True)
class Progress:
    """What a display is told after every log: `share` of the stage's budget is done, at `loss`."""

    stage: str
    step: int
    tokens: int
    seconds: float
    share: float
    loss: float
    tokens_per_second: float

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return self.seconds * (1 - self.share) / self.share if self.share else math.inf


Display = Callable[[Progress], None]


@dataclass(frozen=True)
class Habits:
    """How often things happen.

    Attributes:
        save_minutes: between checkpoints.
        save_steps: between checkpoints, when set, whatever the time.
        log_steps: between reads of the device's figures; on a GPU every read waits for it.
    """

    save_minutes: float = 5.0
    save_steps: int | None = None
    log_steps: int = 1


class Loop:
    """Runs one stage to the end of its budget, from its start or from a checkpoint."""

    def __init__(
        self,
        stage: Stage,
        budget: Budget,
        rate: Rate,
        folder: RunFolder,
        *,
        habits: Habits | None = None,
        display: Display | None = None,
    ) -> None:
        self.stage, self.budget, self.rate, self.folder = stage, budget, rate, folder
        self.habits, self.display = habits or Habits(), display
        self.optimiser = adamw(stage.new, stage.old, rate, device=stage.device)
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self._saved = 0
        self._held: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go where `checkpoint`, one of this stage, was written."""
        self.stage.load_weights(checkpoint["weights"])
        self.stage.load_state_dict(checkpoint["stage_state"])
        self.optimiser.load_state_dict(checkpoint["optimiser"])
        self.steps, self.tokens, self.seconds = checkpoint["step"], checkpoint["tokens"], checkpoint["seconds"]
        self._saved = self.steps

    def run(self) -> None:
        """Train until the budget is used.

        Raises:
            DivergenceError: a loss or gradient was not finite; the last good checkpoint stays.
            StoppedError: a signal asked to stop; the step was finished and saved.
        """
        began = time.monotonic() - self.seconds
        saved_at = time.monotonic()
        if self.steps == 0:
            self.save()
        with matmul_precision(self.stage.device), _stop_signals() as stop:
            while self.budget.progress(self.tokens, self.seconds) < 1:
                self.step()
                self.seconds = time.monotonic() - began
                if self.steps % self.habits.log_steps == 0:
                    self._flush()
                due = self.habits.save_steps is not None and self.steps % self.habits.save_steps == 0
                if stop.is_set():
                    self.save()
                    raise StoppedError(
                        f"stopped after step {self.steps} of stage {self.stage.name}, saved in {self.folder.path}; "
                        "give the same command with --resume to go on"
                    )
                if due or time.monotonic() - saved_at > 60 * self.habits.save_minutes:
                    self.save()
                    saved_at = time.monotonic()
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless what led here was not finite."""
        self._flush()
        self.folder.save(
            {
                "stage": self.stage.name,
                "step": self.steps,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "weights": self.stage.weights(),
                "stage_state": self.stage.state_dict(),
                "optimiser": self.optimiser.state_dict(),
            }
        )
        self._saved = self.steps

    def step(self) -> None:
        """One step of the stage and of the optimiser; nothing here waits for the device."""
        rate = self.rate.factor(self.budget.progress(self.tokens + self.stage.tokens_per_step, self.seconds))
        set_rate(self.optimiser, rate)
        with autocast(self.stage.device):
            figures = self.stage.step()
        norms = [nn.utils.clip_grad_norm_(p, self.rate.clip) for p in self.stage.clipped]
        figures["gradient"] = torch.stack(norms).norm()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += self.stage.tokens_per_step
        line = {"stage": self.stage.name, "step": self.steps, "tokens": self.tokens, "lr": self.rate.lr * rate}
        self._held.append((line, figures))

    def _flush(self) -> None:
        """Read the figures held on the device, look at them, log them."""
        if not self._held:
            return
        lines: list[dict[str, Any]] = []
        for line, figures in self._held:
            values: dict[str, Any] = {name: x.tolist() for name, x in figures.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient"])):
                self.folder.append(lines)
                raise DivergenceError(
                    f"stage {self.stage.name}, step {line['step']}: expected a finite loss and gradient, got "
                    f"{values['loss']} and {values['gradient']}; the checkpoint of step {self._saved} is kept in "
                    f"{self.folder.path}; start anew in another folder with a lower rate"
                )
            lines.append(line | values | {"seconds": round(self.seconds, 3)})
        self.folder.append(lines)
        self._held.clear()
        if self.display is not None:
            share = min(self.budget.progress(self.tokens, self.seconds), 1.0)
            pace = self.tokens / max(self.seconds, 1e-9)
            loss = lines[-1]["loss"]
            self.display(Progress(self.stage.name, self.steps, self.tokens, self.seconds, share, loss, pace))


@contextmanager
def _stop_signals() -> Generator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that a step is never torn; a second signal acts as before."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for s in before:
        signal.signal(s, ask)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
