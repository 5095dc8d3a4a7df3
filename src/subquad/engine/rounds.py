"""What a round does on the device: guess, read, decide, write and commit, in buffers that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.layout import Layout
from subquad.core.transfer import sent
from subquad.engine.chains import select, verify_chains
from subquad.engine.draft import Draft, Drafter
from subquad.engine.given import Given
from subquad.engine.graphs import Graphs
from subquad.engine.history import History
from subquad.engine.masks import EXHAUSTED, Masks, Rule
from subquad.engine.relax import Relaxed, verify_relaxed
from subquad.engine.request import Request
from subquad.engine.sampler import IDLE, Sampler
from subquad.engine.scores import Scores
from subquad.engine.verify import verify
from subquad.models.stack import Stack, StackState
from subquad.ops.slots import Slots, emit_, lead

# Rounds that may be compiled for one model.
MOST_COMPILED = 1024
# Most tokens of a slot that a drafter is told at once.
MOST_TOLD = 16
# Slots up to which `ask` pays: among more of them some has a guess.
MOST_ASKED = 4


class Rounds:
    """The slots of an engine on the device. Nothing here waits for it but `take` and `ask`.

    Args:
        model: reads and commits.
        rows, capacity: of the state.
        block: most tokens that a round reads of a slot: its last, and the guesses.
        rounds: between two looks.
        drafter: guesses tokens, or None.
        compile: fuse a round with torch.compile.
        relaxed: which guesses stand beside the likeliest token; None is none.
    """

    def __init__(
        self,
        model: Stack,
        rows: int,
        capacity: int,
        block: int,
        rounds: int,
        drafter: Drafter | None,
        *,
        compile: bool,
        relaxed: Relaxed | None = None,
    ) -> None:
        device = model.device
        self.model, self.rows, self.drafter = model, rows, drafter
        self.capacity, self.relaxed = capacity, relaxed
        self._loose_b = torch.zeros(rows, dtype=torch.int64, device=device)
        self.pool = model.init_pool(rows, capacity, block)
        self._sampler = Sampler([IDLE] * rows, device, model.config.vocab_size)
        self._history = History.start([[0]] * rows, 0, device)
        self._nothing = Draft.none(rows, device)
        width = rounds * block
        self._slots = Slots.empty(rows, width, device)
        # Tokens of a row before which it can't end; here as well, so that nobody asks the device whether there are any.
        self._least_b, self._least = torch.zeros(rows, dtype=torch.int64, device=device), [0] * rows
        self._barring = False
        self.masks = Masks(rows, block, model.config.vocab_size, device)
        # Guesses that wait for their masks, by what was asked for.
        self._held: dict[Any, Draft] = {}
        self.scores = Scores(rows, width, model.config.vocab_size, device)
        self._looked = rounds
        # How many guesses there are that nobody reads, and they.
        self._foreseen_bk = torch.zeros(rows, block, dtype=torch.int64, device=device)
        # The same of guesses that were asked for, how many are worth a read, and whether a slot is under way.
        self._asked_bk, self._found_2 = self._foreseen_bk.clone(), torch.zeros(2, dtype=torch.int64, device=device)
        self.graphs = Graphs(device.type == "cuda", "rounds")
        # By how many slots are emptied, and which.
        self.changes = Graphs(device.type == "cuda", "changes of slots")
        self._cleared: dict[int, Tensor] = {}
        # Of a fixed shape; else a round reads no more guesses than some row has, which asks the device.
        self.static = self.graphs.captures or compile
        self._compiled = torch.compile(self._round, fullgraph=True, dynamic=False) if compile else None
        seldom = drafter is not None and not drafter.always and not drafter.forks
        self.most_asked = MOST_ASKED if seldom and not compile else 0
        # The streams that a drafter reads, and those of a look's tokens, which plain rounds leave to it.
        self.aux_layers, self._hidden_bnd = (), None
        if drafter is not None:
            drafter.open(model, rows, capacity)
            self.aux_layers = drafter.aux_layers
        if drafter is not None and drafter.hears:
            shape = (rows, rounds, (1 + len(self.aux_layers)) * model.config.d_model)
            self._hidden_bnd = torch.zeros(shape, device=device, dtype=model.dtype)

    @property
    def captured(self) -> bool:
        """Whether some round is one CUDA graph by now."""
        return len(self.graphs) > 0

    def _at(self, numbers: Sequence[Any]) -> Tensor:
        return sent(torch.tensor(numbers), self.model.device)

    def admit(self, slots: Sequence[int], requests: Sequence[Request], drawn: Sequence[int]) -> None:
        """Empty `slots` for `requests`, of which so many tokens were drawn before; none takes part in rounds yet."""
        self._clear(slots)
        if self.drafter is not None:
            self.drafter.drop(slots)
        self._sampler.put(slots, [request.sampling for request in requests])
        self._widen_history()
        ends = [sorted(request.ends(self.model)) for request in requests]
        width = self._slots.ends_be.shape[1]
        if (more := max(map(len, ends)) - width) > 0:
            width += more
            self._slots = self._slots._replace(ends_be=F.pad(self._slots.ends_be, (0, more), value=-2))
            self._forget_rounds()
        left = [request.limits.max_new_tokens - n for request, n in zip(requests, drawn, strict=True)]
        padded = [row + [-2] * (width - len(row)) for row in ends]
        # In one piece, since each transfer costs as much as a launch.
        numbers_bn = self._at([[*three, *row] for *three, row in zip(slots, drawn, left, padded, strict=True)])
        (at_b, drawn_b, left_b), ends_be = numbers_bn[:, :3].unbind(1), numbers_bn[:, 3:]
        if self._history.room == (0, 0):
            self._history.clear_(at_b)
        else:
            (vocab_size, room), prompts = self._history.room, [request.prompt for request in requests]
            self._history.write_(at_b, History.start(prompts, vocab_size, self.model.device, room))
        self._history.step_b[at_b] = drawn_b
        self._slots.ends_be[at_b] = ends_be
        self._slots.left_b[at_b] = left_b
        self._slots.alive_b.index_fill_(0, at_b, 0)
        self._hold(slots, [request.limits.min_new_tokens for request in requests])
        self.scores.put(slots, [request.logprobs for request in requests])

    def _clear(self, slots: Sequence[int]) -> None:
        """Empty the state of some slots, on a GPU by a graph for as many, or for more of which some come twice."""
        wide = 1 << (len(slots) - 1).bit_length() if self.changes.captures else len(slots)
        at_b = self._at([*slots, *[slots[0]] * (wide - len(slots))])
        held_b = self._cleared.setdefault(wide, at_b)
        held_b.copy_(at_b)
        self.changes.launch(wide, lambda: self.pool.clear_(held_b))

    def _hold(self, slots: Sequence[int], least: Sequence[int]) -> None:
        """Let no end token come in `slots` before so many others."""
        if all(self._least[slot] == n for slot, n in zip(slots, least, strict=True)):
            return
        for slot, n in zip(slots, least, strict=True):
            self._least[slot] = n
        self._least_b[self._at(slots)] = self._at(least)
        self._barring = any(self._least)

    def _widen_history(self) -> None:
        """Make room for what processors ask of the past; rows under way ask for nothing that there is no room for."""
        counted, texts = self._sampler.counts_tokens, self._sampler.reads_text
        asked = (self.model.config.vocab_size if counted else 0, self.capacity if texts else 0)
        vocab_size, room = map(max, zip(self._history.room, asked, strict=True))
        if (vocab_size, room) == self._history.room:
            return
        wide = History.start([[0]] * self.rows, vocab_size, self.model.device, room)
        wide.recall_(torch.arange(self.rows, device=self.model.device), self._history)
        self._history = wide
        self._forget_rounds()

    def start(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], rules: Sequence[Rule | None] = ()) -> None:
        """From now on `slots`, which have read `tokens` but the last, take part in rounds, and follow `rules`."""
        if not slots:
            return
        at = self._at(slots)
        self.masks.put(slots, rules or [None] * len(slots))
        self._slots.last_b[at] = self._at([row[-1] for row in tokens])
        self._slots.alive_b.index_fill_(0, at, 1)
        if self.drafter is not None:
            self.drafter.put(slots, tokens)

    def leave(self, slots: Sequence[int]) -> None:
        """From now on `slots` take part no more."""
        if slots:
            self._slots.alive_b.index_fill_(0, self._at(slots), 0)
            self._sampler.leave(slots)
            self._hold(slots, [0] * len(slots))
            self.masks.put(slots, [None] * len(slots))
            self.scores.put(slots, [None] * len(slots))

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """What stands in the slots `sources` goes to `targets`; no slot is in both."""
        at, to = self._at(sources), self._at(targets)
        for state in (self.pool, self._history):
            state.write_(to, state.select(at))
        for buffer in self._slots:
            buffer[to] = buffer[at]
        self._slots.alive_b.index_fill_(0, at, 0)
        self._hold([*targets, *sources], [*(self._least[slot] for slot in sources), *[0] * len(sources)])
        self.masks.move(sources, targets)
        self.scores.move(sources, targets)
        configs = [self._sampler.configs[slot] for slot in sources]
        self._sampler.put([*targets, *sources], [*configs, *[IDLE] * len(sources)])
        if self.drafter is not None:
            self.drafter.move(sources, targets)

    def save(self, slot: int, read: int) -> tuple[StackState, History]:
        """Copies of what a slot that has read so many tokens knows."""
        at = self._at([slot])
        return self.pool.select(at).settled().cut(read).snapshot(), self._history.select(at)

    def restore(self, slot: int, state: StackState, history: History | None = None) -> None:
        """Write what `save` gave, or a state alone, into an empty slot."""
        at = self._at([slot])
        self.pool.write_(at, state)
        # Room that has come since then is empty for a row that needs none.
        if history is not None:
            self._history.recall_(at, history)

    def foresee(self, n: int, k: int) -> None:
        """Guess for the first `n` slots without reading it: what comes then tells what guesses would have brought."""
        self.graphs.launch(("foresee", n, k, self._sampler.features, self.asks(n)), lambda: self._foresee(n, k))

    def _foresee(self, n: int, k: int) -> None:
        worth_b = self._guess_into(self._foreseen_bk, n, k)
        if self.asks(n):  # no more would be read
            self._foreseen_bk[:n, 0] = worth_b

    def _guess_into(self, guessed_bk: Tensor, n: int, k: int) -> Tensor:
        draft, alive_b = self._guess(n, k), self._slots.alive_b[:n]
        assert draft.q_bkv is None, "what a drafter guesses that does not always guess is certain"
        guessed_bk[:n, 0] = draft.length_b * alive_b
        guessed_bk[:n, 1 : k + 1] = draft.tokens_bk
        return draft.worth_b * alive_b  # of slots under way

    def asks(self, n: int) -> bool:
        """Whether rounds over the first `n` slots are to `ask`: then they read no guesses where there are none.

        A graph reads as many as it was made for, so that to choose one costs a wait. That pays where slots are few and
        guesses are not always there.
        """
        return n <= self.most_asked and not self.masks.on

    def ask(self, n: int, k: int) -> tuple[int, bool, bool]:
        """Guess for the first `n` slots and wait: how many are worth a read, whether any is under way, and as `run`.

        A round of `run` with `asked` reads as many of them as it is told.
        """
        steady = self.graphs.launch(("ask", n, k, self._sampler.features), lambda: self._ask(n, k))
        worth, alive = self._found_2.tolist()
        return worth, alive > 0, steady

    def _ask(self, n: int, k: int) -> None:
        worth_b = self._guess_into(self._asked_bk, n, k)
        self._found_2.copy_(torch.stack((worth_b, self._slots.alive_b[:n]), 1).amax(0))

    def catch_up(self, n: int) -> None:
        """Tell the drafter what plain rounds gave the first `n` slots since the last look, all at once."""
        self.graphs.launch(("catch up", n), lambda: self._catch_up(n))

    def _catch_up(self, n: int) -> None:
        assert self.drafter is not None
        slots = self._slots.first(n)
        for start in range(0, self._looked, MOST_TOLD):
            stop = min(start + MOST_TOLD, self._looked)
            tokens_bt = slots.out_bn[:, start:stop].clamp(min=0)
            hidden_bnd = tokens_bt.new_empty(n, self._looked, 0) if self._hidden_bnd is None else self._hidden_bnd[:n]
            n_b = (slots.fill_b - start).clamp(0, stop - start)
            self.drafter.observe(tokens_bt, n_b, hidden_bnd[:, start:stop])

    def run(self, n: int, k: int, *, asked: bool = False) -> bool:
        """One round over the first `n` slots, on a GPU as one graph from its third time on.

        Where it was `asked` for guesses, it reads `k` of those, and the drafter is told what came even with none.

        Where some slot has a rule these are two, and between them the host looks at the guesses: what was given before
        must have been taken, since masks follow from it.

        Returns:
            Whether all of it had been done before, so that its time says what such a round takes.
        """
        key = (n, k, self._sampler.features, self._barring, self.scores.level)
        if asked:
            return self.graphs.launch(("asked", key), lambda: self._round(n, k, None, asked=True))
        if not self.masks.on:
            return self.graphs.launch(key, lambda: self._do(n, k, None))
        steady = not k or self.graphs.launch(("guess", key), lambda: self._hold_guesses(key))
        if key not in self._held:
            self._held[key] = self.masks.none(n)
        held = self._held[key]
        self.masks.look(held)
        return self.graphs.launch(("masked", key), lambda: self._do(n, k, held)) and steady

    def _hold_guesses(self, key: Any) -> None:
        self._held[key] = self.masks.hold(self._guess(*key[:2]))

    def _do(self, n: int, k: int, held: Draft | None) -> None:
        if self._compiled is None:
            return self._round(n, k, held)
        # One function for each number of rows and guesses, and for what is asked of rows: many, and each on purpose.
        config: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
        with config.patch(recompile_limit=MOST_COMPILED, accumulated_recompile_limit=MOST_COMPILED):
            return self._compiled(n, k, held)

    def _forget_rounds(self) -> None:
        """Buffers have been replaced: what was captured reads the old ones, and their size may be a kernel's own."""
        self.graphs.forget()

    def _round(self, n: int, k: int, held: Draft | None, *, asked: bool = False) -> None:
        pool, history, slots = self.pool.first(n), self._history.first(n), self._slots.first(n)
        draft = held
        if draft is None and asked and k:
            draft = Draft(self._asked_bk[:n, 1 : k + 1], self._asked_bk[:n, 0].clamp(max=k))
        draft, tokens_bt, lengths_b = self._lead(n, self._guess(n, k) if draft is None else draft)
        state = pool if draft.chains == 1 else pool.fork(draft.chains)
        layout = None
        if tokens_bt.shape[1] == 1 and draft.chains == 1:
            # Without a guess every row that is under way keeps its one token, whatever comes behind it.
            layout = Layout.dense(n, 1, start_b=pool.seen_b, kept_b=slots.alive_b)
        hidden_btd, update = self.model.read(tokens_bt, state, lengths_b, layout, self.aux_layers)
        logits_btv = self.model.head(hidden_btd[..., : self.model.config.d_model])
        allowed_btv = logits_btv if held is None else self.masks.apply(logits_btv, held, draft)
        allowed_btv = self._without_ends(allowed_btv, n, draft) if self._barring else allowed_btv
        rows, loose_bt = None, None
        if self.relaxed is not None:
            tokens_bt, n_b, loose_bt = verify_relaxed(self._sampler, history, allowed_btv, draft, self.relaxed)
        elif draft.chains == 1:
            tokens_bt, n_b = verify(self._sampler, history, allowed_btv, draft)
        else:
            tokens_bt, n_b, at_b = verify_chains(self._sampler, history, allowed_btv, draft)
            hidden_btd, logits_btv, update = hidden_btd[at_b], logits_btv[at_b], select(update, at_b)
            # Named, since it is not the pool that was read.
            rows = torch.arange(n, device=self.model.device)
        if held is not None:
            finite_bt = logits_btv.amax(-1).isfinite()
            tokens_bt = torch.where((tokens_bt < 0) & finite_bt, EXHAUSTED, tokens_bt)
        told = self.drafter if k or asked else None
        if told is None and self._hidden_bnd is not None:
            # A row that has ended writes where nothing will be read.
            at_b11 = slots.fill_b.clamp(max=self._hidden_bnd.shape[1] - 1)[:, None, None]
            self._hidden_bnd[:n].scatter_(1, at_b11.expand_as(hidden_btd), hidden_btd)
        fill_b = slots.fill_b if self.scores.level is None else slots.fill_b.clone()
        # Guesses of several chains at one position count as one.
        kept_b, told_bt = emit_(slots, history.step_b, tokens_bt, n_b, draft.length_b)
        history.observe_block_(told_bt, kept_b)
        if loose_bt is not None:
            columns_t = torch.arange(loose_bt.shape[1], device=loose_bt.device)
            self._loose_b[:n] += (loose_bt & (columns_t < kept_b[:, None])).sum(1)
        self.scores.note(tokens_bt, kept_b, logits_btv, fill_b)
        update.commit_(pool, rows, kept_b)
        if told is not None:
            told.observe(told_bt, kept_b, hidden_btd)

    def _guess(self, n: int, k: int) -> Draft:
        if not k or self.drafter is None:
            return Draft(self._nothing.tokens_bk[:n], self._nothing.length_b[:n])
        return self.drafter.propose(n, k, self._sampler, self._history.first(n))

    def _lead(self, n: int, draft: Draft) -> tuple[Draft, Tensor, Tensor | None]:
        """The guesses that are read, the block that they make with each row's last token, how many count, None: all."""
        slots = self._slots.first(n)
        if not draft.tokens_bk.shape[1]:
            return draft, slots.last_b[:, None], None
        if draft.chains == 1 and self.static:
            tokens_bt, lengths_b, length_b = lead(slots, draft.tokens_bk, draft.length_b)
            return replace(draft, length_b=length_b), tokens_bt, lengths_b
        # No more than the row may still give, one of them not guessed; none where nothing is under way.
        length_b = torch.minimum(draft.length_b, (slots.left_b - 1).clamp(min=0)) * slots.alive_b
        draft = replace(draft, length_b=length_b)
        if not self.static:
            draft = draft.cut(int(draft.length_b.max()))
        tokens_bt = torch.cat((draft.fork(slots.last_b)[:, None], draft.tokens_bk), dim=1)
        return draft, tokens_bt, draft.fork(1 + draft.length_b) if tokens_bt.shape[1] > 1 else None

    def _without_ends(self, logits_btv: Tensor, n: int, draft: Draft) -> Tensor:
        """The logits with no end token where a row can't end yet."""
        t, vocab_size = logits_btv.shape[1:]
        step_bt = self._history.step_b[:n, None] + torch.arange(t, device=logits_btv.device)
        early_bt = draft.fork(step_bt < self._least_b[:n, None])
        ends_b1e = draft.fork(self._slots.ends_be[:n])[:, None]
        barred_bte = early_bt[..., None] & (ends_b1e >= 0) & (ends_b1e < vocab_size)
        # Where nothing is barred the place, whichever it is, keeps what it has.
        at_bte = torch.where(barred_bte, ends_b1e, 0)
        ceiling_bte = torch.where(barred_bte, -torch.inf, torch.inf).to(logits_btv.dtype)
        return logits_btv.scatter_reduce(2, at_bte, ceiling_bte, "amin")

    def take(self, n: int) -> list[Given]:
        """What the first `n` slots were given since the last time: the one wait for the device, but for scores."""
        slots = self._slots.first(n)
        loose_b = self._loose_b[:n]
        counts = torch.stack((slots.fill_b, slots.kept_b, slots.judged_b, slots.guessed_b, loose_b), dim=1)
        width = self._foreseen_bk.shape[1]
        rows = torch.cat((counts, self._foreseen_bk[:n], slots.out_bn), dim=1).tolist()
        scored = self.scores.take([row[0] for row in rows])
        every = self._slots
        for buffer in (every.fill_b, every.kept_b, every.judged_b, every.guessed_b, self._loose_b, self._foreseen_bk):
            buffer.zero_()
        return [
            Given(more[width:][:fill], own, kept, judged, guessed, more[1:width][: more[0]], loose)
            for (fill, kept, judged, guessed, loose, *more), own in zip(rows, scored, strict=True)
        ]
