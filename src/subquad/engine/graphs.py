"""Work that a device does over and over, on a GPU recorded once and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator

import torch

# Captures that may fail before work is no longer captured.
MOST_FAILURES = 3


class Graphs:
    """CUDA graphs by what tells their work from all other; what is recorded reads and writes buffers that never move.

    One is replayed at a time: all may use the same memory for what they forget.

    Args:
        captures: whether there are graphs; else all work is launched piece by piece.
        what: that is launched, for who is warned.
    """

    def __init__(self, captures: bool, what: str) -> None:
        self.captures, self.what = captures, what
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._failures = 0

    def __iter__(self) -> Iterator[Hashable]:
        """The keys of what is recorded."""
        return iter(self._graphs)

    def __len__(self) -> int:
        """How many graphs there are by now."""
        return len(self._graphs)

    def launch(self, key: Hashable, work: Callable[[], None]) -> bool:
        """Do `work`, which `key` tells from all other; as a graph from its second time on.

        Returns:
            Whether all of it had been done before, so that its time says what such work takes.
        """
        graph = self._graphs.get(key)
        steady = graph is not None or (not self.captures and key in self._seen)
        if graph is not None:
            graph.replay()
        elif not self.captures or key not in self._seen:
            # What is compiled at its first call, or asks the device then, must have done so before.
            self._seen.add(key)
            work()
        else:
            graph = torch.cuda.CUDAGraph()
            memory = next((other.pool() for other in self._graphs.values()), None)
            try:
                with torch.cuda.graph(graph, pool=memory):
                    work()
            except RuntimeError as error:
                # What was built during a capture breaks that one, and is there for the next.
                self._failures += 1
                if self._failures >= MOST_FAILURES:
                    warnings.warn(f"{self.what} are launched piece by piece, which is slower: {error}", stacklevel=4)
                    self.captures = False
                work()
            else:
                self._graphs[key] = graph
                graph.replay()
        return steady

    def forget(self) -> None:
        """Record all anew: buffers have been replaced."""
        self._graphs.clear()
        self._seen.clear()
