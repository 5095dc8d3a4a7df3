"""The loop that every stage runs in: budget, rate, clipping, log, checkpoints, interruption, divergence."""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from subquad.core.errors import ConfigError, DivergenceError, SubquadError
from subquad.models.flops import peak_flops
from subquad.train.checkpoint import RunFolder
from subquad.train.optimiser import Rate, adamw, set_rate
from subquad.train.parallel import Processes, clip_, gathered, scattered_like, scattered_moments
from subquad.train.precision import autocast, matmul_precision

# Steps after a start or a resume in which it turns out whether they fit into memory.
FIRST_STEPS = 3
# Seconds of a save above which the next ones are written while training goes on.
LONG_SAVE = 5.0
# Saves take at most one part in so many of the time, whatever was asked for.
SAVE_SHARE = 20


class StoppedError(SubquadError):
    """The run was asked to stop, and stopped after saving.

    Attributes:
        exit_code: by which a scheduler tells a run to start again from a failed one (``EX_TEMPFAIL`` of sysexits.h).
    """

    exit_code = 75


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

    With several processes each one's stage takes its rows of every batch (`Processes.parts`), and its gradients and
    figures are its share of the whole batch's, so that the sum over processes is the batch's.

    Attributes:
        name: in logs and checkpoints.
        tokens_per_step: tokens that a step trains on.
        device: where it runs.
        new, old: parameters at the full and at the lower rate.
        clipped: sets of parameters whose gradients are clipped apart.
        most: of some parameters the highest rate that they bear.
    """

    name: str
    tokens_per_step: int
    device: torch.device
    new: list[nn.Parameter]
    old: list[nn.Parameter]
    clipped: Sequence[Sequence[nn.Parameter]]
    most: Mapping[nn.Parameter, float] = MappingProxyType({})

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """Add one batch's gradients; return detached figures on the device: ``loss``, and vectors per layer."""

    def fewer_rows(self) -> int | None:
        """Run half as many rows of a batch at once from now on, and say how many; None where it can't be fewer."""
        return None

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
    """What a display is told after every log: `share` of the stage's budget is done, at `loss`.

    Attributes:
        mfu: share of the devices' peak that the model's own arithmetic takes, since the last log; None where unknown.
        cost: of the run so far, in the currency of its price; None without one.
    """

    stage: str
    step: int
    tokens: int
    seconds: float
    share: float
    loss: float
    tokens_per_second: float
    mfu: float | None = None
    cost: float | None = None

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return self.seconds * (1 - self.share) / self.share if self.share else math.inf


Display = Callable[[Progress], None]


