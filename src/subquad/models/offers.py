"""What layers of a stack hand to those above them in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from subquad.core.mixer import Mixer, Shared


class Offers:
    """What the layers of one pass offer, kept for those that read it; where none reads, nothing is kept.

    Args:
        mixers: of all layers, the lowest first.

    Raises:
        ConfigError: a layer needs what those below it do not offer; see `Mixer.sources`.
    """

    def __init__(self, mixers: Sequence[Mixer]) -> None:
        self._sources = [mixer.sources(mixers[:i]) for i, mixer in enumerate(mixers)]
        self._read = frozenset(chain.from_iterable(self._sources))
        self._of: dict[int, Shared] = {}

    def concern(self, i: int) -> bool:
        """Whether layer `i` reads what others offer, or is read itself."""
        return i in self._read or len(self._sources[i]) > 0

    def to(self, i: int) -> dict[str, Tensor]:
        """What layer `i` reads; names tell its sources apart, so that those of two layers never meet."""
        return {f"{k}.{name}": x for k, j in enumerate(self._sources[i]) for name, x in self._of[j].items()}

    def keep(self, i: int, offered: Shared) -> None:
        """Take what layer `i` offers, if another reads it."""
        if i in self._read:
            self._of[i] = offered
