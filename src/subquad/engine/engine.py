"""Rows that decode together in fixed buffers: they join and leave, guesses are verified, and nothing waits between."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.engine.detokenize import Detokenizer
from subquad.engine.draft import Draft, Drafter
from subquad.engine.pace import Pace
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Piece, Request, check_model, check_request
from subquad.engine.sampler import History, Sampler, SamplingConfig
from subquad.engine.trace import Look
from subquad.engine.verify import verify
from subquad.models.stack import Stack, StackState

LOOKS_KEPT = 4096
CHUNKS_AT_ONCE = 32
"""Most tokens of prompts in one forward pass, in chunks; it bounds what that holds in memory beside the state."""


@dataclass
class _Row:
    """A request under way. `tokens` is the prompt and all that was drawn; of it the state has read `read`."""

    id: int
    request: Request
    tokens: list[int]
    text: Detokenizer | None
    drawn: int = 0
    read: int = 0
    saved: tuple[StackState, History] | None = None
    marks: list[int] = field(default_factory=list[int])

    @property
    def filled(self) -> bool:
        """All but the last token are read: that one begins the next block."""
        return self.read == len(self.tokens) - 1


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
        rounds: rounds between two looks; by default 1 on a CPU, where a look is free, and 8 on a GPU.
        prefixes: keeps states of prompts' beginnings for later ones; None keeps nothing.
        logprobs: give the log-probability of each token.
        on_look: called with what each look at the device found; the last ones are in `looks`.
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
        most_drafted: int = 8,
        chunk: int = 1024,
        rounds: int | None = None,
        prefixes: PrefixCache | None = None,
        logprobs: bool = False,
        on_look: Callable[[Look], None] | None = None,
        compile: bool = False,
    ) -> None:
        check_model(model)
        on_gpu = model.device.type == "cuda"
        rounds = rounds if rounds is not None else 8 if on_gpu else 1
        if min(rows, capacity, chunk, rounds) < 1:
            raise ConfigError(
                f"engine: expected rows, capacity, chunk and rounds of at least 1, got {rows}, {capacity}, {chunk} "
                f"and {rounds}; give more"
            )
        widest = 0 if drafter is None else most_drafted if draft_tokens is None else draft_tokens
        if drafter is not None and widest < 1:
            raise ConfigError(f"draft_tokens: expected at least 1 with a drafter, got {widest}; leave the drafter out")
        self.model, self.rows, self.capacity, self.chunk, self.rounds = model, rows, capacity, chunk, rounds
        self.drafter, self.prefixes, self.logprobs, self.on_look = drafter, prefixes, logprobs, on_look
        if prefixes is not None:
            prefixes.bind(model)
        self.pace = Pace(widest, fixed=draft_tokens is not None)
        self.looks = deque[Look](maxlen=LOOKS_KEPT)
        self._waiting = deque[_Row]()
        self._slots: list[_Row | None] = [None] * rows
        self._submitted = 0
        device, width = model.device, rounds * (widest + 1)
        self._pool = model.init_state(rows, capacity)
        self._sampler = Sampler([SamplingConfig()] * rows, device, model.config.vocab_size)
        self._history = History.start([[0]] * rows, 0, device)
        self._last_b, self._alive_b, self._left_b, self._fill_b, self._kept_b, self._judged_b, self._guessed_b = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(7)
        )
        # One column more than is ever read takes what is not kept.
        self._out_bn = torch.zeros(rows, width + 1, dtype=torch.int64, device=device)
        self._score_bn = torch.zeros(rows, width + 1 if logprobs else 0, device=device)
        self._ends_be = torch.full((rows, 1), -2, dtype=torch.int64, device=device)
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._seen: set[Any] = set()
        self._captures = on_gpu
        # Of a fixed shape; else a round reads no more guesses than some row has, which asks the device.
        self._static = on_gpu or compile
        self._compiled = torch.compile(self._round, fullgraph=True, dynamic=False) if compile else self._round
        if drafter is not None:
            drafter.open(model, rows, capacity)

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
        return bool(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' state, and of the prefixes kept."""
        return self._pool.nbytes + (self.prefixes.nbytes if self.prefixes is not None else 0)

    def submit(self, request: Request) -> int:
        """Queue a request and return the number that its pieces bear as ``row``.

        Raises:
            DataError, ConfigError: what can't be generated, or does not fit a row; nothing else is touched.
        """
        id = self._submitted
        check_request(self.model, request, f"request {id}")
        if request.tokens > self.capacity:
            raise ConfigError(
                f"request {id}: expected at most {self.capacity} tokens as a row has room for, got "
                f"{len(request.prompt)} and {request.limits.max_new_tokens} new ones; make an engine of more capacity, "
                "or ask for less"
            )
        text = None
        if request.tokenizer is not None:
            text = Detokenizer(request.tokenizer, request.prompt, request.limits.stop)
        self._submitted += 1
        self._waiting.append(_Row(id, request, list(request.prompt), text))
        return id

    def cancel(self, id: int) -> bool:
        """Forget a request and free its slot; False if it is not there (any more)."""
        row = self._find(id)
        if row is None:
            return False
        if row in self._waiting:
            self._waiting.remove(row)
        else:
            self._leave([self._slots.index(row)])
        return True

    @torch.no_grad()
    def pause(self, id: int) -> bool:
        """Give up a request's slot and put it first in the queue; it goes on where it stood. False if not there."""
        row = self._find(id)
        if row is None or row in self._waiting:
            return False
        slot = self._slots.index(row)
        at = torch.tensor([slot], device=self.model.device)
        row.saved = (self._pool.select(at).cut(row.read).snapshot(), self._history.select(at))
        self._leave([slot])
        self._waiting.appendleft(row)
        return True

    def _find(self, id: int) -> _Row | None:
        return next((row for row in (*self._waiting, *self._slots) if row is not None and row.id == id), None)

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Admit what fits, read a chunk of prompts, decode some rounds, and give what came, in order for each row."""
        self._admit()
        self._fill()
        if not any(row is not None and row.filled for row in self._slots):
            return []
        self._close_up()
        used = 1 + max(slot for slot, row in enumerate(self._slots) if row is not None)
        # A graph serves a number of rows; on a CPU every row costs.
        n = min(self.rows, 1 << (used - 1).bit_length()) if self._captures else used
        k = self.pace.choose() if self.drafter is not None else 0
        began = time.perf_counter()
        if k and self.drafter is not None:
            self.drafter.prepare(n, k)
        for _ in range(self.rounds):
            self._run(n, k)
        return self._take(n, k, began)

    def _admit(self) -> None:
        """Give free slots to those who wait, all at once."""
        free = [slot for slot, row in enumerate(self._slots) if row is None]
        slots = free[: len(self._waiting)]
        if not slots:
            return
        rows = [self._waiting.popleft() for _ in slots]
        device, at = self.model.device, torch.tensor(slots, device=self.model.device)
        configs = [row.request.sampling for row in rows]
        self._pool.clear_(at)
        self._sampler.put(slots, configs)
        if self._sampler.penalises and not self._history.count_bv.shape[1]:
            self._widen_history()
        prompts = [row.request.prompt for row in rows]
        self._history.write_(at, History.start(prompts, self._history.count_bv.shape[1], device))
        ends = [sorted(set(self._ends(row))) for row in rows]
        if (most := max(map(len, ends))) > self._ends_be.shape[1]:
            more = torch.full((self.rows, most - self._ends_be.shape[1]), -2, dtype=torch.int64, device=device)
            self._ends_be = torch.cat((self._ends_be, more), dim=1)
            self._graphs.clear()
        padded = [row + [-2] * (self._ends_be.shape[1] - len(row)) for row in ends]
        self._ends_be[at] = torch.tensor(padded, dtype=torch.int64, device=device)
        self._left_b[at] = torch.tensor([row.request.limits.max_new_tokens - row.drawn for row in rows], device=device)
        self._alive_b[at] = 0
        for slot, row in zip(slots, rows, strict=True):
            self._slots[slot] = row
            self._recall(slot, row)
        self._start([slot for slot, row in zip(slots, rows, strict=True) if row.filled])

    def _recall(self, slot: int, row: _Row) -> None:
        """Write into a slot what is known of its tokens already: its own saved state, or that of a beginning."""
        at = torch.tensor([slot], device=self.model.device)
        if row.saved is not None:
            state, history = row.saved
            row.saved = None
            self._pool.write_(at, state)
            if history.count_bv.shape[1] == self._history.count_bv.shape[1]:
                self._history.write_(at, history)
            self._history.step_b[slot] = row.drawn
        elif self.prefixes is not None:
            found = self.prefixes.find(row.tokens[:-1])
            row.marks = self.prefixes.marks(row.tokens[:-1])
            if found is not None:
                self._pool.write_(at, found.state)
                row.read = found.tokens

    def _ends(self, row: _Row) -> Sequence[int]:
        asked = row.request.limits.end_tokens
        return self.model.config.eos_tokens if asked is None else asked

    def _widen_history(self) -> None:
        """Make room for counts of tokens; rows under way have no penalty, so that theirs stay zero."""
        wide = History.start([[0]] * self.rows, self.model.config.vocab_size, self.model.device)
        wide.step_b.copy_(self._history.step_b)
        self._history = wide
        self._graphs.clear()

    def _fill(self) -> None:
        """Read one chunk of the prompts that are not read yet."""
        device, slots, blocks = self.model.device, list[int](), list[list[int]]()
        width = 0
        for slot, row in enumerate(self._slots):
            if row is None or row.filled:
                continue
            stop = min(row.read + self.chunk, len(row.tokens) - 1)
            # A state is kept where it was asked for, so a block ends there.
            stop = next((mark for mark in row.marks if row.read < mark < stop), stop)
            width = max(width, stop - row.read)
            if slots and (len(slots) + 1) * width > CHUNKS_AT_ONCE * self.chunk:
                break
            slots.append(slot)
            blocks.append(row.tokens[row.read : stop])
        if not slots:
            return
        rows = [row for slot in slots if (row := self._slots[slot]) is not None]
        width = max(map(len, blocks))
        tokens_bt = torch.tensor([block + [0] * (width - len(block)) for block in blocks], device=device)
        lengths_b = torch.tensor([len(block) for block in blocks], device=device)
        at = torch.tensor(slots, device=device)
        fresh = not any(row.read for row in rows)
        # Nothing to look at costs less than an empty buffer.
        state = self.model.init_state(len(slots)) if fresh else self._pool.select(at)
        ragged = any(len(block) < width for block in blocks)
        _, update = self.model.read(tokens_bt, state, lengths_b if ragged else None)
        update.commit_(self._pool, at, lengths_b)
        for slot, row, block in zip(slots, rows, blocks, strict=True):
            row.read += len(block)
            if self.prefixes is not None and row.read in row.marks:
                one = self._pool.select(torch.tensor([slot], device=device)).cut(row.read)
                self.prefixes.keep(row.tokens[: row.read], one.snapshot())
        self._start([slot for slot, row in zip(slots, rows, strict=True) if row.filled])

    def _start(self, slots: Sequence[int]) -> None:
        """From now on `slots`, whose prompts are read, take part in the rounds."""
        if not slots:
            return
        tokens = [row.tokens for slot in slots if (row := self._slots[slot]) is not None]
        at = torch.tensor(slots, device=self.model.device)
        self._last_b[at] = torch.tensor([row[-1] for row in tokens], device=self.model.device)
        self._alive_b[at] = 1
        if self.drafter is not None:
            self.drafter.put(slots, tokens)

    def _close_up(self) -> None:
        """Move rows from the end into free slots once half of those in use are free."""
        used = [slot for slot, row in enumerate(self._slots) if row is not None]
        if 2 * len(used) > used[-1] + 1:
            return
        targets = [slot for slot in range(len(used)) if self._slots[slot] is None]
        sources = used[len(used) - len(targets) :]
        at, to = (torch.tensor(slots, device=self.model.device) for slots in (sources, targets))
        for state in (self._pool, self._history):
            state.write_(to, state.select(at))
        for buffer in (self._last_b, self._alive_b, self._left_b, self._ends_be):
            buffer[to] = buffer[at]
        self._alive_b[at] = 0
        configs = [self._sampler.configs[slot] for slot in sources]
        self._sampler.put([*targets, *sources], [*configs, *[SamplingConfig()] * len(sources)])
        if self.drafter is not None:
            self.drafter.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self._slots[target], self._slots[source] = self._slots[source], None

    def _run(self, n: int, k: int) -> None:
        """One round over the first `n` slots, on a GPU as one graph from its third time on."""
        key = (n, k, self._sampler.features)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
        elif not self._captures or key not in self._seen:
            # What is compiled at its first call, or asks the device then, must have done so before.
            self._seen.add(key)
            self._compiled(n, k)
        else:
            graph = torch.cuda.CUDAGraph()
            # One round at a time: all graphs may use the same memory for what they forget.
            memory = next((other.pool() for other in self._graphs.values()), None)
            try:
                with torch.cuda.graph(graph, pool=memory):
                    self._compiled(n, k)
            except RuntimeError as error:
                warnings.warn(f"a round is launched piece by piece, which is slower: {error}", stacklevel=2)
                self._captures = False
                self._compiled(n, k)
            else:
                self._graphs[key] = graph
                graph.replay()

    def _round(self, n: int, k: int) -> None:
        pool, history, alive_b = self._pool.first(n), self._history.first(n), self._alive_b[:n]
        draft = Draft.none(n, self.model.device)
        if k and self.drafter is not None:
            draft = self.drafter.propose(n, k, self._sampler, history)
            # No more than the row may still give, one of them not guessed; none where nothing is under way.
            length_b = torch.minimum(draft.length_b, (self._left_b[:n] - 1).clamp(min=0)) * alive_b
            draft = Draft(draft.tokens_bk, length_b, draft.q_bkv)
            if not self._static:
                draft = draft.cut(int(draft.length_b.max()))
        tokens_bt = torch.cat((self._last_b[:n, None], draft.tokens_bk), dim=1)
        lengths_b = 1 + draft.length_b if tokens_bt.shape[1] > 1 else None
        hidden_btd, update = self.model.read(tokens_bt, pool, lengths_b)
        logits_btv = self.model.head(hidden_btd)
        tokens_bt, n_b = verify(self._sampler, history, logits_btv, draft)
        kept_b = self._emit(tokens_bt, n_b, logits_btv)
        self._kept_b[:n] += torch.minimum(n_b - 1, kept_b)
        self._judged_b[:n] += torch.minimum(torch.minimum(draft.length_b, n_b), kept_b)
        self._guessed_b[:n] += draft.length_b
        update.commit_(pool, None, kept_b)
        if self.drafter is not None:
            self.drafter.observe(tokens_bt.clamp(min=0), kept_b, hidden_btd)

    def _emit(self, tokens_bt: Tensor, n_b: Tensor, logits_btv: Tensor) -> Tensor:
        """Write what stands up to a row's end, and return how many tokens that is, 0 for rows that have ended."""
        n, t = tokens_bt.shape
        columns_t, alive_b, left_b = torch.arange(t, device=tokens_bt.device), self._alive_b[:n], self._left_b[:n]
        ends_bt = (tokens_bt[..., None] == self._ends_be[:n, None]).any(-1) | (tokens_bt < 0)
        ends_bt = ends_bt & (columns_t < n_b[:, None])
        first_b = torch.where(ends_bt.any(1), ends_bt.to(torch.int64).argmax(1) + 1, t)
        kept_b = torch.minimum(torch.minimum(n_b, first_b), left_b) * alive_b
        kept_bt = columns_t < kept_b[:, None]
        out_bn = self._out_bn[:n]
        slots_bt = torch.where(kept_bt, self._fill_b[:n, None] + columns_t, out_bn.shape[1] - 1)
        out_bn.scatter_(1, slots_bt, tokens_bt)
        if self.logprobs:
            own_btv = logits_btv.float()
            score_bt = own_btv.gather(2, tokens_bt.clamp(min=0)[..., None])[..., 0] - own_btv.logsumexp(-1)
            self._score_bn[:n].scatter_(1, slots_bt, score_bt)
        history = self._history.first(n)
        for i in range(t):
            history.observe_(tokens_bt[:, i].clamp(min=0), kept_bt[:, i].to(torch.int64))
        last_b = tokens_bt.gather(1, (kept_b - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)
        self._last_b[:n] = torch.where(kept_b > 0, last_b, self._last_b[:n])
        self._fill_b[:n] += kept_b
        left_b -= kept_b
        alive_b *= ~((ends_bt & kept_bt).any(1) | (left_b == 0))
        return kept_b

    def _take(self, n: int, k: int, began: float) -> list[Piece]:
        """Look at what came: the one wait for the device."""
        counts = torch.stack((self._fill_b[:n], self._kept_b[:n], self._judged_b[:n], self._guessed_b[:n]), dim=1)
        rows = torch.cat((counts, self._out_bn[:n]), dim=1).tolist()
        scores = self._score_bn[:n].tolist()
        for buffer in (self._fill_b, self._kept_b, self._judged_b, self._guessed_b):
            buffer.zero_()
        pieces, given, ended = list[Piece](), 0, list[int]()
        for slot, ((fill, _, _, _, *tokens), row_scores) in enumerate(zip(rows, scores, strict=True)):
            row = self._slots[slot]
            if row is None or not fill:
                continue
            given += fill
            mine = self._pieces(row, tokens[:fill], row_scores)
            pieces += mine
            if mine[-1].finish is not None:
                ended.append(slot)
        self._leave(ended)
        live = sum(1 for fill, *_ in rows if fill)
        kept, judged, guessed = (sum(row[i] for row in rows) for i in (1, 2, 3))
        look = Look(live, k, self.rounds, given, guessed, judged, kept, time.perf_counter() - began)
        self.looks.append(look)
        self.pace.learn(look)
        if self.on_look is not None:
            self.on_look(look)
        return pieces

    def _pieces(self, row: _Row, tokens: Sequence[int], scores: Sequence[float]) -> list[Piece]:
        """The new tokens of a row as pieces, up to the one that ends it."""
        limits, text, ends = row.request.limits, row.text, self._ends(row)
        pieces: list[Piece] = []
        for i, token in enumerate(tokens):
            row.drawn += 1
            row.read += 1
            row.tokens.append(token)
            shown = text.push(token) if text is not None and token >= 0 and token not in ends else ""
            finish = None
            if token < 0:
                finish = "diverged"
            elif token in ends:
                finish = "end"
            elif text is not None and text.stopped:
                finish = "stop"
            elif row.drawn == limits.max_new_tokens:
                finish = "length"
            if finish is not None and text is not None:
                shown += text.finish()
            pieces.append(Piece(row.id, token, shown, scores[i] if self.logprobs else float("nan"), finish))
            if finish is not None:
                break
        return pieces

    def _leave(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        for slot in slots:
            self._slots[slot] = None
        self._alive_b[torch.tensor(slots, device=self.model.device)] = 0
        self._sampler.put(slots, [SamplingConfig()] * len(slots))
