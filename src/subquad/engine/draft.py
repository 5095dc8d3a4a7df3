"""What guesses the next tokens: the contract of a drafter, and a draft."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError, nearest
from subquad.core.registry import load
from subquad.engine.history import History
from subquad.engine.sampler import Sampler
from subquad.models.stack import Stack
from subquad.ops.draw import among_all


@dataclass(frozen=True)
class Draft:
    """Guesses for the tokens that follow each row's last.

    A row has one chain of guesses, or c, the paths of a tree from its root: those that share their first guesses stand
    in succession, and so do the chains of a row. Then ``b * c`` takes the place of b in all but `length_b`.

    Attributes:
        tokens_bk: int64 ``[b, k]``.
        length_b: int64 ``[b]``, how many of them count; 0 where a row has none.
        q_bkm: the distributions that they were drawn from, over the tokens that `place_v` has a place for. None where
            nothing was drawn that the row's own noise did not decide: then a guess is kept exactly where it is what
            the row would draw anyway, and all tokens are those of plain decoding. Guesses behind the same guesses were
            drawn from it independently.
        branches: how many first guesses there are, how many second ones behind each of them, and so on; 1 from where
            it ends.
        place_v: int64, the place of each token in q, m where it has none; None where q is of all tokens.
        grounded_b: int64 ``[b]``, how many of those that count are likely enough to be read for their own sake; None
            where there is nothing to tell them apart by.
    """

    tokens_bk: Tensor
    length_b: Tensor
    q_bkm: Tensor | None = None
    branches: tuple[int, ...] = ()
    place_v: Tensor | None = None
    grounded_b: Tensor | None = None

    @property
    def worth_b(self) -> Tensor:
        """How many guesses of each row are to be read where fewer cost less ``[b]``."""
        return self.length_b if self.grounded_b is None else torch.minimum(self.grounded_b, self.length_b)

    @property
    def q_bkv(self) -> Tensor | None:
        """The distributions over all tokens."""
        return None if self.q_bkm is None else among_all(self.q_bkm, self.place_v)

    @property
    def chains(self) -> int:
        """c, the chains of a row."""
        return math.prod(self.branches)

    def fork(self, x_b: Tensor) -> Tensor:
        """What belongs to a row ``[b, ...]`` for each of its chains, ``[b * c, ...]``."""
        return x_b if self.chains == 1 else x_b.repeat_interleave(self.chains, dim=0)

    def cut(self, k: int) -> Draft:
        """At most `k` guesses a chain, and of chains that are then the same one."""
        branches = self.branches[:k]
        every = self.chains // math.prod(branches)
        q_bkm = None if self.q_bkm is None else self.q_bkm[::every, :k]
        length_b = self.length_b.clamp(max=k)
        return Draft(self.tokens_bk[::every, :k], length_b, q_bkm, branches, self.place_v, self.grounded_b)

    def over(self, other: Draft, vocab_size: int) -> Draft:
        """These guesses, one certain chain, in rows that have any, and `other`'s, of as many columns, in the rest."""
        there_b, tokens_bk = self.length_b > 0, other.fork(self.tokens_bk)
        there_b1 = other.fork(there_b)[:, None]
        q_bkv = other.q_bkv
        if q_bkv is not None:
            certain_bkv = F.one_hot(tokens_bk, vocab_size).to(q_bkv.dtype)
            q_bkv = torch.where(there_b1[..., None], certain_bkv, q_bkv)
        tokens_bk = torch.where(there_b1, tokens_bk, other.tokens_bk)
        length_b = torch.where(there_b, self.length_b, other.length_b)
        grounded_b = None
        if self.grounded_b is not None or other.grounded_b is not None:
            grounded_b = torch.where(there_b, self.worth_b, other.worth_b)
        return Draft(tokens_bk, length_b, q_bkv, other.branches, grounded_b=grounded_b)

    @staticmethod
    def none(rows: int, device: torch.device) -> Draft:
        """No guess for any row."""
        empty = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        return Draft(empty, torch.zeros(rows, dtype=torch.int64, device=device))


