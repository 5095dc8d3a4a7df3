"""Rows that decode together in fixed buffers: they join and leave, guesses are verified, and nothing waits between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from subquad.core.errors import ConfigError
from subquad.engine.course import Course
from subquad.engine.detokenize import Detokenizer
from subquad.engine.draft import Drafter
from subquad.engine.gathering import Gathering
from subquad.engine.given import Given
from subquad.engine.masks import Rule
from subquad.engine.pace import Pace
from subquad.engine.prefix import PrefixCache
from subquad.engine.prompts import Prompts
from subquad.engine.relax import Relaxed
from subquad.engine.request import Piece, Request, check_model, check_request
from subquad.engine.rounds import Rounds
from subquad.engine.row import Row
from subquad.engine.trace import Look
from subquad.models.stack import Stack

LOOKS_KEPT = 4096
# Seconds for which a free slot waits at most, on a GPU, for others whose prompts are read with its own.
GATHERED = 0.05


class Engine:
    """Continuous batching over one model: requests join free slots and leave them, each with its own settings.

    A step reads a chunk of the prompts that are not read yet, then decodes a few rounds over all others, and only then
    looks at what came. A round reads each row's last token and the guesses behind it, decides on the device what
    stands, and commits exactly that, so that state never has to be taken back. A row gets what it would get alone.

    Args:
        model: any stack of causal mixers.
        rows: slots, each a row of the state, which is allocated once.
        capacity: most tokens that a row commits.
        drafter: guesses tokens; None decodes plainly.
        draft_tokens: guesses a row and round; None lets `Pace` choose up to `most_drafted` from what they bring.
        most_drafted: largest number that `Pace` may choose.
        chunk: tokens of a prompt read at once.
        rounds: rounds between two looks; by default 1 on a CPU, where a look is free, and 8 on a GPU. While a row with
            a grammar decodes it is 1.
        gather: seconds for which a free slot waits at most while other rows decode, so that several prompts are read
            at once; by default 0 on a CPU, where that gains nothing, and 0.05 on a GPU. See `Gathering`.
        prefixes: keeps states of prompts' beginnings for later ones; None keeps nothing.
        logprobs: give each token's log-probability to requests that do not ask for it as well.
        on_look: called with what each look at the device found; the last ones are in `looks`.
        on_prefix: called, when a request begins that some prefix serves, with its number and the tokens known.
        on_read: called in each step once its prompts are read or, on a GPU, are under way.
        relaxed: let guesses stand that are merely good, for greedy requests alone: what comes is not what it would be
            without, and `exact` is False.
        compile: fuse a round's operations with torch.compile, at its first call for each number of rows and guesses,
            which takes a minute of a large model's time.

    Example:
        >>> import torch
        >>> from subquad.models.config import ModelConfig
        >>> layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        >>> engine = Engine(Stack(ModelConfig(11, 16, 32, (layer,))), rows=2, capacity=16)
        >>> _ = engine.submit(Request([1, 2, 3]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        subquad.core.errors.ConfigError: request 0: expected at most 16 tokens as a row has room for, got 3 and 128 ...
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Stack,
        *,
        rows: int,
        capacity: int,
        drafter: Drafter | None = None,
        draft_tokens: int | None = None,
        most_drafted: int = 15,
        chunk: int = 1024,
        rounds: int | None = None,
        gather: float | None = None,
        prefixes: PrefixCache | None = None,
        logprobs: bool = False,
        on_look: Callable[[Look], None] | None = None,
        on_prefix: Callable[[int, int], None] | None = None,
        on_read: Callable[[], None] | None = None,
        relaxed: Relaxed | None = None,
        compile: bool = False,
    ) -> None:
        check_model(model)
        on_gpu = model.device.type == "cuda"
        rounds = rounds if rounds is not None else 8 if on_gpu else 1
        gather = gather if gather is not None else GATHERED if on_gpu else 0.0
        if gather < 0:
            raise ConfigError(f"gather: expected seconds of at least 0, got {gather}; 0 lets everyone in at once")
        if min(rows, capacity, chunk, rounds) < 1:
            raise ConfigError(
                f"engine: expected rows, capacity, chunk and rounds of at least 1, got {rows}, {capacity}, {chunk} "
                f"and {rounds}; give more"
            )
        widest = 0 if drafter is None else most_drafted if draft_tokens is None else draft_tokens
        if drafter is not None and widest < 1:
            raise ConfigError(f"draft_tokens: expected at least 1 with a drafter, got {widest}; leave the drafter out")
        if relaxed is not None and drafter is None:
            raise ConfigError("relaxed: expected a drafter whose guesses it is about, got none; name one")
        if relaxed is not None and drafter is not None and drafter.forks:
            raise ConfigError("relaxed: expected a drafter of one chain of guesses a row, got several; use another")
        self.model, self.rows, self.capacity, self.chunk, self.rounds = model, rows, capacity, chunk, rounds
        self.relaxed = relaxed
        self.drafter, self.prefixes, self.logprobs, self.on_look = drafter, prefixes, logprobs, on_look
        self.on_prefix, self.on_read = on_prefix, on_read
        if prefixes is not None:
            prefixes.bind(model)
        self.looks = deque[Look](maxlen=LOOKS_KEPT)
        self._waiting = deque[Row]()
        self._slots: list[Row | None] = [None] * rows
        self._aside: dict[int, Row] = {}
        self._submitted = 0
        self._gathering = Gathering(gather)
        block = widest + 1
        self._rounds = Rounds(
            model,
            rows,
            capacity,
            block,
            rounds,
            drafter,
            compile=compile,
            relaxed=None if self.exact else relaxed,
        )
        self._prompts = Prompts(self._rounds, chunk, prefixes)
        self._course = Course(self._rounds, rounds, most=widest, fixed=draft_tokens is not None)

    @property
    def pace(self) -> Pace:
        """Chooses the number of guesses."""
        return self._course.pace

    @property
    def ruled_pace(self) -> Pace:
        """The same while a row has a grammar."""
        return self._course.ruled_pace

    @property
    def exact(self) -> bool:
        """Whether what comes is what plain decoding gives, or equal in distribution."""
        return self.relaxed is None or self.relaxed.exact

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or under way."""
        return bool(self._waiting) or any(row is not None for row in self._slots)

    @property
    def live(self) -> int:
        """Requests that hold a slot."""
        return sum(row is not None for row in self._slots)

    @property
    def captured(self) -> bool:
        """Whether some round is one CUDA graph by now."""
        return self._rounds.captured

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' state, and of the prefixes kept."""
        return self._rounds.pool.nbytes + (self.prefixes.nbytes if self.prefixes is not None else 0)

    @property
    def aside_nbytes(self) -> int:
        """Bytes of the state of requests that were put aside."""
        return sum(row.saved[0].nbytes for row in self._aside.values() if row.saved is not None)

    def submit(self, request: Request) -> int:
        """Queue a request and return the number that its pieces bear as ``row``.

        Raises:
            DataError, ConfigError: what can't be generated, or does not fit a row; nothing else is touched.
        """
        id = self._submitted
        self.check(request, f"request {id}")
        text = None
        if request.tokenizer is not None:
            text = Detokenizer(request.tokenizer, request.prompt, request.limits.stop)
        if self.logprobs and request.logprobs is None:
            request = replace(request, logprobs=0)
        ends, rule = request.ends(self.model), self._rule(request)
        self._submitted += 1
        self._waiting.append(Row(id, request, list(request.prompt), text, ends, rule))
        return id

    def _rule(self, request: Request) -> Rule | None:
        if request.grammar is None:
            return None
        return Rule(request.grammar.start(), request.ends(self.model), self.model.config.vocab_size)

    def check(self, request: Request, name: str) -> None:
        """Refuse what this engine can't answer; `name` is the request's in errors.

        Raises:
            DataError, ConfigError: as `submit`.
        """
        check_request(self.model, request, name)
        if not self.exact and request.sampling.temperature > 0:
            raise ConfigError(
                f"relaxed: expected greedy requests, got temperature {request.sampling.temperature}; sampled ones are "
                "verified exactly or not at all"
            )
        if request.tokens > self.capacity:
            raise ConfigError(
                f"{name}: expected at most {self.capacity} tokens as a row has room for, got "
                f"{len(request.prompt)} and {request.limits.max_new_tokens} new ones; make an engine of more capacity, "
                "or ask for less"
            )

    @torch.no_grad()
    def warm(self, request: Request) -> None:
        """Do all rounds that requests with such sampling and ends may need, so that none is new later.

        On a GPU that is when a round is compiled and captured, which takes longer than hundreds of rounds. Each number
        of rows and guesses is run over empty rows, and what it takes is where the choice of guesses begins. Where
        rounds are launched piece by piece there is nothing to prepare.

        Raises:
            DataError, ConfigError: as in `submit`, or something is waiting or under way.
        """
        if self.busy:
            there = len(self._waiting) + self.live
            raise ConfigError(f"warm: expected nothing under way, got {there} requests; call it before the first")
        self.check(request, "warm")
        if not self._rounds.static:
            return
        self._rounds.admit([0], [request], [0])
        self._rounds.masks.put([0], [self._rule(request)])
        try:
            for n in sorted({min(1 << i, self.rows) for i in range(self.rows.bit_length() + 1)}):
                self._course.rehearse(n)
        finally:
            self._leave([0])

    def cancel(self, id: int) -> bool:
        """Forget a request and free its slot; False if it is not there (any more)."""
        if self._aside.pop(id, None) is not None:
            return True
        row = self._find(id)
        if row is None:
            return False
        if row in self._waiting:
            self._waiting.remove(row)
        else:
            self._leave([self._slots.index(row)])
        return True

    @torch.no_grad()
    def pause(self, id: int, *, aside: bool = False) -> bool:
        """Give up a request's slot and put it first in the queue; it goes on where it stood. False if not there.

        Args:
            id: its number.
            aside: not in the queue but beside it, until `resume` or `cancel`.
        """
        row = self._find(id)
        if row is None or row in self._waiting:
            return False
        slot = self._slots.index(row)
        row.saved = self._rounds.save(slot, row.read)
        self._leave([slot])
        if aside:
            self._aside[id] = row
        else:
            self._waiting.appendleft(row)
        return True

    def resume(self, id: int) -> bool:
        """Queue a request that was put aside; it goes on where it stood. False if not there."""
        row = self._aside.pop(id, None)
        if row is not None:
            self._waiting.append(row)
        return row is not None

    def _find(self, id: int) -> Row | None:
        return next((row for row in (*self._waiting, *self._slots) if row is not None and row.id == id), None)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Admit what fits, read a chunk of prompts, decode some rounds, and give what came, in order for each row."""
        self._admit()
        read = self._prompts.read(self._slots)
        self._start([slot for slot in read if (row := self._slots[slot]) is not None and row.filled])
        if self.on_read is not None:
            self.on_read()
        if read and self.drafter is not None and self.model.device.type == "cuda":
            # Else the first rounds would be held to take as long as the prompts, and guesses to cost as much.
            torch.cuda.synchronize(self.model.device)
        if not any(row is not None and row.filled for row in self._slots):
            return []
        self._close_up()
        used = 1 + max(slot for slot, row in enumerate(self._slots) if row is not None)
        # A graph serves a number of rows; on a CPU every row costs.
        n = min(self.rows, 1 << (used - 1).bit_length()) if self._rounds.graphs.captures else used
        turn = self._course.run(n, max(row.left for row in self._slots if row is not None and row.filled))
        if (seconds := self._prompts.seconds()) is not None:
            self._gathering.learn(seconds)
        pieces = self._take(turn.given)
        self.looks.append(look := self._course.look(turn))
        if self.on_look is not None:
            self.on_look(look)
        return pieces

    def _admit(self) -> None:
        """Give free slots to those who wait, all at once, as soon as that is worth it."""
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        decoding, now = sum(row is not None and row.filled for row in self._slots), time.perf_counter()
        if not self._gathering.over(waiting=len(self._waiting), free=len(free), live=decoding, now=now):
            return
        slots = free[: len(self._waiting)]
        rows = [self._waiting.popleft() for _ in slots]
        self._rounds.admit(slots, [row.request for row in rows], [row.drawn for row in rows])
        for slot, row in zip(slots, rows, strict=True):
            self._slots[slot] = row
            if self._prompts.recall(slot, row) and self.on_prefix is not None:
                self.on_prefix(row.id, row.read)
        self._start([slot for slot, row in zip(slots, rows, strict=True) if row.filled])

    def _start(self, slots: Sequence[int]) -> None:
        """From now on `slots`, whose prompts are read, take part in the rounds."""
        rows = [row for slot in slots if (row := self._slots[slot]) is not None]
        self._rounds.start(slots, [row.tokens for row in rows], [row.rule for row in rows])

    def _close_up(self) -> None:
        """Move rows from the end into free slots once half of those in use are free."""
        used = [slot for slot, row in enumerate(self._slots) if row is not None]
        if 2 * len(used) > used[-1] + 1:
            return
        targets = [slot for slot in range(len(used)) if self._slots[slot] is None]
        sources = used[len(used) - len(targets) :]
        self._rounds.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self._slots[target], self._slots[source] = self._slots[source], None

    def _take(self, given: Sequence[Given]) -> list[Piece]:
        """What came, as pieces; rows that have ended leave."""
        pieces, ended = list[Piece](), list[int]()
        for slot, (row, new) in enumerate(zip(self._slots, given, strict=False)):
            if row is not None and new.tokens:
                mine = row.take(new)
                pieces += mine
                if mine[-1].finish is not None:
                    ended.append(slot)
        self._leave(ended)
        return pieces

    def _leave(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._slots[slot] = None
        self._rounds.leave(slots)
