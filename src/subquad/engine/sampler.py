"""From logits to tokens: processors in a fixed order, and noise that belongs to a row alone.

The order is that of transformers: bias, repetition penalty, presence and frequency penalties, repeated n-grams, bad
words, temperature, top-k, top-p, min-p, typical-p, epsilon and eta cutoffs. The distribution that remains after the
last of them is the p of speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.state import State, axes, precise
from subquad.ops.draw import draw


@dataclass(frozen=True)
class SamplingConfig:
    """How one row chooses its next token; the defaults are greedy.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens and ties with the last of them; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this (arXiv 1904.09751); 1 keeps all.
        min_p: drop tokens below this share of the most likely one's probability (arXiv 2407.01082); 0 keeps all.
        typical_p: keep the tokens whose surprise is nearest to what is expected, of at least this probability together
            (arXiv 2202.00666); 1 keeps all.
        epsilon_cutoff: drop tokens of less probability than this, but for the most likely (arXiv 2210.15191); 0 keeps
            all.
        eta_cutoff: as `epsilon_cutoff`, and below ``sqrt(eta) * exp(-entropy)`` where that is less (arXiv 2210.15191);
            0 keeps all.
        no_repeat_ngram_size: so many tokens in succession never come twice in prompt and output together; 0 lets them.
        bad_words_ids: sequences of token ids that are never completed by the output's tokens. A row that these two
            leave no token for ends as one whose logits are not finite.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output
            (arXiv 1909.05858); 1 is none.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for each time a token stands in the output.
        logit_bias: added to the logits of tokens by id; minus infinity forbids one.
        seed: of this row's noise.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""

        def expect(holds: bool, name: str, wanted: str, remedy: str) -> None:
            if not holds:
                raise ConfigError(f"{name}: expected {wanted}, got {getattr(self, name)}; {remedy}")

        finite = float("inf")
        warm = self.temperature == 0 or 1e-6 <= self.temperature < finite
        expect(warm, "temperature", "0, or a finite number of at least 1e-6", "0 is greedy")
        expect(self.top_k >= 0, "top_k", "an integer of at least 0", "0 keeps all tokens")
        expect(0 < self.top_p <= 1, "top_p", "a number in (0, 1]", "1 keeps all tokens")
        expect(0 <= self.min_p <= 1, "min_p", "a number in [0, 1]", "0 keeps all tokens")
        expect(0 < self.typical_p <= 1, "typical_p", "a number in (0, 1]", "1 keeps all tokens")
        expect(0 <= self.epsilon_cutoff < 1, "epsilon_cutoff", "a number in [0, 1)", "0 keeps all tokens")
        expect(0 <= self.eta_cutoff < 1, "eta_cutoff", "a number in [0, 1)", "0 keeps all tokens")
        sized = isinstance(self.no_repeat_ngram_size, Integral) and 0 <= self.no_repeat_ngram_size < 2**31
        expect(sized, "no_repeat_ngram_size", "an integer in [0, 2**31)", "0 lets all be repeated")
        for word in self.bad_words_ids:
            if not word or any(not isinstance(token, Integral) or token < 0 for token in word):
                raise ConfigError(
                    f"bad_words_ids: expected sequences of at least one token id, each at least 0, got {word}; drop it"
                )
        expect(0 < self.repetition_penalty < finite, "repetition_penalty", "a number above 0", "1 is no penalty")
        expect(abs(self.presence_penalty) < finite, "presence_penalty", "a finite number", "0 is no penalty")
        expect(abs(self.frequency_penalty) < finite, "frequency_penalty", "a finite number", "0 is no penalty")
        for token, bias in self.logit_bias.items():
            if token < 0 or not bias < finite:
                raise ConfigError(
                    f"logit_bias: expected token ids of at least 0 with a finite number or minus infinity, got "
                    f"{token}: {bias}; drop it"
                )
        expect(0 <= self.seed < 2**63, "seed", "an integer in [0, 2**63)", "choose one there")

    @property
    def penalises(self) -> bool:
        """Whether the next token depends on which tokens came before, besides through the model."""
        counted = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return counted or self.reads_text

    @property
    def reads_text(self) -> bool:
        """Whether the next token depends on the order in which tokens came before, besides through the model."""
        return self.no_repeat_ngram_size > 0 or any(len(word) > 1 for word in self.bad_words_ids)