class Drafter(ABC):
    """Guesses tokens for the rows of one engine, in fixed buffers and without asking the device.

    Rows are slots, those of the engine. `propose` never changes what `observe` has been told, so that nothing is rolled
    back: guesses that were not kept are forgotten by themselves.

    Attributes:
        always: whether it guesses for every row, so that none can stand behind it. What one guesses that does not is
            certain, with no q.
        hears: whether it reads the model's stream, which nobody keeps for it otherwise.
        aux_layers: from `open` on, layers whose streams it reads too; see `Stack.read`.
        forks: whether it may guess several chains a row.
        weighs: whether it tells how many of its guesses are `Draft.grounded_b`, for every row that has any.
    """

    always: bool = False
    hears: bool = False
    aux_layers: tuple[int, ...] = ()
    forks: bool = False
    weighs: bool = False

    @classmethod
    @abstractmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """A drafter as `parse_drafter` describes it.

        Args:
            options: as they were written.
            models: loads a model by its name.

        Raises:
            ConfigError: an unknown option, or a value that can't be.
        """

    @abstractmethod
    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Allocate for `rows` slots of at most `capacity` tokens each, for the engine that takes it.

        Raises:
            ConfigError: it can't guess for `target`, such as with another vocabulary.
        """

    @abstractmethod
    def prepare(self, rows: int, k: int) -> None:
        """Called before rounds in which `propose` is asked for `k`: what needs the device's answer is done here."""

    def hear(  # noqa: B027  (few drafters read the stream)
        self, rows: Sequence[int], tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor
    ) -> None:
        """What the model read of prompts before `put`, in pieces; only where it `hears`, and not of what was known.

        Args:
            rows: slots.
            tokens_bt: tokens of their prompts but the first.
            n_b: how many of them count.
            hidden_btd: the model's stream at the token before each of them, with those of `aux_layers`.
        """

    @abstractmethod
    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin in `rows`, with all tokens of their prompts."""

    def drop(self, rows: Sequence[int]) -> None:  # noqa: B027  (most begin anew in `put`)
        """Forget what `rows` hold: another request comes next."""

    @abstractmethod
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """Guesses for each of the first `rows` slots behind all tokens it was told: `k` columns of token ids.

        Args:
            rows: slots.
            k: at least 1.
            sampler: of the slots.
            history: of the first `rows` of them.
        """

    @abstractmethod
    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """What one or more rounds gave the first slots.

        Args:
            tokens_bt: their new tokens, behind those of `put`, each an id of the vocabulary.
            n_b: how many of them were kept; 0 where a slot is idle.
            hidden_btd: the model's stream where each of them was drawn from; where it does not `hears`, d may be 0.
        """

    @abstractmethod
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What stands in the slots `sources` goes to `targets`; no slot is in both."""


