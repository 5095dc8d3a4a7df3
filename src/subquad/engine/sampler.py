"""From logits to tokens: processors in a fixed order, and noise that belongs to a row alone.

The order is that of transformers: bias, repetition penalty, presence and frequency penalties, repeated n-grams, bad
words, temperature, top-k, top-p, min-p, typical-p, epsilon and eta cutoffs. The distribution that remains after the
last of them is the p of speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.state import precise
from subquad.engine.history import History
from subquad.engine.processors import (
    find_ngrams,
    find_words,
    forbid,
    keep_epsilon,
    keep_eta,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    penalise_counts,
    penalise_repetition,
)
from subquad.ops.draw import draw, probabilities


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
        # What the buffers hold of each row.
        self._said = list(configs)
        self._columns = dict(zip(COLUMNS, columns, strict=True))
        self._note_biases(range(len(configs)), configs)
        self._note_words(range(len(configs)), configs)
        self._choose()

    def put(self, rows: Sequence[int], configs: Sequence[SamplingConfig]) -> None:
        """From now on `rows` are asked for what `configs` say."""
        # What the buffers say already is not written: that would be a dozen transfers.
        new: dict[int, SamplingConfig] = {}
        for row, config in zip(rows, configs, strict=True):
            self.configs[row] = config
            said = config if config.temperature else replace(config, seed=0)
            if self._said[row] != said:
                self._said[row] = new[row] = said
        if new:
            device, mine = self.seed_b.device, (self.greedy_b, self.seed_b, *self._columns.values())
            rows_b = torch.tensor(list(new), device=device)
            for buffer, values in zip(mine, _buffers(list(new.values()), device), strict=True):
                buffer.index_copy_(0, rows_b, values)
        self._note_biases(rows, configs)
        self._note_words(rows, configs)
        self._choose()

    def leave(self, rows: Sequence[int]) -> None:
        """From now on nobody asks `rows`."""
        for row in rows:
            self.configs[row] = IDLE
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
    def shapes(self) -> bool:
        """Whether some row asks for more than a temperature, so that all tokens must be there."""
        return any(asked for name, asked in self._asked.items() if name != "temperature")

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

    def probabilities(self, logits_bv: Tensor, history: History) -> Tensor:
        """The distribution that `sample` draws from; a greedy row's has all its mass on one token.

        NaN where logits hold a NaN or have no finite maximum.

        Args:
            logits_bv: as the model gives them.
            history: of the same rows.
        """
        greedy_b = self.greedy_b[: len(logits_bv)] if self.settles else None
        return probabilities(self.process(logits_bv, history), greedy_b)

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
        logits_btv, temperature_b = self.shaped(logits_btv, history)
        return draw(logits_btv, *self.noise(history), temperature_b=temperature_b, draws=self.draws, stream=stream)

    def noise(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """What decides the noise of the first rows' next tokens: which rows are greedy, their seeds and their steps."""
        rows = len(history.step_b)
        return self.greedy_b[:rows], self.seed_b[:rows], history.step_b

    def shaped(self, logits_btv: Tensor, history: History) -> tuple[Tensor, Tensor | None]:
        """The logits of t steps, and the temperatures that they are still to be divided by; None where that is 1.

        Whoever draws divides on the way, unless other processors come behind. For t above 1 no row `penalises`.
        """
        if self.shapes:
            steps = [self.process(logits_bv, history) for logits_bv in logits_btv.unbind(1)]
            return torch.stack(steps, dim=1), None
        return logits_btv, self._columns["temperature"][: len(logits_btv), 0] if self._asked["temperature"] else None
