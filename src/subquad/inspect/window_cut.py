"""Which layers need their whole context: cut one attention at a time to a window and see what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.core.mixer import Mixer
from subquad.evals.needle import Question
from subquad.evals.perplexity import windows_of
from subquad.evals.scoring import Batch, Progress, Request, make_batches, score_hidden
from subquad.evals.stats import Interval, bootstrap_mean
from subquad.evals.text import TextTokens
from subquad.mixers.attention import Attention
from subquad.models.stack import Block, Stack

CARD = Card(
    title="Layer importance by cutting one attention at a time to a window",
    entry="WindowCut",
    gives="the layers to convert: those whose attention to the far past is least missed, in loss and in retrieval",
    needs="a model with full attention, some thousand tokens of text, and a tokenizer for the needles",
    status="incubating",
    claim="which layers are converted matters more than how many",
    measured="not reproduced: no result file yet",
)


@dataclass(frozen=True)
class Measured:
    """What one configuration of cuts gives.

    Attributes:
        loss_w: mean loss of each window of text, nats per token.
        answer_q: loss of each needle's number, nats per answer; empty where no needles were asked for.
    """

    loss_w: Tensor
    answer_q: Tensor

    def over(self, base: Measured) -> LayerScore:
        """The increase over `base`, paired over windows and over questions."""
        answer = bootstrap_mean(self.answer_q - base.answer_q) if len(self.answer_q) else None
        return LayerScore(bootstrap_mean(self.loss_w - base.loss_w), answer)


@dataclass(frozen=True)
class LayerScore:
    """What a cut costs: ``loss`` in nats per token of text, ``retrieval`` in nats per needle's answer."""

    loss: Interval
    retrieval: Interval | None


@dataclass(frozen=True)
class Ranking:
    """One-at-a-time scores of all layers that attend beyond the window.

    Attributes:
        base: the model as it is.
        scores: layer to what cutting it alone costs.
    """

    base: Measured
    scores: dict[int, LayerScore]

    def cost(self, score: LayerScore) -> float:
        """A joint cost of both criteria.

        ``loss / sum_i |loss_i| + retrieval / sum_i |retrieval_i|``: each in units of what all one-at-a-time cuts
        change together, so that neither scale rules.
        """
        cost = score.loss.value / self._sum([s.loss for s in self.scores.values()])
        if score.retrieval is not None:
            cost += score.retrieval.value / self._sum([s.retrieval for s in self.scores.values() if s.retrieval])
        return cost

    @staticmethod
    def _sum(intervals: Sequence[Interval]) -> float:
        return sum(abs(interval.value) for interval in intervals) or math.inf

    def cheapest(self, n: int) -> list[int]:
        """The `n` layers of the lowest cost, ascending by number."""
        if not 1 <= n <= len(self.scores):
            raise ConfigError(
                f"choose: expected 1 to {len(self.scores)}, the layers that see beyond the window, got {n}"
            )
        return sorted(sorted(self.scores, key=lambda layer: self.cost(self.scores[layer]))[:n])