class InTurn(Drafter):
    """Several drafters as one: each guesses for the rows where those before it have nothing to say.

    Args:
        drafters: at least two; all but the last give guesses that are certain.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if any(drafter.always for drafter in drafters[:-1]):
            raise ConfigError("draft: expected no drafter behind one that always guesses, got one; name it last")
        self.drafters, self.always = list(drafters), drafters[-1].always
        self.hears, self.forks = any(d.hears for d in drafters), any(d.forks for d in drafters)
        self.weighs = all(d.weighs for d in drafters)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Not by a slug: `parse_drafter` makes one of several drafters."""
        raise ConfigError("draft: expected a drafter's name, got several; name one after the other")

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """All of them; see `Drafter.open`."""
        self._vocab_size = target.config.vocab_size
        for drafter in self.drafters:
            drafter.open(target, rows, capacity)
        # What hears always guesses, so that it is the last, and the only one.
        self.aux_layers = self.drafters[-1].aux_layers

    def prepare(self, rows: int, k: int) -> None:
        """All of them; see `Drafter.prepare`."""
        for drafter in self.drafters:
            drafter.prepare(rows, k)

    def hear(self, rows: Sequence[int], tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """All of them; see `Drafter.hear`."""
        for drafter in self.drafters:
            drafter.hear(rows, tokens_bt, n_b, hidden_btd)

    def drop(self, rows: Sequence[int]) -> None:
        """All of them; see `Drafter.drop`."""
        for drafter in self.drafters:
            drafter.drop(rows)

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """All of them; see `Drafter.put`."""
        for drafter in self.drafters:
            drafter.put(rows, prompts)

    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """The first that has something to say, row by row; see `Drafter.propose`."""
        *before, last = (drafter.propose(rows, k, sampler, history) for drafter in self.drafters)
        for draft in reversed(before):
            last = draft.over(last, self._vocab_size)
        return last

    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """All of them; see `Drafter.observe`."""
        for drafter in self.drafters:
            drafter.observe(tokens_bt, n_b, hidden_btd)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All of them; see `Drafter.move`."""
        for drafter in self.drafters:
            drafter.move(sources, targets)


class Transcript:
    """All tokens of every slot in fixed buffers, as a drafter is told them.

    Attributes:
        tokens_bn: int64; one column more than is ever filled takes what is not kept.
        length_b: int64, how many there are.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.tokens_bn = torch.zeros(rows, capacity + 2, dtype=torch.int64, device=device)
        self.length_b = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def room(self) -> int:
        """Most tokens of a slot: what it commits, and its last one."""
        return self.tokens_bn.shape[1] - 1

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin `rows` anew."""
        device, width = self.length_b.device, max(map(len, prompts))
        at, padded = torch.tensor(rows, device=device), [[*p, *[0] * (width - len(p))] for p in prompts]
        self.tokens_bn[at, :width] = torch.tensor(padded, dtype=torch.int64, device=device)
        self.length_b[at] = torch.tensor([len(p) for p in prompts], device=device)

    def add(self, tokens_bt: Tensor, n_b: Tensor) -> None:
        """The first `n_b` of each of the first rows' tokens come behind what is there."""
        rows, t = tokens_bt.shape
        columns_t, length_b = torch.arange(t, device=tokens_bt.device), self.length_b[:rows]
        kept_bt = columns_t < n_b[:, None]
        slots_bt = torch.where(kept_bt, length_b[:, None] + columns_t, self.tokens_bn.shape[1] - 1)
        self.tokens_bn[:rows].scatter_(1, slots_bt, tokens_bt)
        length_b += n_b

    def read(self, at_bt: Tensor) -> Tensor:
        """The tokens of the first rows at positions ``[b, t]``; anything where there is none."""
        return self.tokens_bn[: len(at_bt)].gather(1, at_bt.clamp(0, self.tokens_bn.shape[1] - 1))

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What stands in the rows `sources` goes to `targets`."""
        at, to = (torch.tensor(rows, device=self.length_b.device) for rows in (sources, targets))
        self.tokens_bn[to], self.length_b[to] = self.tokens_bn[at], self.length_b[at]


def parse_drafter(specs: Sequence[str], models: Callable[[str], Stack]) -> Drafter:
    """The drafter that ``SLUG,KEY=VALUE,...`` describes; of several each stands behind the one before it.

    Args:
        specs: at least one; ``["copyspec,gammas=3+2", "draft_model,model=small"]``.
        models: loads a model by its name.

    Raises:
        ConfigError: as in `Drafter.build`, and for an unknown slug.
    """
    drafters: list[Drafter] = []
    for spec in specs:
        slug, *pairs = spec.split(",")
        options: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or key in options:
                raise ConfigError(f"draft {spec}: expected SLUG,KEY=VALUE,... with each key once, got {pair!r}; fix it")
            options[key] = value
        kind: type[Drafter] = load("decode", slug)
        drafters.append(kind.build(options, models))
    if not drafters:
        raise ConfigError("draft: expected at least one drafter, got none; name one, such as copyspec")
    return drafters[0] if len(drafters) == 1 else InTurn(drafters)


def take_options(slug: str, options: Mapping[str, str], known: Collection[str]) -> None:
    """Refuse options that a drafter does not know."""
    for key in options:
        if key not in known:
            raise ConfigError(f"draft {slug}: unknown option {key!r}{nearest(key, known)}")


def take_lengths(slug: str, options: Mapping[str, str], key: str, usual: str) -> list[int]:
    """Numbers joined by ``+``, as in ``3+2+1``."""
    text = options.get(key, usual)
    if not all(map(str.isdecimal, text.split("+"))):
        raise ConfigError(f"{slug}: expected {key} like 3 or 3+2+1, got {text!r}; correct it")
    return [int(length) for length in text.split("+")]


def read_vocab(path: str | None) -> list[int] | None:
    """The token ids of a JSON file, which hold a drafter to the tokens that come often; None for no file.

    Raises:
        ConfigError: no such file, or no list of ids in it.
    """
    if path is None:
        return None
    try:
        ids = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"vocab {path}: expected a JSON list of token ids, got {error}; check the path") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in cast("list[Any]", ids)):
        raise ConfigError(f"vocab {path}: expected a JSON list of token ids, got something else; write it anew")
    return cast("list[int]", ids)