@dataclass(frozen=True)
class History(State):
    """What the processors and the noise know of each row's past.

    v is 0 where no row has a penalty, n where no row forbids tokens for those that came just before. What lies beyond
    a row's length in `text_bn` says nothing, and its last column takes what goes beyond all bounds.
    """

    step_b: Tensor = axes("b", precision="index")
    prompt_bv: Tensor = axes("b v", precision="index")
    count_bv: Tensor = axes("b v", precision="index")
    text_bn: Tensor = axes("b n", precision="index")
    length_b: Tensor = axes("b", precision="index")

    @staticmethod
    def start(
        prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str | None = None, tokens: int = 0
    ) -> History:
        """Of rows that have produced nothing yet.

        Args:
            prompts: one a row.
            vocab_size: v; 0 where nothing is penalised.
            device: of the tensors.
            tokens: most of a row behind which another is drawn; 0 where nobody reads them.
        """
        rows = len(prompts)
        prompt_bv = torch.zeros(rows, vocab_size, dtype=torch.bool)
        text_bn = torch.zeros(rows, tokens + 1 if tokens else 0, dtype=torch.int64)
        for row, prompt in enumerate(prompts if vocab_size or tokens else ()):
            ids = torch.tensor(prompt)
            if vocab_size:
                prompt_bv[row, ids] = True
            if tokens:
                text_bn[row, : len(ids)] = ids
        return History(
            torch.zeros(rows, dtype=torch.int64, device=device),
            prompt_bv.to(device),
            torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
            text_bn.to(device),
            torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64, device=device),
        )

    @property
    def room(self) -> tuple[int, int]:
        """The ``vocab_size`` and ``tokens`` of `start`."""
        return self.count_bv.shape[1], max(self.text_bn.shape[1] - 1, 0)

    def recall_(self, rows: Tensor, other: History) -> None:
        """Overwrite `rows` in place with `other`'s, as far as both have the same room."""
        for (_, mine), (_, theirs) in zip(self.tensors(), other.tensors(), strict=True):
            if mine.shape[1:] == theirs.shape[1:]:
                mine.index_copy_(0, rows, theirs)

    def observe_(self, tokens_b: Tensor, n_b: Tensor) -> None:
        """Count `tokens_b` in place where `n_b` is 1, and not where it is 0."""
        self.step_b.add_(n_b)
        if self.count_bv.shape[1]:
            self.count_bv.scatter_add_(1, tokens_b[:, None], n_b[:, None].to(self.count_bv.dtype))
        if self.text_bn.shape[1]:
            self.text_bn.scatter_(1, self._end(), tokens_b[:, None])
            self.length_b.add_(n_b)

    def observe_block_(self, tokens_bt: Tensor, n_b: Tensor) -> None:
        """Count the first `n_b` of each row's tokens in place."""
        if self.room == (0, 0):
            self.step_b.add_(n_b)
            return
        for i in range(tokens_bt.shape[1]):
            self.observe_(tokens_bt[:, i], (n_b > i).to(torch.int64))

    def after(self, tokens_b: Tensor) -> History:
        """The history if every row went on with `tokens_b`; this one stays as it is."""
        count_bv, text_bn, length_b = self.count_bv, self.text_bn, self.length_b
        if count_bv.shape[1]:
            count_bv = count_bv.scatter_add(1, tokens_b[:, None], torch.ones_like(count_bv[:, :1]))
        if text_bn.shape[1]:
            text_bn, length_b = text_bn.scatter(1, self._end(), tokens_b[:, None]), length_b + 1
        return History(self.step_b + 1, self.prompt_bv, count_bv, text_bn, length_b)

    def _end(self) -> Tensor:
        """The column of each row's next token ``[b, 1]``."""
        return self.length_b.clamp(max=self.text_bn.shape[1] - 1)[:, None]


# Of a row that nobody asks: it decides nothing about which operations run.
IDLE = SamplingConfig()

