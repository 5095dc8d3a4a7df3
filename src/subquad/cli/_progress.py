"""Tables on stdout; on stderr how far a measurement is: share, rate and time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


def stdout() -> Any:
    """A rich console on stdout, wide where it is piped, so that no table loses a figure."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


class Bars:
    """A bar for each piece of work; where stderr is no terminal, a plain line now and then.

    ``with Bars() as bars: perplexity(..., progress=bars.start("teacher", "tokens"))``
    """

    def __init__(self, every_seconds: float = 20.0) -> None:
        """`every_seconds` is between two plain lines."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = Console(stderr=True)
        self.every_seconds = every_seconds
        figures = TextColumn("{task.fields[figures]}")
        self._bar: Any = Progress(
            TextColumn("{task.description}"), BarColumn(), figures, console=self.console, transient=True
        )

    def __enter__(self) -> Self:
        """Start showing."""
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        if self.console.is_terminal:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def start(self, name: str, unit: str) -> _Bar:
        """Begin a piece of work; call the result with what is done and what there is in all."""
        return _Bar(self, name, unit)


class _Bar:
    def __init__(self, bars: Bars, name: str, unit: str) -> None:
        self.bars, self.name, self.unit = bars, name, unit
        self.began = self.shown = time.monotonic()
        shown = bars.console.is_terminal
        self.task = bars._bar.add_task(name, total=1.0, figures="") if shown else None  # pyright: ignore[reportPrivateUsage]

    def __call__(self, done: int, total: int) -> None:
        """Show the state."""
        now = time.monotonic()
        rate = done / max(now - self.began, 1e-9)
        minutes, seconds = divmod(round((total - done) / rate), 60)
        figures = f"{done:,} of {total:,} {self.unit}, {rate:,.0f} a second, {minutes}:{seconds:02d} left"
        if self.task is not None:
            self.bars._bar.update(self.task, completed=done / total, figures=figures)  # pyright: ignore[reportPrivateUsage]
        elif done == total or now - self.shown >= self.bars.every_seconds:
            self.shown = now
            self.bars.say(f"{self.name}: {figures}")
