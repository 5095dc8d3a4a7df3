"""States of prompts' beginnings, kept for later prompts that begin alike."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from subquad.core.errors import ConfigError
from subquad.core.packed import Packed
from subquad.models.stack import Stack, StackState


@dataclass(frozen=True)
class Prefix:
    """A state of one row that has read `tokens` tokens."""

    tokens: int
    packed: Packed

    @property
    def state(self) -> StackState:
        """It, in the memory of the cache."""
        return self.packed.state()


class PrefixCache:
    """Snapshots at multiples of `block` tokens: exact, counted in bytes, the longest unused given up first.

    A recurrent state can't be cut back to an earlier token, so only where one was kept can a later prompt go on. One is
    kept at the last whole block of each prompt, and where a prompt parts from what earlier ones began with
    (arXiv 2411.19379): a shared beginning is read twice, and never again.

    Args:
        nbytes: most bytes of all snapshots together.
        block: tokens of a block.
    """

    def __init__(self, nbytes: int, *, block: int = 64) -> None:
        if nbytes < 1 or block < 1:
            raise ConfigError(f"prefix cache: expected bytes and block of at least 1, got {nbytes} and {block}")
        self.most, self.block = nbytes, block
        self.hits, self.misses, self.tokens_saved = 0, 0, 0
        self._kept = OrderedDict[bytes, Prefix]()
        self._bytes = 0
        self._model: Stack | None = None
        # Beginnings that some prompt had, without their states.
        self._met = OrderedDict[bytes, None]()

    def bind(self, model: Stack) -> None:
        """Keep states of `model` only; called by each engine that takes this cache.

        Raises:
            ConfigError: it keeps those of another model.
        """
        if self._model is not None and self._model is not model:
            raise ConfigError("prefix cache: expected the model whose states it keeps, got another; make one for each")
        self._model = model

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return self._bytes

    def __len__(self) -> int:
        """Number of snapshots."""
        return len(self._kept)

    def find(self, tokens: Sequence[int]) -> Prefix | None:
        """The longest beginning of `tokens` that is kept."""
        for key in reversed(self._keys(tokens)):
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits, self.tokens_saved = self.hits + 1, self.tokens_saved + self._kept[key].tokens
                return self._kept[key]
        self.misses += 1
        return None

    def marks(self, tokens: Sequence[int]) -> list[int]:
        """Numbers of tokens, ascending, after which a prompt's state is worth keeping; it is then known here."""
        keys = self._keys(tokens)
        shared = next((i for i, key in enumerate(keys) if key not in self._met), len(keys))
        for key in keys:
            self._met[key] = None
            self._met.move_to_end(key)
        while len(self._met) > 1 << 16:
            self._met.popitem(last=False)
        wanted = {i * self.block for i in (shared, len(keys)) if i > 0 and keys[i - 1] not in self._kept}
        return sorted(wanted)

    def keep(self, tokens: Sequence[int], state: Packed) -> None:
        """Take over the `state` of one row that has read `tokens`; what no longer fits goes, itself if need be.

        Raises:
            ConfigError: tokens that are no whole blocks.
        """
        if not tokens or len(tokens) % self.block:
            raise ConfigError(
                f"prefix cache: expected whole blocks of {self.block} tokens, got {len(tokens)} tokens; cut them there"
            )
        key = self._keys(tokens)[-1]
        if key in self._kept or state.nbytes > self.most:
            return
        while self._bytes + state.nbytes > self.most:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.packed.nbytes
        self._kept[key] = Prefix(len(tokens), state)
        self._bytes += state.nbytes

    def clear(self) -> None:
        """Give up everything."""
        self._kept.clear()
        self._met.clear()
        self._bytes = 0

    def _keys(self, tokens: Sequence[int]) -> list[bytes]:
        """A digest of each whole block and all before it."""
        keys, digest = list[bytes](), hashlib.blake2b(digest_size=16)
        for stop in range(self.block, len(tokens) + 1, self.block):
            digest.update(array("q", tokens[stop - self.block : stop]).tobytes())
            keys.append(digest.copy().digest())
        return keys
