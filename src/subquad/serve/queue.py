"""Who comes next: among clients, however many requests each has, and among the engines of a process."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What can wait: it belongs to a client."""

    @property
    def client(self) -> str:
        """Whose it is."""
        ...


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """The next is of the client with the fewest under way, among those the one whose last turn is longest ago.

    Within a client it is first come, first served. All operations cost at most the number of clients that wait.
    """

    def __init__(self) -> None:
        self._clients = OrderedDict[str, deque[T]]()
        self._n = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._n

    def push(self, item: T) -> None:
        """Behind all others of its client."""
        self._clients.setdefault(item.client, deque()).append(item)
        self._n += 1

    def push_first(self, item: T) -> None:
        """Before all others of its client."""
        self._clients.setdefault(item.client, deque()).appendleft(item)
        self._n += 1

    def peek(self, under_way: Mapping[str, int]) -> T | None:
        """The next, which stays; `under_way` counts what each client has elsewhere."""
        client = min(self._clients, key=lambda name: under_way.get(name, 0), default=None)
        return None if client is None else self._clients[client][0]

    def pop(self, under_way: Mapping[str, int]) -> T | None:
        """The next, which leaves."""
        item = self.peek(under_way)
        if item is not None:
            self.remove(item)
            if item.client in self._clients:
                self._clients.move_to_end(item.client)
        return item

    def remove(self, item: T) -> bool:
        """Take one out; False if it is not there."""
        mine = self._clients.get(item.client)
        if mine is None or item not in mine:
            return False
        mine.remove(item)
        self._n -= 1
        if not mine:
            del self._clients[item.client]
        return True

    def clear(self) -> list[T]:
        """Take out everything."""
        everything = [item for mine in self._clients.values() for item in mine]
        self._clients.clear()
        self._n = 0
        return everything


class Turns:
    """A lock that is given in the order in which it was asked for, so that no engine of a process starves another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._now = 0, 0

    @property
    def wanted(self) -> bool:
        """Whether someone waits for who has it."""
        return self._next - self._now > 1

    def __enter__(self) -> None:
        with self._changed:
            mine, self._next = self._next, self._next + 1
            while self._now != mine:
                self._changed.wait()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()
