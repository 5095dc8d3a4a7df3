"""From an event loop to a thread and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def tell(loop: asyncio.AbstractEventLoop, what: Callable[..., Any], *args: Any) -> None:
    """Call `what` in a loop, unless nobody runs it any more."""
    try:
        loop.call_soon_threadsafe(what, *args)
    except RuntimeError:
        if not loop.is_closed():
            raise


class Chore(Generic[T]):
    """Work that a coroutine waits for while another thread does it; made in an event loop.

    Args:
        work: what is done, unless nobody waits any more.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work, self._loop = work, asyncio.get_running_loop()
        self.result: asyncio.Future[T] = self._loop.create_future()

    def do(self) -> None:
        """Do the work, in any thread."""
        if self.result.cancelled():
            return
        try:
            result = self._work()
        except Exception as error:
            self.give_up(error)
        else:
            tell(self._loop, self._settle, self.result.set_result, result)

    def give_up(self, error: Exception) -> None:
        """It fails without having been done."""
        tell(self._loop, self._settle, self.result.set_exception, error)

    def _settle(self, how: Callable[[Any], None], value: Any) -> None:
        if not self.result.done():
            how(value)