# What the processors read of a row.
COLUMNS: Mapping[str, Callable[[SamplingConfig], float]] = {
    "repetition": lambda c: float(c.repetition_penalty),
    "presence": lambda c: float(c.presence_penalty),
    "frequency": lambda c: float(c.frequency_penalty),
    "temperature": lambda c: float(c.temperature or 1),
    "top_k": lambda c: c.top_k,
    "tail": lambda c: 1 - float(c.top_p),
    "min_p": lambda c: float(c.min_p),
    "typical_p": lambda c: float(c.typical_p),
    "epsilon": lambda c: float(c.epsilon_cutoff),
    "eta": lambda c: float(c.eta_cutoff),
    "ngram": lambda c: int(c.no_repeat_ngram_size),
}


def penalise_repetition(logits_bv: Tensor, seen_bv: Tensor, penalty: Tensor | float) -> Tensor:
    """``logit / penalty`` where positive and ``logit * penalty`` where negative, of the tokens seen."""
    penalised_bv = torch.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
    return torch.where(seen_bv, penalised_bv, logits_bv)


def penalise_counts(logits_bv: Tensor, count_bv: Tensor, presence: Tensor | float, frequency: Tensor | float) -> Tensor:
    """``logit - presence * [count > 0] - frequency * count``."""
    return logits_bv - presence * (count_bv > 0) - frequency * count_bv


def _back(history: History, d: int) -> Tensor:
    """The d-th last token of each row ``[b, 1]``; anything where it has fewer."""
    return history.text_bn.gather(1, (history.length_b - d).clamp(0, history.text_bn.shape[1] - 1)[:, None])


def find_ngrams(history: History, size_b1: Tensor, largest: int) -> Tensor:
    """Where in a row's text an n-gram ends that begins as the text's end does: there is a token that would repeat it.

    Args:
        history: of the rows.
        size_b1: n of each row; 0 finds nothing.
        largest: the maximum of `size_b1`, known here so that the device is not asked.

    Returns:
        bool ``[b, n]``, beside `History.text_bn`.
    """
    columns_n = torch.arange(history.text_bn.shape[1], device=size_b1.device)
    found_bn = (size_b1 > 0) & (columns_n >= size_b1 - 1) & (columns_n < history.length_b[:, None])
    for d in range(1, min(largest, len(columns_n))):
        # What rolls in from the end is where no n-gram of more than d tokens ends.
        found_bn = found_bn & ((history.text_bn.roll(d, 1) == _back(history, d)) | (size_b1 <= d))
    return found_bn


def find_words(history: History, words_bwl: Tensor) -> Tensor:
    """Which sequences, all tokens of which but the last are the end of a row's text, its next token would complete.

    Args:
        history: of the rows.
        words_bwl: token ids, -1 before a shorter sequence's first and where there is none.

    Returns:
        bool ``[b, w]``.
    """
    found_bw = words_bwl[..., -1] >= 0
    for d in range(1, words_bwl.shape[2]):
        token_bw = words_bwl[..., -1 - d]
        same_bw = (token_bw == _back(history, d)) & (history.length_b >= d)[:, None]
        found_bw = found_bw & (same_bw | (token_bw < 0))
    return found_bw


def forbid(logits_bv: Tensor, tokens_bm: Tensor, there_bm: Tensor) -> Tensor:
    """Minus infinity for `tokens_bm` where `there_bm`, m of a row; logits that are not finite are no less noticed."""
    times_bv = torch.zeros_like(logits_bv, dtype=torch.int32).scatter_add_(1, tokens_bm, there_bm.to(torch.int32))
    return torch.where(times_bv > 0, logits_bv - torch.inf, logits_bv)


def keep_top_k(logits_bv: Tensor, k_b1: Tensor, largest: int) -> Tensor:
    """Drop every token below the k-th most likely of its row; rows with k = 0 keep all.

    Args:
        logits_bv: logits.
        k_b1: int64.
        largest: the maximum of `k_b1`, known here so that the device is not asked.
    """
    top_bk = logits_bv.topk(min(largest, logits_bv.shape[1]), dim=-1).values
    floor_b1 = top_bk.gather(1, (k_b1 - 1).clamp(0, top_bk.shape[1] - 1)).masked_fill(k_b1 == 0, -torch.inf)
    return logits_bv.masked_fill(logits_bv < floor_b1, -torch.inf)


