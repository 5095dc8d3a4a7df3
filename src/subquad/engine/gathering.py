"""When those who wait are let into free slots: prompts are best read many at a time, and nobody waits for long."""

from __future__ import annotations


class Gathering:
    """Whether the prompts of those who wait are read now.

    On a GPU a read of a short prompt is more launches than work, so that several in one are cheaper, and all rows that
    decode stand still meanwhile. A slot that stays free while somebody waits for it costs as well. Once that has cost
    as much as the read will, it is made: whatever comes, at most twice of what the best choice in hindsight would have
    cost, as for who rents skis.

    Args:
        most: seconds for which a free slot waits at most; 0 lets everyone in at once.

    Attributes:
        read_seconds: of a read, as far as known.

    Example:
        >>> gathering = Gathering(0.05)
        >>> gathering.learn(0.004)
        >>> tuple(gathering.over(waiting=1, free=9, live=2, now=now) for now in (0.0, 0.006, 0.009, 0.01))
        (False, False, True, False)
        >>> gathering.over(waiting=1, free=9, live=0, now=0.011)
        True
    """

    def __init__(self, most: float) -> None:
        self.most, self.read_seconds = most, 0.0
        self._since: float | None = None
        self._now = 0.0
        self._free = self._lost = 0.0

    def learn(self, seconds: float) -> None:
        """A read took so long."""
        self.read_seconds += (seconds - self.read_seconds) / (4 if self.read_seconds else 1)

    def over(self, *, waiting: int, free: int, live: int, now: float) -> bool:
        """Whether to let them in; it then begins anew.

        Args:
            waiting, free, live: requests without a slot, slots without a request, and others.
            now: seconds of a clock.
        """
        wanted = min(waiting, free)
        if not wanted:
            self._since = None
            return False
        if self._since is None:
            self._since, self._lost = now, 0.0
        else:
            self._lost += self._free * (now - self._now)
        self._now, self._free = now, wanted
        if live and self._lost < live * self.read_seconds and now - self._since < self.most:
            return False
        self._since = None
        return True
