"""From logits to tokens: processors in a fixed order, and noise that belongs to a row alone.

The order is that of transformers: bias, repetition penalty, presence and frequency penalties, temperature, top-k,
top-p, min-p, typical-p. The distribution that remains after the last of them is the p of speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.state import State, axes, precise


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
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class History(State):
    """What the processors and the noise know of each row's past. v is 0 where no row has a penalty."""

    step_b: Tensor = axes("b", precision="index")
    prompt_bv: Tensor = axes("b v", precision="index")
    count_bv: Tensor = axes("b v", precision="index")

    @staticmethod
    def start(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str | None = None) -> History:
        """Of rows that have produced nothing yet; `vocab_size` is 0 where nothing is penalised."""
        prompt_bv = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
        if vocab_size:
            for row, prompt in enumerate(prompts):
                prompt_bv[row, torch.tensor(prompt)] = True
        return History(
            torch.zeros(len(prompts), dtype=torch.int64, device=device),
            prompt_bv.to(device),
            torch.zeros(len(prompts), vocab_size, dtype=torch.int32, device=device),
        )

    def observe_(self, tokens_b: Tensor, n_b: Tensor) -> None:
        """Count `tokens_b` in place where `n_b` is 1, and not where it is 0."""
        self.step_b.add_(n_b)
        if self.count_bv.shape[1]:
            self.count_bv.scatter_add_(1, tokens_b[:, None], n_b[:, None].to(self.count_bv.dtype))

    def after(self, tokens_b: Tensor) -> History:
        """The history if every row went on with `tokens_b`; this one stays as it is."""
        ahead = History(self.step_b + 1, self.prompt_bv, self.count_bv.clone())
        if self.count_bv.shape[1]:
            ahead.count_bv.scatter_add_(1, tokens_b[:, None], torch.ones_like(ahead.count_bv[:, :1]))
        return ahead


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
}


def penalise_repetition(logits_bv: Tensor, seen_bv: Tensor, penalty: Tensor | float) -> Tensor:
    """``logit / penalty`` where positive and ``logit * penalty`` where negative, of the tokens seen."""
    penalised_bv = torch.where(logits_bv < 0, logits_bv * penalty, logits_bv / penalty)
    return torch.where(seen_bv, penalised_bv, logits_bv)


def penalise_counts(logits_bv: Tensor, count_bv: Tensor, presence: Tensor | float, frequency: Tensor | float) -> Tensor:
    """``logit - presence * [count > 0] - frequency * count``."""
    return logits_bv - presence * (count_bv > 0) - frequency * count_bv


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


def keep_typical_p(logits_bv: Tensor, p_b1: Tensor) -> Tensor:
    """Keep the tokens whose ``-log`` probability is nearest to the entropy, up to the one that brings them to ``p``.

    Rows with p = 1 keep all.
    """
    log_bv = logits_bv.log_softmax(-1)
    prob_bv = log_bv.exp()
    entropy_b1 = -torch.where(prob_bv > 0, prob_bv * log_bv, 0).sum(-1, keepdim=True)
    sorted_bv, order_bv = (-log_bv - entropy_b1).abs().sort(dim=-1)
    # A token that ties with the last one that is needed is kept as well.
    last_b1 = (prob_bv.gather(1, order_bv).cumsum(-1) < p_b1).sum(-1, keepdim=True).clamp(max=logits_bv.shape[1] - 1)
    drop_bv = sorted_bv > sorted_bv.gather(1, last_b1)
    drop_bv = drop_bv.scatter(1, order_bv, drop_bv) & (p_b1 < 1)
    return logits_bv.masked_fill(drop_bv, -torch.inf)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a bijection of 64 bits (doi 10.1145/2660193.2660195, mix64 variant 13)."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _bits(seed_b: Tensor, step_b: Tensor, count: int, stream: int) -> Tensor:
    golden = -0x61C8864680B583EB
    key_b = _mix(_mix(seed_b + golden) + step_b * golden)
    if stream:
        key_b = _mix(key_b + stream)
    return _mix(key_b[:, None] + torch.arange(1, count + 1, device=seed_b.device) * golden)


def gumbel(seed_b: Tensor, step_b: Tensor, vocab_size: int, stream: int = 0) -> Tensor:
    """Standard Gumbel noise ``[b, v]`` in float32, a function of each row's seed and step, and the token.

    There is no generator to carry along: a row draws the same in any batch and after any interruption. The bits are the
    same on every device, their logarithms up to rounding.

    Args:
        seed_b: int64 seeds.
        step_b: int64, number of tokens already drawn.
        vocab_size: v.
        stream: noises of different streams are independent.
    """
    # The uniform is never 0, and finest near 0, where log1p turns it into the exponentials that win; nor is it ever
    # rounded to 1, where the noise would be minus infinity and a token that is certain could lose.
    bits_bv = (_bits(seed_b, step_b, vocab_size, stream) >> 11 & 0x1FFFFFFFFFFFFF) | 1
    uniform_bv = (bits_bv.to(torch.float32) * 2.0**-53).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform_bv))


