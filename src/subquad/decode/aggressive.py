"""A rewrite is guessed to go on as the prompt does, and after an edit from where it is back in step."""

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

CARD = Card(
    title="Lossless Acceleration for Seq2seq Generation with Aggressive Decoding",
    entry="Aggressive",
    arxiv="2205.10350",
    gives="long runs of tokens at once where a text is rewritten with few edits: corrections, reviews, code changes",
    status="incubating",
    claim="7 to 9 times faster on grammatical error correction and text simplification, the tokens of greedy decoding",
    measured="not reproduced",
    examples={"paper": {}, "bigram": {"suffix": "2"}, "long": {"suffix": "3+5"}},
)

# An odd number without structure, whose powers weigh the tokens of a run (a polynomial hash, modulo 2**64).
BASE = 0x2545F4914F6CDD1D
LAST = torch.iinfo(torch.int64).max


class Aggressive(Drafter):
    """Input-guided aggressive decoding: copies the prompt from a pointer that follows the output (arXiv 2106.04970).

    As long as a row writes what stands at its pointer, it is in step and the prompt's next tokens are guessed. Once it
    writes something else nothing is guessed, until its last tokens occur exactly once in the prompt ahead of the
    pointer, or, if nowhere ahead, exactly once before it; the pointer then stands behind them. Prompt and output are
    one text to this search, so that it finds the start of the rewrite by itself. A new place becomes what "ahead" is
    reckoned from only when a token written there agrees: a wrong one costs its guesses and is left at once.

    All runs of a prompt are sorted once, by hash and position, so that a search is a binary one on the device, whatever
    the context. Hashes alone are compared: a collision costs a guess and no more.

    Args:
        suffix: lengths of runs to look for, tried in this order; the first that is not ambiguous decides.
    """

    def __init__(self, suffix: Sequence[int] = (1, 2, 3)) -> None:
        if not suffix or min(suffix) < 1:
            raise ConfigError(f"aggressive: expected suffixes of at least 1 token, got {list(suffix)}; take 1, 2 and 3")
        self.suffix = tuple(suffix)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``suffix``, lengths joined by ``+``; see `Drafter.build`."""
        take_options("aggressive", options, ("suffix",))
        return cls(take_lengths("aggressive", options, "suffix", "1+2+3"))

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Allocate tokens, pointers and sorted runs; see `Drafter.open`."""
        device = target.device
        self._told = Transcript(rows, capacity, device)
        # Where the prompt ends, the pointer (-1 out of step), and the last place that the output has agreed with.
        self._source_b, self._at_b, self._sure_b = (
            torch.full((rows,), start, dtype=torch.int64, device=device) for start in (0, -1, 0)
        )
        # A key is a hash above, and below it the position behind the run, up to one more than the capacity.
        self._bits = (capacity + 1).bit_length()
        # The neighbours of any key can be read: two in front of all, and one behind.
        shape = (len(self.suffix), rows, capacity + 3)
        self._keys = torch.full(shape, LAST, dtype=torch.int64, device=device)
        self._keys[..., :2] = -1

    def prepare(self, rows: int, k: int) -> None:
        """Nothing; see `Drafter.prepare`."""

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Sort the runs of the prompts and look for their own last tokens; see `Drafter.put`."""
        self._told.put(rows, prompts)
        device, width = self._told.tokens_bn.device, max(map(len, prompts))
        at = torch.tensor(rows, device=device)
        tokens_bn, source_b = self._told.tokens_bn[at, :width], self._told.length_b[at]
        ends_n = torch.arange(width + 1, device=device)
        for keys_bm, gamma in zip(self._keys, self.suffix, strict=True):
            hash_bn = self._hash(F.pad(tokens_bn, (gamma, 0)).unfold(1, gamma, 1))
            # Behind the last run of a prompt there is nothing to guess.
            whole_bn = (ends_n >= gamma) & (ends_n < source_b[:, None])
            keys_bn = torch.where(whole_bn, hash_bn << self._bits | ends_n, LAST)
            own_bm = torch.full_like(keys_bm[at], LAST)
            own_bm[:, :2] = -1
            own_bm[:, 2 : width + 3] = keys_bn.sort(dim=1).values
            keys_bm[at] = own_bm
        self._source_b[at], self._sure_b[at] = source_b, 0
        self._at_b[at] = self._seek(len(self._source_b))[at]

    def _hash(self, runs_btg: Tensor) -> Tensor:
        """What stands above the position in the key of each run, ``[b, t]``."""
        h_bt = torch.zeros_like(runs_btg[..., 0])
        for token_bt in runs_btg.unbind(-1):
            h_bt = (h_bt + token_bt + 1) * BASE
        return h_bt >> self._bits + 1 & (1 << 63 - self._bits) - 1

    def _seek(self, rows: int) -> Tensor:
        """The position in the prompt ``[b]`` behind the one place where the last tokens of each row stand, else -1."""
        end_b1, sure_b1 = self._told.length_b[:rows, None], self._sure_b[:rows, None]
        found_b = torch.full_like(end_b1[:, 0], -1)
        for keys_bm, gamma in zip(self._keys[:, :rows], self.suffix, strict=True):
            last_bg = self._told.read(end_b1 - gamma + torch.arange(gamma, device=end_b1.device))
            hash_b1 = self._hash(last_bg[:, None])
            first_b1 = torch.searchsorted(keys_bm, hash_b1 << self._bits | sure_b1 + 1)
            near_b4 = keys_bm.gather(1, first_b1 + torch.arange(-2, 2, device=end_b1.device))
            second_last_b, last_b, next_b, second_next_b = (near_b4 >> self._bits == hash_b1).unbind(1)
            once_b = (next_b & ~second_next_b) | (last_b & ~second_last_b & ~next_b)
            place_b = torch.where(next_b, near_b4[:, 2], near_b4[:, 1]) & (1 << self._bits) - 1
            found_b = torch.where(once_b & (found_b < 0), place_b, found_b)
        return found_b

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """What stands at the pointer, up to the prompt's end; see `Drafter.propose`."""
        at_b = self._at_b[:rows]
        length_b = torch.where(at_b < 0, 0, (self._source_b[:rows] - at_b).clamp(max=k))
        # What does not count is read by the model all the same, and a row that diverged has told a -1.
        tokens_bk = self._told.read(at_b[:, None] + torch.arange(k, device=at_b.device)).clamp(min=0)
        return Draft(tokens_bk, length_b)

    @torch.no_grad()
    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Move the pointers, or look for where the rows are now; see `Drafter.observe`."""
        rows, t = tokens_bt.shape
        columns_t, at_b = torch.arange(t, device=tokens_bt.device), self._at_b[:rows]
        there_bt = at_b[:, None] + columns_t
        same_bt = (self._told.read(there_bt) == tokens_bt) & (there_bt < self._source_b[:rows, None])
        same_bt = same_bt & (columns_t < n_b[:, None]) & (at_b[:, None] >= 0)
        agreed_b = same_bt.to(torch.int64).cumprod(1).sum(1)
        self._told.add(tokens_bt, n_b)
        self._sure_b[:rows] = torch.where(agreed_b > 0, at_b + agreed_b, self._sure_b[:rows])
        in_step_b = (at_b >= 0) & (agreed_b == n_b)
        self._at_b[:rows] = torch.where(in_step_b, at_b + agreed_b, self._seek(rows))

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Tokens, pointers and sorted runs; see `Drafter.move`."""
        at, to = (torch.tensor(slots, device=self._keys.device) for slots in (sources, targets))
        self._told.move(sources, targets)
        for buffer_b in (self._source_b, self._at_b, self._sure_b):
            buffer_b[to] = buffer_b[at]
        self._keys[:, to] = self._keys[:, at]
