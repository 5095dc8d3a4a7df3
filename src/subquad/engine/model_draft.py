"""A model as drafter: it reads what stood, and draws guesses that it forgets again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.state import precise
from subquad.engine.draft import Draft, Drafter, Transcript
from subquad.engine.history import History
from subquad.engine.request import check_model
from subquad.engine.sampler import Sampler
from subquad.engine.translate import Foreign, TranslatedTranscript, Translation
from subquad.engine.verify import DRAFT_STREAM
from subquad.models.stack import Stack, StackState
from subquad.ops.draw import among_all, guess_
from subquad.ops.slots import keep_last_

# Tokens of a read that are usual: what stood since the last one, or guesses.
FEW = 16
# Columns read at once of what the drafter has missed.
CATCH_UP = 256


class Guessable:
    """A model's head over the tokens that may be guessed, computing no others (arXiv 2502.14856).

    All ids are those of the model that is guessed for.

    Args:
        model: whose head it is.
        ids: of those tokens; None is all.
        translation: of these tokens where the model has others; then `ids` are some that both have.

    Attributes:
        ids_m: of those tokens, ascending; None is all.
        place_v: int64, where each token stands among them, m where it does not.

    Raises:
        ConfigError: no ids, or ids that there are not.
    """

    def __init__(self, model: Stack, ids: Sequence[int] | None, translation: Translation | None = None) -> None:
        self.model = model
        self.size = model.config.vocab_size if translation is None else len(translation.pieces)
        self.ids_m: Tensor | None = None
        self.place_v: Tensor | None = None
        self._own_v: Tensor | None = None
        if ids is not None:
            wrong = next((i for i in ids if not 0 <= i < self.size), None)
            if wrong is not None or not ids:
                raise ConfigError(
                    f"draft vocabulary: expected ids from 0 to {self.size - 1}, got {wrong}; write it anew"
                )
            self.ids_m = own_m = torch.tensor(sorted(set(ids)), device=model.device)
            self.place_v = torch.full((self.size,), len(own_m), device=model.device)
            self.place_v[own_m] = torch.arange(len(own_m), device=model.device)
            if translation is not None:
                self._own_v = translation.table(model.device)[0][:, 0]
                own_m = self._own_v[self.ids_m]
            self._head_md = model.lm_head.weight.detach()[own_m]

    def few(self, hidden_bd: Tensor) -> Tensor:
        """Logits ``[b, m]`` of the tokens that may be guessed, in the order of their ids."""
        return self.model.head(hidden_bd) if self.ids_m is None else F.linear(hidden_bd, self._head_md)

    def among_all(self, few_bm: Tensor) -> Tensor:
        """These logits as ``[b, v]``, minus infinity for what is never guessed."""
        return among_all(few_bm, self.place_v, -torch.inf)

    def logits(self, hidden_bd: Tensor) -> Tensor:
        """Logits ``[b, v]``, minus infinity for what is never guessed."""
        return self.among_all(self.few(hidden_bd))

    def own(self, guesses_bt: Tensor) -> Tensor:
        """Guesses as the model's tokens."""
        return guesses_bt if self._own_v is None else self._own_v[guesses_bt]


def draw(
    length_b: Tensor,
    k: int,
    few: Callable[[Tensor], Tensor],
    guessable: Guessable,
    sampler: Sampler,
    history: History,
    *,
    coupled: bool,
) -> Draft:
    """`k` guesses for every row, each drawn behind those before it.

    Args:
        length_b: how many of them count.
        k: at least 1.
        few: gives `Guessable.few` behind guesses ``[b, i]``, one more at each call, the first with none.
        guessable: the tokens that may be guessed.
        sampler: of the rows.
        history: behind the rows' last tokens; not changed.
        coupled: draw each with the noise that the row will draw its own token with (arXiv 2408.07978): all tokens are
            then those of plain decoding, at any temperature, and a few more guesses fall.
    """
    independent, past, q_bkm = sampler.draws and not coupled, history, None
    tokens_bk = length_b.new_empty(len(length_b), k)
    # Other processors than a temperature see all tokens.
    whole = sampler.shapes
    for i in range(k):
        few_bm = few(tokens_bk[:, :i])
        logits_bm = guessable.among_all(few_bm) if whole else few_bm
        logits_b1m, temperature_b = sampler.shaped(logits_bm[:, None], past)
        if independent and q_bkm is None:
            q_bkm = logits_bm.new_empty(len(length_b), k, logits_bm.shape[1], dtype=precise(logits_bm.dtype))
        guess_(
            tokens_bk, q_bkm, i, logits_b1m[:, 0], *sampler.noise(history), ids_m=None if whole else guessable.ids_m,
            temperature_b=temperature_b, draws=sampler.draws, stream=DRAFT_STREAM if independent else 0,
        )  # fmt: skip
        if sampler.penalises:
            past = past.after(tokens_bk[:, i])
    return Draft(tokens_bk, length_b, q_bkm, place_v=None if whole else guessable.place_v)