def keep_top_p(logits_bv: Tensor, tail: Tensor | float) -> Tensor:
    """Drop the least likely tokens whose probabilities sum to at most ``tail = 1 - p``; one is always kept."""
    sorted_bv, order_bv = logits_bv.sort(dim=-1)
    drop_bv = sorted_bv.softmax(-1).cumsum(-1) <= tail
    drop_bv[:, -1] = False
    return logits_bv.masked_fill(drop_bv.scatter(1, order_bv, drop_bv), -torch.inf)


def keep_min_p(logits_bv: Tensor, p: Tensor | float) -> Tensor:
    """Drop tokens whose probability is below ``p`` times that of the most likely."""
    prob_bv = logits_bv.softmax(-1)
    return logits_bv.masked_fill(prob_bv < p * prob_bv.amax(-1, keepdim=True), -torch.inf)


def _entropy(prob_bv: Tensor, log_bv: Tensor) -> Tensor:
    """Of each row's distribution ``[b, 1]``, in nats."""
    return -torch.where(prob_bv > 0, prob_bv * log_bv, 0).sum(-1, keepdim=True)


def keep_typical_p(logits_bv: Tensor, p_b1: Tensor) -> Tensor:
    """Keep the tokens whose ``-log`` probability is nearest to the entropy, up to the one that brings them to ``p``.

    Rows with p = 1 keep all.
    """
    log_bv = logits_bv.log_softmax(-1)
    prob_bv = log_bv.exp()
    entropy_b1 = _entropy(prob_bv, log_bv)
    sorted_bv, order_bv = (-log_bv - entropy_b1).abs().sort(dim=-1)
    # A token that ties with the last one that is needed is kept as well.
    last_b1 = (prob_bv.gather(1, order_bv).cumsum(-1) < p_b1).sum(-1, keepdim=True).clamp(max=logits_bv.shape[1] - 1)
    drop_bv = sorted_bv > sorted_bv.gather(1, last_b1)
    drop_bv = drop_bv.scatter(1, order_bv, drop_bv) & (p_b1 < 1)
    return logits_bv.masked_fill(drop_bv, -torch.inf)


def keep_epsilon(logits_bv: Tensor, epsilon: Tensor | float) -> Tensor:
    """Drop tokens whose probability is below `epsilon`, but for the most likely."""
    drop_bv = (logits_bv.softmax(-1) < epsilon) & (logits_bv < logits_bv.amax(-1, keepdim=True))
    return logits_bv.masked_fill(drop_bv, -torch.inf)


def keep_eta(logits_bv: Tensor, eta_b1: Tensor) -> Tensor:
    """`keep_epsilon` with ``min(eta, sqrt(eta) * exp(-entropy))``: where much is possible, less likely tokens stay."""
    log_bv = logits_bv.log_softmax(-1)
    floor_b1 = eta_b1.sqrt() * (-_entropy(log_bv.exp(), log_bv)).exp()
    return keep_epsilon(logits_bv, torch.minimum(eta_b1, floor_b1))


def _power_of_two(n: int) -> int:
    """The least that is not below n, or 0: so that a graph made for one number serves others."""
    return 1 << (n - 1).bit_length() if n else 0


def _buffers(configs: Sequence[SamplingConfig], device: torch.device | str | None) -> list[Tensor]:
    """Whether each row is greedy, its seed, and its `COLUMNS`."""
    return [
        torch.tensor([c.temperature == 0 for c in configs], device=device),
        torch.tensor([c.seed for c in configs], device=device),
        *(torch.tensor([make(c) for c in configs], device=device)[:, None] for make in COLUMNS.values()),
    ]