def uniform(seed_b: Tensor, step_b: Tensor, stream: int) -> Tensor:
    """A number ``[b]`` in [0, 1) for each row, float32, a function of seed, step and stream as in `gumbel`."""
    return (_bits(seed_b, step_b, 1, stream)[:, 0] >> 40 & 0xFFFFFF).to(torch.float32) * 2.0**-24


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
        self.greedy_b = torch.tensor([c.temperature == 0 for c in configs], device=device)
        self.seed_b = torch.tensor([c.seed for c in configs], device=device)
        self._columns = {
            name: torch.tensor([[make(c)] for c in configs], device=device) for name, make in COLUMNS.items()
        }
        self._note_biases(range(len(configs)), configs)
        self._choose()

    def put(self, rows: Sequence[int], configs: Sequence[SamplingConfig]) -> None:
        """From now on `rows` are asked for what `configs` say."""
        for row, config in zip(rows, configs, strict=True):
            self.configs[row] = config
        plain = [replace(c, logit_bias={}) for c in configs]
        fresh, rows_b = Sampler(plain), torch.tensor(rows, device=self.seed_b.device)
        mine = (self.greedy_b, self.seed_b, *self._columns.values())
        for buffer, values in zip(mine, (fresh.greedy_b, fresh.seed_b, *fresh._columns.values()), strict=True):
            buffer.index_copy_(0, rows_b, values.to(buffer.device))
        self._note_biases(rows, configs)
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

    def _choose(self) -> None:
        asked = self.configs
        self.draws = any(c.temperature > 0 for c in asked)
        # As a power of two, so that the graph of one k serves others.
        largest = max((c.top_k for c in asked), default=0)
        self.largest_k = 1 << (largest - 1).bit_length() if largest else 0
        self._asked = {
            "bias": any(c.logit_bias for c in asked),
            "repetition": any(c.repetition_penalty != 1 for c in asked),
            "counts": any(c.presence_penalty or c.frequency_penalty for c in asked),
            "temperature": any(c.temperature not in (0, 1) for c in asked),
            "top_k": self.largest_k > 0,
            "top_p": any(c.top_p != 1 for c in asked),
            "min_p": any(c.min_p for c in asked),
            "typical_p": any(c.typical_p != 1 for c in asked),
        }

    @property
    def features(self) -> tuple[object, ...]:
        """All that decides which operations `sample` and `probabilities` run; the rest lies in buffers."""
        return (self.draws, self.largest_k, *self._asked.values())

    @property
    def penalises(self) -> bool:
        """Whether some row needs a history of its tokens."""
        return self._asked["repetition"] or self._asked["counts"]

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
        return x

    def probabilities(self, logits_bv: Tensor, history: History) -> Tensor:
        """The distribution ``[b, v]`` that `sample` draws from; a greedy row's has all its mass on one token.

        NaN in rows whose logits hold a NaN or have no finite maximum.
        """
        processed_bv = self.process(logits_bv, history)
        certain_bv = torch.zeros_like(processed_bv).scatter_(1, processed_bv.argmax(-1, keepdim=True), 1)
        certain_bv = certain_bv.masked_fill(~processed_bv.amax(-1, keepdim=True).isfinite(), torch.nan)
        return torch.where(self.greedy_b[: len(logits_bv), None], certain_bv, processed_bv.softmax(-1))

    def sample(self, logits_bv: Tensor, history: History, stream: int = 0) -> Tensor:
        """The next tokens, int64 ``[b]``; -1 where a row's logits hold a NaN or have no finite maximum.

        ``argmax(logits + Gumbel noise)`` is distributed as ``softmax(logits)``.

        Args:
            logits_bv: as the model gives them.
            history: of the same rows.
            stream: which of the rows' independent noises; 0 is that of the model's own tokens.
        """
        processed_bv = self.process(logits_bv, history)
        # One reduction tells: the maximum of a row is NaN when any of it is.
        sound_b = processed_bv.amax(-1).isfinite()
        if self.draws:
            rows = len(logits_bv)
            noise_bv = gumbel(self.seed_b[:rows], history.step_b, logits_bv.shape[1], stream)
            processed_bv = processed_bv + noise_bv.masked_fill(self.greedy_b[:rows, None], 0)
        return torch.where(sound_b, processed_bv.argmax(-1), -1)
