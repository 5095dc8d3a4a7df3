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
from subquad.engine.history import History
from subquad.engine.sampler import Sampler
from subquad.models.stack import Stack
from subquad.ops import copies

CARD = Card(
    title="CopySpec: Accelerating LLMs with Speculative Copy-and-Paste Without Compromising Quality",
    entry="CopySpec",
    arxiv="2502.08923",
    gives="long runs of tokens at once where text repeats what stands in the context: edits, code, quotations",
    status="incubating",
    claim="2.35 times faster on CNN/DM, 3.08 on selected second turns of MT-Redundant",
    measured="3.07 times plain greedy decoding of SmolLM2-135M where it edits texts, 3.68 of its hybrid, one H100",
    result="spec.copyspec.h100.json",
    examples={"paper": {"gammas": "3"}, "few_guesses": {"gammas": "3+2"}},
)

# Where two runs share a bucket the later one is found, so few should.
BUCKETS_A_TOKEN, FEWEST_BUCKETS = 2, 1 << 12
# Guesses that there is a ground for, by each token that stands alike before both places: the longer a copy has been
# one, the longer it goes on. In proportion to the match is SuffixDecoding's rule (arXiv 2411.04975), whose alpha it is.
STRETCH = 3


class CopySpec(Drafter):
    """Copies from the row's own context, found by the last `gamma` tokens.

    A table of hashes, one a row, gives for every run of gamma tokens the position behind its last occurrence; each new
    token costs one entry, whatever the context, and lookup and entry run on the device. The run itself is compared, so
    that a collision costs a guess and no more. Where the copy reaches the end of the context it goes on in itself, as
    text that repeats does. Where fewer guesses cost less, more are read the longer the match is that they go on with.

    Args:
        gammas: lengths of runs, tried in this order; the paper's is 3 alone. These three are those of prompt lookup,
            as it is known from other libraries; what one token finds is doubtful, and read for little.
    """

    weighs = True

    def __init__(self, gammas: Sequence[int] = (3, 2, 1)) -> None:
        if not gammas or min(gammas) < 1:
            raise ConfigError(f"copyspec: expected gammas of at least 1, got {list(gammas)}; the paper takes 3")
        self.gammas = tuple(gammas)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``gammas``, joined by ``+``; see `Drafter.build`."""
        take_options("copyspec", options, ("gammas",))
        return cls(take_lengths("copyspec", options, "gammas", "3+2+1"))

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
            bucket_bt = torch.where(whole_bt, copies.bucket(runs_btg, self._buckets), self._buckets)
            table_bm[at] = table_bm[at].scatter_reduce(1, bucket_bt, ends_bt, "amax")

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """What stood behind the last occurrence of the last tokens; see `Drafter.propose`."""
        tokens_bk, length_b, grounded_b = copies.find(*self._first(rows), self.gammas, k, STRETCH)
        return Draft(tokens_bk, length_b, grounded_b=grounded_b)

    @torch.no_grad()
    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Enter the runs that are no longer the last; see `Drafter.observe`."""
        copies.enter_(*self._first(len(n_b)), self.gammas, tokens_bt, n_b)

    def _first(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Texts, lengths and tables of the first `rows`."""
        return self._told.tokens_bn[:rows], self._told.length_b[:rows], self._table[:, :rows]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Tokens and tables; see `Drafter.move`."""
        at, to = (torch.tensor(slots, device=self._table.device) for slots in (sources, targets))
        self._told.move(sources, targets)
        self._table[:, to] = self._table[:, at]