class Sampler:
    """The next tokens of rows, each with its own `SamplingConfig`.

    What a row is asked for lies in buffers, so that rows may change while a captured graph reads them; only which
    processors there are is fixed by the rows together (`features`).

    Args:
        configs: one a row.
        device: of the logits.
        vocab_size: v, needed where a row has a bias.
    """

    def __init__(
        self, configs: Sequence[SamplingConfig], device: torch.device | str | None = None, vocab_size: int = 0
    ) -> None:
        self.configs, self.vocab_size = list(configs), vocab_size
        self._bias_bv = torch.zeros(len(configs), 0, device=device)
        self._words_bwl = torch.zeros(len(configs), 0, 0, dtype=torch.int64, device=device)
        self.greedy_b, self.seed_b, *columns = _buffers(configs, device)
        self._columns = dict(zip(COLUMNS, columns, strict=True))
        self._note_biases(range(len(configs)), configs)
        self._note_words(range(len(configs)), configs)
        self._choose()

    def put(self, rows: Sequence[int], configs: Sequence[SamplingConfig]) -> None:
        """From now on `rows` are asked for what `configs` say."""
        for row, config in zip(rows, configs, strict=True):
            self.configs[row] = config
        device, mine = self.seed_b.device, (self.greedy_b, self.seed_b, *self._columns.values())
        rows_b = torch.tensor(rows, device=device)
        for buffer, values in zip(mine, _buffers(configs, device), strict=True):
            buffer.index_copy_(0, rows_b, values)
        self._note_biases(rows, configs)
        self._note_words(rows, configs)
        self._choose()

    def _note_biases(self, rows: Sequence[int], configs: Sequence[SamplingConfig]) -> None:
        """Note the biases of `rows`; there is no room for them before the first."""
        if any(c.logit_bias for c in configs) and not self._bias_bv.shape[1]:
            self._bias_bv = torch.zeros(len(self.configs), self.vocab_size, device=self.seed_b.device)
        if not self._bias_bv.shape[1]:
            return
        self._bias_bv[torch.tensor(rows, device=self.seed_b.device)] = 0
        for row, config in zip(rows, configs, strict=True):
            if config.logit_bias:
                at, bias = torch.tensor(list(config.logit_bias)), torch.tensor(list(config.logit_bias.values()))
                self._bias_bv[row, at.to(self.seed_b.device)] = bias.to(self._bias_bv)

    def _note_words(self, rows: Sequence[int], configs: Sequence[SamplingConfig]) -> None:
        """Note the bad words of `rows`; there is room for as many, and as long ones, as some row has had."""
        b, w, length = self._words_bwl.shape
        most = max((len(c.bad_words_ids) for c in configs), default=0)
        longest = max((len(word) for c in configs for word in c.bad_words_ids), default=0)
        if most > w or longest > length:
            wider, longer = max(w, _power_of_two(most)), max(length, _power_of_two(longest))
            words_bwl = self._words_bwl.new_full((b, wider, longer), -1)
            words_bwl[:, :w, longer - length :] = self._words_bwl
            self._words_bwl = words_bwl
        if self._words_bwl.shape[1]:
            mine_bwl = torch.full((len(rows), *self._words_bwl.shape[1:]), -1)
            for row, config in enumerate(configs):
                for i, word in enumerate(config.bad_words_ids):
                    mine_bwl[row, i, -len(word) :] = torch.tensor(word)
            self._words_bwl[torch.tensor(rows, device=self.seed_b.device)] = mine_bwl.to(self.seed_b.device)

    def _choose(self) -> None:
        asked = [c for c in self.configs if c is not IDLE]
        self.draws = any(c.temperature > 0 for c in asked)
        self.settles = any(c.temperature == 0 for c in asked)
        self.largest_k = _power_of_two(max((c.top_k for c in asked), default=0))
        self.largest_n = max((c.no_repeat_ngram_size for c in asked), default=0)
        self.reads_text = any(c.reads_text for c in asked)
        self._asked = {
            "bias": any(c.logit_bias for c in asked),
            "repetition": any(c.repetition_penalty != 1 for c in asked),
            "counts": any(c.presence_penalty or c.frequency_penalty for c in asked),
            "ngrams": self.largest_n > 0,
            "words": any(c.bad_words_ids for c in asked),
            "temperature": any(c.temperature not in (0, 1) for c in asked),
            "top_k": self.largest_k > 0,
            "top_p": any(c.top_p != 1 for c in asked),
            "min_p": any(c.min_p for c in asked),
            "typical_p": any(c.typical_p != 1 for c in asked),
            "epsilon": any(c.epsilon_cutoff for c in asked),
            "eta": any(c.eta_cutoff for c in asked),
        }

    @property
    def features(self) -> tuple[object, ...]:
        """All that decides which operations this class and `verify` run; the rest lies in buffers."""
        words = self._words_bwl.shape[1:] if self._asked["words"] else ()
        flags = self.draws, self.settles, self.penalises, *self._asked.values()
        return (*flags, self.largest_k, self.largest_n, *words)

    @property
    def counts_tokens(self) -> bool:
        """Whether some row needs to know how often each token came before."""
        return self._asked["repetition"] or self._asked["counts"]

    @property
    def penalises(self) -> bool:
        """Whether some row needs a history of its tokens."""
        return self.counts_tokens or self.reads_text

    def process(self, logits_bv: Tensor, history: History) -> Tensor:
        """The logits after every processor, in float32 at least; for the first rows when there are fewer."""
        x, asked = logits_bv.to(precise(logits_bv.dtype)), self._asked
        column = {name: values[: len(x)] for name, values in self._columns.items()}
        if asked["bias"]:
            x = x + self._bias_bv[: len(x)]
        if asked["repetition"]:
            x = penalise_repetition(x, history.prompt_bv | (history.count_bv > 0), column["repetition"])
        if asked["counts"]:
            x = penalise_counts(x, history.count_bv, column["presence"], column["frequency"])
        if asked["ngrams"]:
            x = forbid(x, history.text_bn, find_ngrams(history, column["ngram"], self.largest_n))
        if asked["words"]:
            words_bwl = self._words_bwl[: len(x)]
            x = forbid(x, words_bwl[..., -1].clamp(min=0), find_words(history, words_bwl))
        if asked["temperature"]:
            x = x / column["temperature"]
        if asked["top_k"]:
            x = keep_top_k(x, column["top_k"], self.largest_k)
        if asked["top_p"]:
            x = keep_top_p(x, column["tail"])
        if asked["min_p"]:
            x = keep_min_p(x, column["min_p"])
        if asked["typical_p"]:
            x = keep_typical_p(x, column["typical_p"])
        if asked["epsilon"]:
            x = keep_epsilon(x, column["epsilon"])
        if asked["eta"]:
            x = keep_eta(x, column["eta"])
        return x

    def probabilities(self, logits: Tensor, history: History) -> Tensor:
        """The distribution that `sample` draws from; a greedy row's has all its mass on one token.

        NaN where logits hold a NaN or have no finite maximum.

        Args:
            logits: ``[b, v]``, or ``[b, t, v]`` of several steps, where no row may need a history of its tokens.
            history: of the same rows.
        """
        x = self._process_block(logits, history) if logits.dim() == 3 else self.process(logits, history)
        if not self.settles:
            return x.softmax(-1)
        certain = torch.zeros_like(x).scatter_(-1, x.argmax(-1, keepdim=True), 1)
        certain = certain.masked_fill(~x.amax(-1, keepdim=True).isfinite(), torch.nan)
        greedy_b = self.greedy_b[: len(x)]
        return torch.where(greedy_b.view(-1, *[1] * (x.dim() - 1)), certain, x.softmax(-1))

    def sample(self, logits_bv: Tensor, history: History, stream: int = 0) -> Tensor:
        """The next tokens, int64 ``[b]``; -1 where a row's logits hold a NaN or have no finite maximum.

        Args:
            logits_bv: as the model gives them.
            history: of the same rows.
            stream: which of the rows' independent noises; 0 is that of the model's own tokens.
        """
        return self.sample_block(logits_bv[:, None], history, stream)[:, 0]

    def sample_block(self, logits_btv: Tensor, history: History, stream: int = 0) -> Tensor:
        """The tokens ``[b, t]`` of the next t steps; see `sample`. For t above 1 no row `penalises`."""
        rows = len(logits_btv)
        if any(self._asked.values()):
            logits_btv = self._process_block(logits_btv, history)
        noise = self.greedy_b[:rows], self.seed_b[:rows], history.step_b
        return draw(logits_btv, *noise, draws=self.draws, stream=stream)

    def _process_block(self, logits_btv: Tensor, history: History) -> Tensor:
        """`process` of several steps that know the same of their tokens."""
        if not any(self._asked.values()):
            return logits_btv.to(precise(logits_btv.dtype))
        return torch.stack([self.process(logits_bv, history) for logits_bv in logits_btv.unbind(1)], dim=1)
