"""Which tokens may come next in rows that a grammar constrains: worked out by the host, applied on the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subquad.engine.draft import Draft

# In place of a token where logits are finite and yet every token is forbidden; -1 is where they are not.
EXHAUSTED = -2
# Rows whose masks are worked out at the same time.
THREADS = min(8, os.cpu_count() or 1)


class Matcher(Protocol):
    """Where one row stands in its grammar. It knows no end tokens: a row's own are allowed where it `may_end`."""

    @property
    def may_end(self) -> bool:
        """Whether the text so far is one of the grammar's."""
        ...

    @property
    def must_end(self) -> bool:
        """Whether it is, and nothing can follow."""
        ...

    def fill(self, mask_w: NDArray[np.int32]) -> None:
        """Write which tokens may come next: token i is bit ``i % 32`` of word ``i // 32``. May be none."""
        ...

    def advance(self, token: int) -> None:
        """Go on with a token that may come next."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that spell the only text that can follow, as far as there is one; good guesses, and no more."""
        ...

    def copy(self) -> Self:
        """One that stands at the same place, and goes on by itself."""
        ...


class Constraint(Protocol):
    """What a request's text must be, such as `subquad.engine.grammar.Grammar`; rows share it."""

    def start(self) -> Matcher:
        """Of a row that has no text yet."""
        ...


class Rule:
    """The matcher of one row with the tokens that end it.

    Args:
        matcher: of the row.
        ends: token ids.
        vocab_size: v, of the model.
    """

    def __init__(self, matcher: Matcher, ends: Collection[int], vocab_size: int) -> None:
        self.matcher, self.ends = matcher, {token for token in ends if token < vocab_size}

    def push(self, token: int) -> bool:
        """Take in a token that came; whether the row ends with it, since nothing can follow."""
        self.matcher.advance(token)
        return self.matcher.must_end

    def walk(self, guesses: Sequence[int], masks_tw: NDArray[np.int32], *, forces: bool) -> list[int]:
        """Write the masks behind the row's last token and behind each guess, up to the first that is forbidden.

        Args:
            guesses: one chain.
            masks_tw: where to write; what no token can reach is left as it is.
            forces: go on with tokens that the grammar forces where the guesses end, or the first is forbidden.

        Returns:
            The guesses that may come, no more than there is room for.
        """
        matcher, coming, taken = self.matcher.copy(), deque(guesses), list[int]()
        while True:
            mask_w = masks_tw[len(taken)]
            self._fill(matcher, mask_w)
            if len(taken) + 1 == len(masks_tw):
                return taken
            if forces and not (coming and _allows(mask_w, coming[0])):
                coming, forces = deque(matcher.forced()), False
            if not coming or not _allows(mask_w, coming[0]):
                return taken
            taken.append(coming.popleft())
            if taken[-1] in self.ends:
                # What comes behind an end is read by nobody.
                return taken
            matcher.advance(taken[-1])

    def _fill(self, matcher: Matcher, mask_w: NDArray[np.int32]) -> None:
        matcher.fill(mask_w)
        bits_w, may_end = mask_w.view(np.uint32), matcher.may_end
        for token in self.ends:
            word, bit = token // 32, np.uint32(1 << token % 32)
            bits_w[word] = bits_w[word] | bit if may_end else bits_w[word] & ~bit


