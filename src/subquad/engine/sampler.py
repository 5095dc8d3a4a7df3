"""From logits to tokens: processors in a fixed order, and noise that belongs to a row alone.

The order is that of transformers: repetition penalty, presence and frequency penalties, temperature, top-k, top-p,
min-p. The distribution that remains after the last of them is the p of speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output
            (arXiv 1909.05858); 1 is none.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted once for each time a token stands in the output.
        seed: of this row's noise.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
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
        expect(0 < self.repetition_penalty < finite, "repetition_penalty", "a number above 0", "1 is no penalty")
        expect(abs(self.presence_penalty) < finite, "presence_penalty", "a finite number", "0 is no penalty")
        expect(abs(self.frequency_penalty) < finite, "frequency_penalty", "a finite number", "0 is no penalty")
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


Processor = Callable[[Tensor, History], Tensor]


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


def processors(configs: Sequence[SamplingConfig], device: torch.device | str | None = None) -> list[Processor]:
    """What stands between the model's logits and the distribution, in order; what no row asks for is left out.

    Args:
        configs: one a row; each row is processed with its own values.
        device: of the logits.
    """

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([[v] for v in values], device=device)

    chain: list[Processor] = []
    if any(c.repetition_penalty != 1 for c in configs):
        penalty_b1 = column(float(c.repetition_penalty) for c in configs)
        chain.append(lambda x, h: penalise_repetition(x, h.prompt_bv | (h.count_bv > 0), penalty_b1))
    if any(c.presence_penalty or c.frequency_penalty for c in configs):
        presence_b1 = column(float(c.presence_penalty) for c in configs)
        frequency_b1 = column(float(c.frequency_penalty) for c in configs)
        chain.append(lambda x, h: penalise_counts(x, h.count_bv, presence_b1, frequency_b1))
    if any(c.temperature not in (0, 1) for c in configs):
        temperature_b1 = column(float(c.temperature or 1) for c in configs)
        chain.append(lambda x, h: x / temperature_b1)
    if any(c.top_k for c in configs):
        k_b1, largest = column(c.top_k for c in configs), max(c.top_k for c in configs)
        chain.append(lambda x, h: keep_top_k(x, k_b1, largest))
    if any(c.top_p != 1 for c in configs):
        tail_b1 = column(1 - float(c.top_p) for c in configs)
        chain.append(lambda x, h: keep_top_p(x, tail_b1))
    if any(c.min_p for c in configs):
        min_p_b1 = column(float(c.min_p) for c in configs)
        chain.append(lambda x, h: keep_min_p(x, min_p_b1))
    return chain


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64, a bijection of 64 bits (doi 10.1145/2660193.2660195, mix64 variant 13)."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def gumbel(seed_b: Tensor, step_b: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise ``[b, v]`` in float32, a function of each row's seed and step, and the token.

    There is no generator to carry along: a row draws the same in any batch and after any interruption. The bits are the
    same on every device, their logarithms up to rounding.

    Args:
        seed_b: int64 seeds.
        step_b: int64, number of tokens already drawn.
        vocab_size: v.
    """
    golden = -0x61C8864680B583EB
    key_b = _mix(_mix(seed_b + golden) + step_b * golden)
    token_v = torch.arange(1, vocab_size + 1, device=seed_b.device)
    bits_bv = _mix(key_b[:, None] + token_v * golden)
    # The uniform is never 0, and finest near 0, where log1p turns it into the exponentials that win.
    uniform_bv = ((bits_bv >> 11 & 0x1FFFFFFFFFFFFF) | 1).to(torch.float32) * 2.0**-53
    return -torch.log(-torch.log1p(-uniform_bv))


class Sampler:
    """The next tokens of a batch of rows, each with its own `SamplingConfig`.

    Args:
        configs: one a row.
        device: of the logits.
    """

    def __init__(self, configs: Sequence[SamplingConfig], device: torch.device | str | None = None) -> None:
        self.chain = processors(configs, device)
        self.greedy_b = torch.tensor([c.temperature == 0 for c in configs], device=device)
        self.seed_b = torch.tensor([c.seed for c in configs], device=device)
        self.draws = any(c.temperature > 0 for c in configs)

    def process(self, logits_bv: Tensor, history: History) -> Tensor:
        """The logits after every processor, in float32 at least."""
        logits_bv = logits_bv.to(precise(logits_bv.dtype))
        for processor in self.chain:
            logits_bv = processor(logits_bv, history)
        return logits_bv

    def probabilities(self, logits_bv: Tensor, history: History) -> Tensor:
        """The distribution ``[b, v]`` that `sample` draws from; a greedy row's has all its mass on one token."""
        processed_bv = self.process(logits_bv, history)
        certain_bv = torch.zeros_like(processed_bv).scatter_(1, processed_bv.argmax(-1, keepdim=True), 1)
        return torch.where(self.greedy_b[:, None], certain_bv, processed_bv.softmax(-1))

    def sample(self, logits_bv: Tensor, history: History) -> Tensor:
        """The next tokens, int64 ``[b]``; -1 where a row's logits hold a NaN or have no finite maximum.

        ``argmax(logits + Gumbel noise)`` is distributed as ``softmax(logits)``.
        """
        processed_bv = self.process(logits_bv, history)
        # One reduction tells: the maximum of a row is NaN when any of it is.
        sound_b = processed_bv.amax(-1).isfinite()
        if self.draws:
            noise_bv = gumbel(self.seed_b, history.step_b, logits_bv.shape[1])
            processed_bv = processed_bv + noise_bv.masked_fill(self.greedy_b[:, None], 0)
        return torch.where(sound_b, processed_bv.argmax(-1), -1)
