"""What stood behind the last tokens the last time they came is guessed to come again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.engine.draft import Draft, Drafter, Transcript, take_lengths, take_options
from subquad.engine.sampler import History, Sampler
from subquad.models.stack import Stack

CARD = Card(
    title="CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality",
    entry="CopySpec",
    arxiv="2502.08923",
    gives="long runs of tokens at once where text repeats what stands in the context: edits, code, quotations",
    status="incubating",
    claim="2.35 times faster on CNN/DM, 3.08 on selected second turns of MT-Redundant",
    measured="not reproduced",
    examples={"paper": {}, "prompt_lookup": {"gammas": "3+2+1"}},
)

# An odd number without structure, whose powers weigh the tokens of a run (a polynomial hash, modulo 2**64).
BASE = 0x5851F42D4C957F2D
# Where two runs share a bucket the later one is found, so few should.
BUCKETS_A_TOKEN, FEWEST_BUCKETS = 2, 1 << 12


class CopySpec(Drafter):
    """Copies from the row's own context, found by the last `gamma` tokens.

    A table of hashes, one a row, gives for every run of gamma tokens the position behind its last occurrence; each new
    token costs one entry, whatever the context, and lookup and entry run on the device. The run itself is compared, so
    that a collision costs a guess and no more. Where the copy reaches the end of the context it goes on in itself, as
    text that repeats does.

    Args:
        gammas: lengths of runs, tried in this order; the paper's is 3. ``(3, 2, 1)`` is prompt lookup, as it is known
            from other libraries.
    """

    def __init__(self, gammas: Sequence[int] = (3,)) -> None:
        if not gammas or min(gammas) < 1:
            raise ConfigError(f"copyspec: expected gammas of at least 1, got {list(gammas)}; the paper takes 3")
        self.gammas = tuple(gammas)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``gammas``, joined by ``+``; see `Drafter.build`."""
        take_options("copyspec", options, ("gammas",))
        return cls(take_lengths("copyspec", options, "gammas", "3"))

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Allocate tokens and tables; see `Drafter.open`."""
        self._told = Transcript(rows, capacity, target.device)
        self._buckets = max(FEWEST_BUCKETS, 1 << (BUCKETS_A_TOKEN * capacity - 1).bit_length())
        # One bucket more takes what is no run.
        shape = (len(self.gammas), rows, self._buckets + 1)
        self._table = torch.full(shape, -1, dtype=torch.int64, device=target.device)

    def prepare(self, rows: int, k: int) -> None:
        """Nothing; see `Drafter.prepare`."""

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Enter every run of the prompts; see `Drafter.put`."""
        self._told.put(rows, prompts)
        device, width = self._told.tokens_bn.device, max(map(len, prompts))
        at = torch.tensor(rows, device=device)
        self._table[:, at] = -1
        tokens_bn, length_b1 = self._told.tokens_bn[at], self._told.length_b[at, None]
        ends_bt = torch.arange(1, max(width, 2), device=device).expand(len(rows), -1)
        for table_bm, gamma in zip(self._table, self.gammas, strict=True):
            if width <= gamma:
                continue
            # Runs end at gamma, ..., so that the last of a prompt is not its own occurrence.
            runs_btg = F.pad(tokens_bn[:, : width - 1].unfold(1, gamma, 1), (0, 0, gamma - 1, 0))
            whole_bt = (ends_bt >= gamma) & (ends_bt < length_b1)
            bucket_bt = torch.where(whole_bt, self._hash(runs_btg), self._buckets)
            table_bm[at] = table_bm[at].scatter_reduce(1, bucket_bt, ends_bt, "amax")

    def _hash(self, runs_btg: Tensor) -> Tensor:
        """The bucket ``[b, t]`` of each run."""
        h_bt = torch.zeros_like(runs_btg[..., 0])
        for token_bt in runs_btg.unbind(-1):
            h_bt = (h_bt + token_bt + 1) * BASE
        return (h_bt >> 31 ^ h_bt >> 11) & self._buckets - 1

    def _runs(self, end_bt: Tensor, gamma: int) -> Tensor:
        """The `gamma` tokens before each position, ``[b, t, gamma]``."""
        b, t = end_bt.shape
        at_btg = end_bt[..., None] - gamma + torch.arange(gamma, device=end_bt.device)
        return self._told.read(at_btg.flatten(1)).view(b, t, gamma)

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """What stood behind the last occurrence of the last tokens; see `Drafter.propose`."""
        end_b1 = self._told.length_b[:rows, None]
        from_b1 = torch.full_like(end_b1, -1)
        for table_bm, gamma in zip(self._table, self.gammas, strict=True):
            last_b1g = self._runs(end_b1, gamma)
            found_b1 = table_bm[:rows].gather(1, self._hash(last_b1g))
            same_b1 = (self._runs(found_b1.clamp(min=0), gamma) == last_b1g).all(-1)
            there_b1 = same_b1 & (found_b1 >= gamma) & (end_b1 >= gamma) & (from_b1 < 0)
            from_b1 = torch.where(there_b1, found_b1, from_b1)
        found_b1 = from_b1 >= 0
        period_b1 = torch.where(found_b1, end_b1 - from_b1, 1)
        tokens_bk = self._told.read(from_b1 + torch.arange(k, device=end_b1.device) % period_b1)
        return Draft(tokens_bk, torch.where(found_b1, k, 0)[:, 0])

    @torch.no_grad()
    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Enter the runs that are no longer the last; see `Drafter.observe`."""
        rows, t = tokens_bt.shape
        columns_t = torch.arange(t, device=tokens_bt.device)
        ends_bt = self._told.length_b[:rows, None] + columns_t
        self._told.add(tokens_bt, n_b)
        for table_bm, gamma in zip(self._table, self.gammas, strict=True):
            whole_bt = (columns_t < n_b[:, None]) & (ends_bt >= gamma)
            bucket_bt = torch.where(whole_bt, self._hash(self._runs(ends_bt, gamma)), self._buckets)
            table_bm[:rows].scatter_reduce_(1, bucket_bt, ends_bt, "amax")

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Tokens and tables; see `Drafter.move`."""
        at, to = (torch.tensor(slots, device=self._table.device) for slots in (sources, targets))
        self._told.move(sources, targets)
        self._table[:, to] = self._table[:, at]