@dataclass(frozen=True)
class Habits:
    """How often things happen, and what their time costs.

    Attributes:
        save_minutes: between checkpoints, or longer where saving takes long.
        save_steps: between checkpoints, when set, whatever the time.
        log_steps: between reads of the device's figures; on a GPU every read waits for it.
        price_per_hour: of the machines together, for the cost in log and display.
    """

    save_minutes: float = 5.0
    save_steps: int | None = None
    log_steps: int = 1
    price_per_hour: float | None = None


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
        say: Callable[[str], None] | None = None,
        processes: Processes | None = None,
        flops_per_token: float | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Train `stage`.

        Args:
            stage: what is trained.
            budget: when it ends.
            rate: learning rate and clipping.
            folder: takes log and checkpoints, from the first process alone.
            habits: how often to log and save.
            display: told about the progress.
            say: told in a line what is settled on the way.
            processes: that train together; None is this one alone.
            flops_per_token: of the stage's arithmetic, for its share of the device's peak.
            beside: what every checkpoint holds besides, by name.
        """
        self.stage, self.budget, self.rate, self.folder = stage, budget, rate, folder
        self.habits, self.display, self.say = habits or Habits(), display, say
        self.processes = processes or Processes(stage.device)
        self.optimiser = adamw(stage.new, stage.old, rate, device=stage.device, most=stage.most)
        self._sharded = any(isinstance(p, DTensor) for p in (*stage.new, *stage.old))
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.flops_per_token = flops_per_token
        self._peak = peak_flops(stage.device) * self.processes.world if flops_per_token else None
        self._beside = dict(beside or {})
        # The first process alone writes there, and perhaps at this moment.
        earlier = folder.spent() if self.processes.main else {}
        self._earlier_seconds = sum(seconds for name, (_, seconds) in earlier.items() if name != stage.name)
        self._saved, self._save_seconds, self._logged = 0, 0.0, (0, 0.0)
        self._trying = 0
        self._held: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Go where `checkpoint`, one of this stage, was written, by any number of processes."""
        now, then = self.stage.weights(), checkpoint["weights"]
        self.stage.load_weights({k: scattered_like(x, now[k]) if k in now else x for k, x in then.items()})
        self.stage.load_state_dict(checkpoint["stage_state"])
        self.optimiser.load_state_dict(scattered_moments(checkpoint["optimiser"], self.optimiser))
        self.steps, self.tokens, self.seconds = checkpoint["step"], checkpoint["tokens"], checkpoint["seconds"]
        self._saved, self._logged = self.steps, (self.tokens, self.seconds)

    def run(self) -> None:
        """Train until the budget is used.

        Raises:
            DivergenceError: a loss or gradient was not finite; the last good checkpoint stays.
            StoppedError: a signal asked to stop; the step was finished and saved.
            ConfigError: not even one sequence at a time fits into the device's memory.
        """
        began = time.monotonic() - self.seconds
        self.processes.same_(self.stage.weights().values())
        self._trying = FIRST_STEPS
        if self.steps == 0:
            self.save()
        saved_at = time.monotonic()
        try:
            with matmul_precision(self.stage.device), _stop_signals() as stop:
                while self.budget.progress(self.tokens, self.seconds) < 1:
                    self.step()
                    apart = max(60 * self.habits.save_minutes, SAVE_SHARE * self._save_seconds)
                    self.seconds, due, stopped = self.processes.agree(
                        time.monotonic() - began, time.monotonic() - saved_at > apart, stop.is_set()
                    )
                    if self.steps % self.habits.log_steps == 0:
                        self._flush()
                    if stopped:
                        self.save()
                        raise StoppedError(
                            f"stopped after step {self.steps} of stage {self.stage.name}, saved in {self.folder.path}; "
                            "give the same command with --resume to go on"
                        )
                    if due or (self.habits.save_steps is not None and self.steps % self.habits.save_steps == 0):
                        self.save(later=self._save_seconds > LONG_SAVE)
                        saved_at = time.monotonic()
                self.save()
        finally:
            self.folder.settle()

    def save(self, *, later: bool = False) -> None:
        """Write a checkpoint, unless what led here was not finite.

        Args:
            later: while training goes on, from a copy in the host's memory.
        """
        self._flush()
        began = time.monotonic()
        content = gathered(
            {
                "stage": self.stage.name,
                "step": self.steps,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "weights": self.stage.weights(),
                "stage_state": self.stage.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                **self._beside,
            },
            keep=self.processes.main,
        )
        if not later:
            # The others wait for the disk too: whoever ends before it is done may have the first one ended.
            self.processes.first(lambda: self.folder.save(content))
            self._save_seconds = time.monotonic() - began
        elif self.processes.main:
            self.folder.save(content, later=True)
        self._saved = self.steps

    def step(self) -> None:
        """One step of the stage and of the optimiser; nothing here waits for the device."""
        rate = self.rate.factor(self.budget.progress(self.tokens + self.stage.tokens_per_step, self.seconds))
        set_rate(self.optimiser, rate)
        figures = self._gradients()
        self.processes.sum_gradients_(p for group in self.optimiser.param_groups for p in group["params"])
        figures["gradient"] = torch.stack([clip_(p, self.rate.clip) for p in self.stage.clipped]).norm()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += self.stage.tokens_per_step
        line = {"stage": self.stage.name, "step": self.steps, "tokens": self.tokens, "lr": self.rate.lr * rate}
        self._held.append((line, figures))

    def _gradients(self) -> dict[str, Tensor]:
        """The stage's step; in the first ones, with fewer rows at a time until it fits into memory."""
        if not self._trying:
            with autocast(self.stage.device, keep_casts=not self._sharded):
                return self.stage.step()
        self._trying -= 1
        before = self.stage.state_dict()
        while True:
            try:
                with autocast(self.stage.device, keep_casts=not self._sharded):
                    return self.stage.step()
            except torch.OutOfMemoryError as error:
                # In the middle of an exchange the others would wait for ever.
                rows = self.stage.fewer_rows() if self.processes.world == 1 else None
                if rows is None:
                    raise ConfigError(
                        f"stage {self.stage.name}: expected a step to fit into the memory of {self.stage.device}, "
                        f"got {str(error).splitlines()[0]}; give fewer --rows or a shorter --seq, or --recompute"
                    ) from error
            # Only now has the error let go of the tensors it met.
            self.optimiser.zero_grad(set_to_none=True)
            if self.stage.device.type == "cuda":
                torch.cuda.empty_cache()
            self.stage.load_state_dict(before)
            if self.say is not None:
                self.say(f"out of memory: stage {self.stage.name} goes on with {rows} rows of a batch at a time")

    def _flush(self) -> None:
        """Read the figures held on the device, look at them, log them."""
        if not self._held:
            return
        lines: list[dict[str, Any]] = []
        pace, mfu, cost = self._rates()
        rates = {"tokens_per_second": round(pace, 1), "mfu": mfu and round(mfu, 4), "cost": cost and round(cost, 4)}
        for (line, _), values in zip(self._held, self._read(), strict=True):
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient"])):
                self._append(lines)
                raise DivergenceError(
                    f"stage {self.stage.name}, step {line['step']}: expected a finite loss and gradient, got "
                    f"{values['loss']} and {values['gradient']}; the checkpoint of step {self._saved} is kept in "
                    f"{self.folder.path}; start anew in another folder with a lower rate"
                )
            lines.append(line | values | {"seconds": round(self.seconds, 3)})
        lines[-1] |= {k: v for k, v in rates.items() if v is not None}
        self._append(lines)
        self._held.clear()
        self._logged = (self.tokens, self.seconds)
        if self.display is not None and self.processes.main:
            share = min(self.budget.progress(self.tokens, self.seconds), 1.0)
            loss = lines[-1]["loss"]
            self.display(Progress(self.stage.name, self.steps, self.tokens, self.seconds, share, loss, pace, mfu, cost))

    def _read(self) -> list[dict[str, Any]]:
        """The figures held, as numbers; the processes' shares are summed here at once, and not in every step."""
        figures = [figures for _, figures in self._held]
        if self.processes.world > 1:
            shares = [(f, name) for f in figures for name in f if name != "gradient"]
            flat_n = torch.cat([f[name].flatten() for f, name in shares])
            summed = self.processes.sum(flat_n).split([f[name].numel() for f, name in shares])
            for (f, name), x in zip(shares, summed, strict=True):
                f[name] = x.view_as(f[name])
        return [{name: x.tolist() for name, x in f.items()} for f in figures]

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self.processes.main:
            self.folder.append(lines)

    def _rates(self) -> tuple[float, float | None, float | None]:
        """Tokens a second and share of the peak since the last log, and the cost of the run so far."""
        tokens, seconds = self._logged
        pace = (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)
        mfu = None if self._peak is None or self.flops_per_token is None else pace * self.flops_per_token / self._peak
        price = self.habits.price_per_hour
        return pace, mfu, None if price is None else price * (self._earlier_seconds + self.seconds) / 3600


@contextmanager
def stopping_at_once(folder: Path) -> Generator[None]:
    """Let SIGINT and SIGTERM end what is done before and after the training; a `Loop` finishes its step first.

    Args:
        folder: that a later call goes on in.

    Raises:
        StoppedError: at a signal.
    """

    def stop() -> None:
        raise StoppedError(f"stopped, with what is done in {folder}; give the same command with --resume to go on")

    with _on_signal(stop):
        yield


@contextmanager
def _stop_signals() -> Generator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that a step is never torn."""
    stop = threading.Event()
    with _on_signal(stop.set):
        yield stop


@contextmanager
def _on_signal(act: Callable[[], None]) -> Generator[None]:
    """Call `act` at SIGINT or SIGTERM; a second signal acts as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        act()

    for s in before:
        signal.signal(s, ask)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
