"""A line that shows how training goes, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from subquad.train.loop import Progress


class Line:
    """A `Display` with a bar, loss, tokens/s and time left; where stderr is no terminal, a plain line now and then."""

    def __init__(self, every_seconds: float = 30.0) -> None:
        """`every_seconds` is between two plain lines."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True)
        self.every_seconds, self._last = every_seconds, -every_seconds
        text = "{task.fields[figures]}"
        self._bar: Any = Bar(TextColumn("{task.description}"), BarColumn(), TextColumn(text), console=self.console)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Show from the first figure on: a process that is told nothing shows nothing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""
        if self.console.is_terminal:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, progress: Progress) -> None:
        """Show `progress`."""
        figures = describe(progress)
        if not self.console.is_terminal:
            begins = progress.stage not in self._tasks
            if begins or progress.share >= 1 or progress.seconds - self._last >= self.every_seconds:
                self._tasks[progress.stage], self._last = None, progress.seconds
                self.say(f"{progress.stage:8} {progress.share:4.0%} {figures}")
            return
        self._bar.start()
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bar.add_task(progress.stage, total=1.0, figures="")
        self._bar.update(self._tasks[progress.stage], completed=progress.share, figures=figures)


def describe(progress: Progress) -> str:
    """Step, loss, pace, use of the device, cost and time left in words."""
    minutes, seconds = divmod(int(progress.seconds_left), 60)
    words = [f"step {progress.step:,}"]
    if progress.loss == progress.loss:
        words.append(f"loss {progress.loss:.4f}")
    words.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.mfu is not None:
        words.append(f"{progress.mfu:.0%} MFU")
    if progress.cost is not None:
        words.append(f"cost {progress.cost:.2f}")
    return "  ".join([*words, f"{minutes}:{seconds:02d} left"])