class WindowCut:
    """Measures a model with the attention of some layers cut to a window and sinks, without changing the model.

    A cut layer is the mixer `attention` with the same weights and ``window``, ``sinks``. Configurations that differ in
    one layer share the stream below it, so ranking L layers costs about L / 2 forward passes instead of L.

    Example:
        >>> import torch
        >>> from subquad.evals.text import TextTokens
        >>> from subquad.models.config import ModelConfig
        >>> layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        >>> model = Stack(ModelConfig(vocab_size=11, d_model=16, d_mlp=32, layers=(layer,) * 3))
        >>> text = TextTokens(torch.arange(64) % 11, torch.ones(64, dtype=torch.int64))
        >>> cut = WindowCut(model, text, window=4, sinks=1, context=32)
        >>> len(cut.rank().cheapest(2))
        2
    """

    def __init__(
        self,
        model: Stack,
        text: TextTokens,
        questions: Sequence[Question] = (),
        *,
        tokenizer: Any = None,
        window: int = 64,
        sinks: int = 4,
        context: int = 1024,
        batch_tokens: int = 4096,
    ) -> None:
        """Prepare text, needles and cut layers.

        Args:
            model: the model to inspect.
            text: cut into windows of `context` tokens.
            questions: needles from `make_questions`, for the retrieval criterion; they need `tokenizer`.
            tokenizer: encodes the needles' answers.
            window: tokens that a cut layer sees, itself included.
            sinks: first tokens that it also sees.
            context: tokens of a window of text.
            batch_tokens: tokens read at once; the stream of every layer is held for them.

        Raises:
            ConfigError: no layer attends beyond the window.
            DataError: text shorter than one window.
        """
        self.model = model
        self.cuts = {
            i: Attention.from_attention(block.mixer.weights(), window=window, sinks=sinks)
            for i, block in enumerate(self._blocks)
            if isinstance(block.mixer, Attention) and (block.mixer.config.window or context) > window
        }
        if not self.cuts:
            raise ConfigError(f"expected layers that attend beyond window={window}, got none; try a smaller window")
        texts: list[Request] = [(row[:1], row[1:]) for row in windows_of(text, context).tolist()]
        answers: list[Request] = [
            (question.tokens, tokenizer.encode(f" {question.value}", add_special_tokens=False))
            for question in questions
        ]
        self.n_texts = len(texts)
        self.sizes = [len(continuation) for _, continuation in texts + answers]
        # Needles are as long as the text but score a few tokens each: apart, their batches need almost no head.
        parts = [(0, texts), (len(texts), answers)]
        self.batches: list[tuple[int, Batch]] = [
            (start, batch) for start, part in parts for batch in make_batches(part, batch_tokens, model.device)
        ]

    @property
    def _blocks(self) -> list[Block]:
        return list(self.model.blocks)  # pyright: ignore[reportReturnType]

    def rank(self, progress: Progress | None = None) -> Ranking:
        """What cutting each layer alone costs."""
        measured = self.toggle((), list(self.cuts), progress)
        base = measured.pop(None)
        return Ranking(base, {layer: m.over(base) for layer, m in measured.items() if layer is not None})

    def joint(self, ranking: Ranking, layers: Collection[int]) -> LayerScore:
        """What cutting all of `layers` at once costs."""
        return self.toggle(layers, [])[None].over(ranking.base)

    def refine(
        self,
        ranking: Ranking,
        layers: Collection[int],
        *,
        rounds: int = 1,
        report: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> list[int]:
        """Swap layers while that lowers the cost of the joint cut.

        A round restores the cut layer that is missed most and cuts the kept one that is missed least, both
        measured with all other cuts in place; it ends the search when the best swap does not help.

        Args:
            ranking: from `rank`.
            layers: where to start, as from `Ranking.cheapest`.
            rounds: most swaps; each costs about as much as the ranking.
            report: called with a line for every swap.
            progress: called with tokens times layers done and in all, for each half of a round.
        """
        chosen = set(layers)
        for _ in range(rounds):
            without = self.toggle(chosen, sorted(chosen), progress)
            cost = {layer: ranking.cost(m.over(ranking.base)) for layer, m in without.items()}
            restored = min(chosen, key=lambda layer: cost[layer])
            others = sorted(set(self.cuts) - chosen)
            if not others:
                break
            swapped = self.toggle(chosen - {restored}, others, progress)
            costs = {layer: ranking.cost(swapped[layer].over(ranking.base)) for layer in others}
            added = min(costs, key=lambda layer: costs[layer])
            if costs[added] >= cost[None]:
                break
            chosen = chosen - {restored} | {added}
            if report is not None:
                report(f"layer {restored} stays, {added} is cut: joint cost {cost[None]:.4f} -> {costs[added]:.4f}")
        return sorted(chosen)

    @torch.no_grad()
    def toggle(
        self, base: Collection[int], toggles: Sequence[int], progress: Progress | None = None
    ) -> dict[int | None, Measured]:
        """Measure `base` (under None), and for each of `toggles` the same with that layer cut, or whole again.

        Args:
            base: layers that are cut.
            toggles: layers to change, one at a time.
            progress: called with tokens times layers done and in all.
        """
        blocks, cut = self._blocks, set(base)
        depths = [len(blocks)] + [len(blocks) - layer for layer in toggles]
        total = sum(batch.tokens_bt.numel() for _, batch in self.batches) * sum(depths)
        losses: dict[int | None, dict[int, Tensor]] = {key: {} for key in (None, *toggles)}
        done = 0

        def score(key: int | None, x_btd: Tensor, start: int, batch: Batch, depth: int) -> None:
            nonlocal done
            hidden_nd = self.model.norm(x_btd).flatten(0, 1)[batch.at_n]
            logprob_n = score_hidden(self.model, hidden_nd, batch.targets_n).logprob_n
            parts = zip(batch.owners, logprob_n.split([size for _, size in batch.owners]), strict=True)
            losses[key] |= {start + i: -part.sum() for (i, _), part in parts}
            done += batch.tokens_bt.numel() * depth
            if progress is not None:
                progress(done, total)

        for start, batch in self.batches:
            x_btd, streams = self.model.embed(batch.tokens_bt), dict[int, Tensor]()
            for i in range(len(blocks)):
                if i in toggles:
                    streams[i] = x_btd
                x_btd = self._block(i, i in cut, x_btd, batch)
            score(None, x_btd, start, batch, len(blocks))
            for layer in toggles:
                x_btd = self._block(layer, layer not in cut, streams.pop(layer), batch)
                for i in range(layer + 1, len(blocks)):
                    x_btd = self._block(i, i in cut, x_btd, batch)
                score(layer, x_btd, start, batch, len(blocks) - layer)
        return {key: self._measured(by_request) for key, by_request in losses.items()}

    def _block(self, i: int, cut: bool, x_btd: Tensor, batch: Batch) -> Tensor:
        block = self._blocks[i]
        mixer: Mixer = self.cuts[i] if cut else block.mixer
        return block.feed(x_btd, mixer(block.norm1(x_btd), batch.layout))

    def _measured(self, by_request: dict[int, Tensor]) -> Measured:
        total_r = torch.stack([by_request[i] for i in range(len(self.sizes))])
        texts = slice(0, self.n_texts)
        return Measured(total_r[texts] / torch.tensor(self.sizes[texts]), total_r[self.n_texts :])