def _allows(mask_w: NDArray[np.int32], token: int) -> bool:
    return bool(int(mask_w[token // 32]) >> token % 32 & 1)


class Masks:
    """The rules of an engine's slots, and fixed buffers for masks and for the guesses that they belong to.

    Nothing is allocated before the first rule.

    Args:
        rows: slots.
        block: most tokens that a round reads of a slot.
        vocab_size: v.
        device: of the model.
    """

    def __init__(self, rows: int, block: int, vocab_size: int, device: torch.device) -> None:
        self.rows, self.block, self.vocab_size, self.device = rows, block, vocab_size, device
        self.rules: list[Rule | None] = [None] * rows
        # Of each number of chains.
        self._rooms: dict[int, _Room] = {}
        self._threads: ThreadPoolExecutor | None = None

    @property
    def on(self) -> bool:
        """Whether some slot has a rule."""
        return any(rule is not None for rule in self.rules)

    def put(self, slots: Sequence[int], rules: Sequence[Rule | None]) -> None:
        """From now on `slots` follow `rules`, None being none."""
        for slot, rule in zip(slots, rules, strict=True):
            self.rules[slot] = rule

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """The rules of the slots `sources` go to `targets`."""
        self.put([*targets, *sources], [*(self.rules[slot] for slot in sources), *[None] * len(sources)])

    def none(self, n: int) -> Draft:
        """No guess for the first `n` slots, in the fixed buffers."""
        return self.hold(Draft.none(n, self.device))

    def hold(self, draft: Draft) -> Draft:
        """Write a draft into the fixed buffers, on the device, and return it as it lies there."""
        held = self._room(draft.chains).draft(draft)
        held.tokens_bk.copy_(draft.tokens_bk)
        held.length_b.copy_(draft.length_b)
        if draft.q_bkm is not None and held.q_bkm is not None:
            held.q_bkm.copy_(draft.q_bkm)
        return held

    def look(self, held: Draft) -> None:
        """Bring a held draft to the host, write the masks behind its tokens, and keep the guesses worth reading.

        A forbidden guess that is certain is not read, and tokens that the grammar forces stand in its place. One that
        was drawn from a q is read and falls, as all guesses behind it do: that it was drawn is part of why what takes
        its place has the right distribution. To leave it out would favour what p and q have in common.
        """
        (n, chains), k = (len(held.length_b), held.chains), held.tokens_bk.shape[1]
        tokens_bck = held.tokens_bk.view(n, chains, k).tolist()
        length_b, certain = held.length_b.tolist(), held.q_bkm is None
        there, here = self._room(chains).words(n * chains, k + 1)
        here.fill_(-1)
        masks_bctw: NDArray[np.int32] = here.view(n, chains, k + 1, -1).numpy()
        forces = certain and chains == 1

        def visit(slot: int) -> None:
            rule, length, most = self.rules[slot], length_b[slot], 0
            assert rule is not None
            for guesses_k, masks_tw in zip(tokens_bck[slot], masks_bctw[slot], strict=True):
                taken = rule.walk(guesses_k[:length], masks_tw, forces=forces)
                most = max(most, len(taken) if certain else min(len(taken) + 1, length))
                if forces:
                    guesses_k[: len(taken)] = taken
            length_b[slot] = most

        ruled = [slot for slot in range(n) if self.rules[slot] is not None]
        if len(ruled) > 1 and self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, "masks")
        list(map(visit, ruled) if self._threads is None else self._threads.map(visit, ruled))
        there.copy_(here.view(torch.uint8), non_blocking=True)
        held.length_b.copy_(torch.tensor(length_b))
        if forces:
            held.tokens_bk.copy_(torch.tensor(tokens_bck, dtype=torch.int64).view(n, k))

    def apply(self, logits_btv: Tensor, held: Draft, draft: Draft) -> Tensor:
        """Minus infinity for all tokens that may not come; logits that are not finite are no less noticed.

        Args:
            logits_btv: behind the last token of each chain and behind its guesses.
            held: what `look` has seen.
            draft: what of it is read; see `Draft.cut`.
        """
        room = self._room(held.chains)
        bytes_btn, _ = room.words(len(held.tokens_bk), held.tokens_bk.shape[1] + 1)
        bytes_btn = bytes_btn[:: held.chains // draft.chains, : logits_btv.shape[1]]
        # A sum keeps NaN, and is much cheaper on a CPU than a choice by each bit.
        bias_xv = room.bias_nv.index_select(0, bytes_btn.flatten().to(torch.int32))
        return logits_btv + bias_xv.view(*bytes_btn.shape[:2], -1)[..., : self.vocab_size]

    def _room(self, chains: int) -> _Room:
        if chains not in self._rooms:
            self._rooms[chains] = _Room(self.rows * chains, self.rows, self.block, self.vocab_size, self.device)
        return self._rooms[chains]


class _Room:
    """Buffers for drafts of so many chains in all; a smaller draft takes the first numbers of each."""

    def __init__(self, chains: int, rows: int, block: int, vocab_size: int, device: torch.device) -> None:
        self.guesses, self.vocab_size, self.device = chains * (block - 1), vocab_size, device
        self.length_b = torch.zeros(rows, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(self.guesses, dtype=torch.int64, device=device)
        self.width = -(-vocab_size // 32)
        size = chains * block * self.width
        self._there = torch.zeros(4 * size, dtype=torch.uint8, device=device)
        self._here = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        # What each byte adds to the logits of its eight tokens.
        bits_nv = torch.arange(256)[:, None] >> torch.arange(8) & 1
        self.bias_nv = torch.where(bits_nv > 0, 0.0, -torch.inf).to(device, torch.bfloat16)
        self._q: Tensor | None = None

    def draft(self, like: Draft) -> Draft:
        """Where such a draft lies."""
        b, k = like.tokens_bk.shape
        q_bkm, length_b = None, self.length_b[: len(like.length_b)]
        if like.q_bkm is not None:
            if self._q is None:
                self._q = like.q_bkm.new_zeros(self.guesses * self.vocab_size)
            q_bkm = self._q[: like.q_bkm.numel()].view_as(like.q_bkm)
        return Draft(self._tokens[: b * k].view(b, k), length_b, q_bkm, like.branches, like.place_v)

    def words(self, b: int, t: int) -> tuple[Tensor, Tensor]:
        """Bits: uint8 ``[b, t, 4 w]`` on the device, and int32 ``[b, t, w]`` where the host writes them."""
        size = b * t * self.width
        return self._there[: 4 * size].view(b, t, -1), self._here[:size].view(b, t, -1)