class ModelDrafter(Drafter):
    """What drafters with a model have in common.

    Its state holds only tokens that were kept. Each guess is drawn behind a read of all guesses before it, against that
    state; these reads are forgotten, and the tokens that stood are read in the next round, with its first guess. So
    nothing is copied and nothing rolled back, in a recurrent state as in a cache.

    A model of another vocabulary guesses what both have: its q is its own distribution over these tokens, renormalised.
    It reads all tokens in its own; how many guesses stand depends on how, and no token that comes.

    Args:
        model: the drafter, on the device of the model that it guesses for; `Foreign` where its vocabulary is another.
        coupled: as in `draw`.
        vocab: ids of the tokens that may be guessed; see `Guessable`.
    """

    always = True
    translation: Translation | None = None

    def __init__(self, model: Stack, *, coupled: bool = False, vocab: Sequence[int] | None = None) -> None:
        check_model(model)
        if isinstance(model, Foreign):
            self.translation, common = model.translation, model.translation.common
            vocab = sorted(common if vocab is None else common.intersection(vocab))
        self.model, self.coupled, self.vocab = model, coupled, vocab

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Allocate a state of the drafter's own; see `Drafter.open`."""
        self._guessable = Guessable(self.model, self.vocab, self.translation)
        mine, theirs = self._guessable.size, target.config.vocab_size
        if mine != theirs:
            raise ConfigError(
                f"draft model: expected a vocabulary of {theirs} tokens, got {mine}; use a smaller model of the same "
                "tokenizer, or translate its tokens (subquad.engine.translate)"
            )
        if self.model.device != target.device:
            raise ConfigError(f"draft model: expected it on {target.device}, got {self.model.device}; move it there")
        self._told, self._widest = Transcript(rows, capacity, target.device), 1
        if self.translation is not None:
            self._widest = self.translation.widest
            self._told = TranslatedTranscript(self.translation, rows, capacity, target.device)
        self._pool = self.model.init_pool(rows, self._told.room, FEW)

    @torch.no_grad()
    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Begin anew; the prompts are read at the next guess. See `Drafter.put`."""
        self._pool.clear_(torch.tensor(rows, device=self.model.device))
        self._told.put(rows, prompts)

    @torch.no_grad()
    def prepare(self, rows: int, k: int) -> None:
        """Read what was missed while nothing was guessed, but for what the next guess reads anyway."""
        while True:
            lag_b = (self._told.length_b - self._pool.seen_b)[:rows]
            if not rows or int(lag_b.max()) <= k + self._widest:
                return
            self._read(rows, min(CATCH_UP, int(lag_b.max()) - 1), leave=1)

    def _read(self, rows: int, width: int, leave: int = 0) -> Tensor:
        """Read at most `width` told tokens of each row but the last `leave`; the stream behind the last, ``[b, d]``."""
        pool = self._pool.first(rows)
        lengths_b = (self._told.length_b[:rows] - pool.seen_b - leave).clamp(0, width)
        columns_t = torch.arange(width, device=self.model.device)
        tokens_bt = self._told.read(pool.seen_b[:, None] + columns_t)
        hidden_btd, update = self.model.read(tokens_bt, pool, lengths_b)
        update.commit_(pool, None, lengths_b)
        last_bd = hidden_btd[:, 0].clone()
        keep_last_(last_bd, hidden_btd, lengths_b)
        return last_bd

    def _read_kept(self, rows: int, k: int) -> tuple[Tensor, Tensor]:
        """Read what stood since k guesses: the stream behind it, ``[b, d]``, and how many guesses that allows, ``[b]``.

        A guess is one token of the drafter's, and only the token behind those that stood may be several. More come
        where another drafter guessed: then some wait for the next round, and until all are read there is no guess. Nor
        is there one behind a token of which nothing can be read.
        """
        width = k + self._widest
        lag_b = self._told.length_b[:rows] - self._pool.seen_b[:rows]
        return self._read(rows, width), torch.where((lag_b > 0) & (lag_b <= width), k, 0)

    def _read_guesses(self, guesses_bt: Tensor, state: StackState) -> Tensor:
        """Read guesses, to be forgotten: the stream behind them, ``[b, d]``."""
        return self.model.read(self._guessable.own(guesses_bt), state)[0][:, -1]

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """k reads, the first of what stood since the last time; see `Drafter.propose`."""
        first_bd, length_b = self._read_kept(rows, k)

        def few(guesses_bi: Tensor) -> Tensor:
            if not guesses_bi.shape[1]:
                return self._guessable.few(first_bd)
            return self._guessable.few(self._read_guesses(guesses_bi, self._pool.first(rows)))

        return draw(length_b, k, few, self._guessable, sampler, history, coupled=self.coupled)

    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """Note them; see `Drafter.observe`."""
        self._told.add(tokens_bt, n_b)

    @torch.no_grad()
    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """State and tokens; see `Drafter.move`."""
        at, to = (torch.tensor(slots, device=self.model.device) for slots in (sources, targets))
        self._pool.write_(to, self._pool.select(at))
        self._told.move(sources, targets)
