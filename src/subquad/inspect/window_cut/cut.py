"""A model measured with some of its attention cut to a window, a layer or a key/value head at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.evals.needle import Question
from subquad.evals.perplexity import windows_of
from subquad.evals.scoring import Batch, Progress, Request, logit_chunks, make_batches
from subquad.evals.stats import Interval, bootstrap_mean
from subquad.evals.text import TextTokens
from subquad.mixers.attention import Attention
from subquad.models.stack import Block, Stack
from subquad.ops import attention, windowed

# Tokens read at once: a GPU wants many, a CPU's memory holds few.
ON_GPU, ON_CPU = 32768, 4096


@dataclass(frozen=True, order=True)
class Unit:
    """What is cut together: key/value heads of one layer, with the query heads that read them."""

    layer: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """What one configuration of cuts gives.

    Attributes:
        loss_w: mean loss of each window of text, nats per token.
        answer_q: loss of each needle's number, nats per answer; empty where no needles were asked for.
    """

    loss_w: Tensor
    answer_q: Tensor


@dataclass(frozen=True)
class CutScore:
    """What a cut costs: ``loss`` in nats per token of text, ``retrieval`` in nats per needle's answer."""

    loss: Interval
    retrieval: Interval | None


@dataclass(frozen=True)
class Yardstick:
    """The two ends between which every configuration lies.

    Attributes:
        base: the model as it is.
        everything: with every unit cut.
        needles: weight of retrieval against loss.
    """

    base: Measured
    everything: Measured
    needles: float = 1.0

    def score(self, measured: Measured) -> CutScore:
        """The increase over `base`, paired over windows and over questions."""
        answer_q = measured.answer_q - self.base.answer_q
        return CutScore(
            bootstrap_mean(measured.loss_w - self.base.loss_w), bootstrap_mean(answer_q) if len(answer_q) else None
        )

    def cost(self, measured: Measured) -> float:
        """A joint cost of both criteria, 0 for the model as it is.

        ``loss / mean |loss of everything| + needles * retrieval / mean |retrieval of everything|``, each an increase
        over `base`: in units of what all cuts change together, so that neither scale rules. The absolute values are
        taken a window and a question at a time, so that a criterion which all cuts only stir gets no weight from noise.
        """
        cost = _share(measured.loss_w, self.base.loss_w, self.everything.loss_w)
        if len(measured.answer_q):
            cost += self.needles * _share(measured.answer_q, self.base.answer_q, self.everything.answer_q)
        return cost


def _share(value_n: Tensor, base_n: Tensor, everything_n: Tensor) -> float:
    return float((value_n - base_n).mean()) / (float((everything_n - base_n).abs().mean()) or math.inf)


@dataclass(frozen=True)
class _Part:
    """A batch, and where the losses of its targets belong: cell ``(row, column)`` of a table of `requests_o`."""

    batch: Batch
    requests_o: Tensor
    cell_n: tuple[Tensor, Tensor]

    @staticmethod
    def of(batch: Batch, first: int) -> _Part:
        device, sizes = batch.tokens_bt.device, [size for _, size in batch.owners]
        b, t = batch.tokens_bt.shape
        if int(batch.layout.lengths_b.min()) == t:
            batch = replace(batch, layout=Layout.dense(b, t, device=device))
        rows = [row for row, size in enumerate(sizes) for _ in range(size)]
        columns = [column for size in sizes for column in range(size)]
        requests = [first + i for i, _ in batch.owners]
        made = (torch.tensor(x, device=device) for x in (requests, rows, columns))
        requests_o, row_n, column_n = made
        return _Part(batch, requests_o, (row_n, column_n))


class WindowCut:
    """Measures a model with some attention cut to a window and sinks, without changing the model.

    A cut head's queries see the last `window` tokens and the first `sinks`; weights stay. Configurations that differ in
    one unit share the stream below it, so measuring all units of L layers costs about half a forward pass each; and
    heads of one layer share its projections. On a GPU nothing is waited for until all units are measured.

    Example:
        >>> import torch
        >>> from subquad.evals.text import TextTokens
        >>> from subquad.models.config import ModelConfig
        >>> layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 2, "head_dim": 8}
        >>> model = Stack(ModelConfig(vocab_size=11, d_model=16, d_mlp=32, layers=(layer,) * 3))
        >>> text = TextTokens(torch.arange(64) % 11, torch.ones(64, dtype=torch.int64))
        >>> cut = WindowCut(model, text, units="heads", window=4, sinks=1, context=32)
        >>> cut.units[1], len(cut.toggle((), cut.units))
        (Unit(layer=0, heads=(1,)), 7)
    """

    def __init__(
        self,
        model: Stack,
        text: TextTokens,
        questions: Sequence[Question] = (),
        *,
        tokenizer: Any = None,
        units: str = "layers",
        window: int = 64,
        sinks: int = 4,
        context: int = 1024,
        batch_tokens: int | None = None,
    ) -> None:
        """Prepare text, needles and units.

        Args:
            model: the model to inspect.
            text: cut into windows of `context` tokens.
            questions: needles from `make_questions`, for the retrieval criterion; they need `tokenizer`.
            tokenizer: encodes the needles' answers.
            units: ``layers``, or ``heads`` for each key/value head apart.
            window: tokens that a cut head sees, itself included.
            sinks: first tokens that it also sees.
            context: tokens of a window of text.
            batch_tokens: tokens read at once; by default 4096, and 32768 on a GPU.

        Raises:
            ConfigError: no layer attends beyond the window, or unknown units.
            DataError: text shorter than one window.
        """
        if units not in ("layers", "heads"):
            raise ConfigError(f"units: expected layers or heads, got {units!r}; name one of them")
        self.model, self.window, self.sinks = model, window, sinks
        self.attentions = {i: block.mixer for i, block in enumerate(self._blocks) if isinstance(block.mixer, Attention)}
        wide = {i: m.config.n_kv_heads for i, m in self.attentions.items() if (m.config.window or context) > window}
        if not wide:
            raise ConfigError(f"expected layers that attend beyond window={window}, got none; try a smaller window")
        together = ((i, [tuple(range(g))] if units == "layers" else [(h,) for h in range(g)]) for i, g in wide.items())
        self.units = tuple(Unit(i, heads) for i, groups in together for heads in groups)
        texts: list[Request] = [(row[:1], row[1:]) for row in windows_of(text, context).tolist()]
        answers: dict[int, list[Request]] = {}
        # By length, so that no row is padded to a longer one; the order of the questions is kept within.
        ordered = sorted(questions, key=lambda q: q.length)
        for question in ordered:
            value = tokenizer.encode(f" {question.value}", add_special_tokens=False)
            answers.setdefault(question.length, []).append((question.tokens, value))
        self.questions = tuple(ordered)
        self.n_texts = len(texts)
        self.sizes = [len(text) for _, text in texts]
        self.parts: list[_Part] = []
        first, size = 0, batch_tokens or (ON_GPU if model.device.type == "cuda" else ON_CPU)
        # Needles are as long as the text but score a few tokens each: apart, their batches need almost no head.
        for requests in (texts, *answers.values()):
            self.parts += [_Part.of(batch, first) for batch in make_batches(requests, size, model.device)]
            first += len(requests)
        self.n_requests = first

    @property
    def _blocks(self) -> list[Block]:
        return list(self.model.blocks)  # pyright: ignore[reportReturnType]

    def count(self, keep: float) -> int:
        """How many units a share `keep` of them is.

        Raises:
            ConfigError: a share that is none, or one that leaves nothing to cut.
        """
        n = round(keep * len(self.units))
        if not 0 <= keep < 1 or n == len(self.units):
            raise ConfigError(f"keep={keep}: expected a share from 0 to below 1 that leaves something to cut; lower it")
        return n

    def kept_heads(self, kept: Collection[Unit]) -> dict[int, list[int]]:
        """The key/value heads that stay as they are when the units `kept` do, by layer; layers with none left out.

        Attention that sees no further than the window anyway is no unit, and stays.
        """
        known = {unit.layer for unit in self.units}
        heads = {i: list(range(m.config.n_kv_heads)) for i, m in self.attentions.items() if i not in known}
        for unit in sorted(kept):
            heads.setdefault(unit.layer, []).extend(unit.heads)
        return dict(sorted(heads.items()))

    def yardstick(self, needles: float = 1.0) -> Yardstick:
        """The model as it is, and with every unit cut."""
        return Yardstick(self.toggle((), ())[None], self.toggle(self.units, ())[None], needles)

    @torch.no_grad()
    def toggle(
        self, base: Collection[Unit], toggles: Collection[Unit], progress: Progress | None = None
    ) -> dict[Unit | None, Measured]:
        """Measure `base` (under None), and for each of `toggles` the same with that unit cut, or whole again.

        Args:
            base: units that are cut.
            toggles: units to change, one at a time.
            progress: called with tokens times layers done and in all.
        """
        blocks = self._blocks
        cut: dict[int, frozenset[int]] = {}
        for unit in base:
            cut[unit.layer] = cut.get(unit.layer, frozenset()) | set(unit.heads)
        here: dict[int, list[Unit]] = {}
        for unit in toggles:
            here.setdefault(unit.layer, []).append(unit)
        keys: tuple[Unit | None, ...] = (None, *toggles)
        total_r = {key: torch.zeros(self.n_requests, dtype=torch.float64, device=self.model.device) for key in keys}
        tokens = sum(part.batch.tokens_bt.numel() for part in self.parts)
        total = tokens * (len(blocks) + sum(len(blocks) - unit.layer for unit in toggles))
        done = 0

        def score(key: Unit | None, x_btd: Tensor, part: _Part, depth: int) -> None:
            nonlocal done
            total_r[key][part.requests_o] = self._losses(x_btd, part)
            done += part.batch.tokens_bt.numel() * depth
            if progress is not None:
                progress(done, total)

        for part in self.parts:
            layout = part.batch.layout
            x_btd = self.model.embed(part.batch.tokens_bt)
            for i, block in enumerate(blocks):
                now, units = cut.get(i, frozenset()), here.get(i, [])
                y_btd, *others = self._mix(i, block.norm1(x_btd), layout, [now, *(now ^ set(u.heads) for u in units)])
                for unit, other_btd in zip(units, others, strict=True):
                    z_btd = block.feed(x_btd, other_btd)
                    for j in range(i + 1, len(blocks)):
                        mixed = self._mix(j, blocks[j].norm1(z_btd), layout, [cut.get(j, frozenset())])
                        z_btd = blocks[j].feed(z_btd, mixed[0])
                    score(unit, z_btd, part, len(blocks) - i)
                x_btd = block.feed(x_btd, y_btd)
            score(None, x_btd, part, len(blocks))
        totals_kr = torch.stack([total_r[key] for key in keys]).cpu()
        sizes_w = torch.tensor(self.sizes)
        return {
            key: Measured(row_r[: self.n_texts] / sizes_w, row_r[self.n_texts :])
            for key, row_r in zip(keys, totals_kr, strict=True)
        }

    def _losses(self, x_btd: Tensor, part: _Part) -> Tensor:
        """Loss of each request of `part`, in its order: sums over the rows of a table, in one order on a GPU too."""
        hidden_nd = self.model.norm(x_btd.flatten(0, 1)[part.batch.at_n])
        loss_n = torch.empty(len(hidden_nd), dtype=torch.float64, device=hidden_nd.device)
        for chunk, logits_cv in logit_chunks(self.model, hidden_nd):
            loss_n[chunk] = F.cross_entropy(logits_cv, part.batch.targets_n[chunk], reduction="none").double()
        width = max(size for _, size in part.batch.owners)
        return loss_n.new_zeros(len(part.requests_o), width).index_put(part.cell_n, loss_n).sum(1)

    def _mix(self, i: int, x_btd: Tensor, layout: Layout, cuts: Sequence[frozenset[int]]) -> list[Tensor]:
        """The output of layer `i` for each set of cut heads; each head attends once in each way that is asked for."""
        mixer = self.attentions.get(i)
        if mixer is None:
            return [self._blocks[i].mixer(x_btd, layout)]
        qkv, heads, config = mixer.qkv(x_btd, layout), range(mixer.config.n_kv_heads), mixer.config

        def slide(q_bthk: Tensor, k_btgk: Tensor, v_btgk: Tensor, window: int, sinks: int) -> Tensor:
            return windowed.attend(
                q_bthk, k_btgk, v_btgk, None, None, layout, window=window, sinks=sinks, scale=mixer.scale
            )

        def whole(q_bthk: Tensor, k_btgk: Tensor, v_btgk: Tensor) -> Tensor:
            if config.window is None:
                return attention.causal(q_bthk, k_btgk, v_btgk, mixer.scale)
            return slide(q_bthk, k_btgk, v_btgk, config.window, config.sinks)

        def narrow(q_bthk: Tensor, k_btgk: Tensor, v_btgk: Tensor) -> Tensor:
            return slide(q_bthk, k_btgk, v_btgk, self.window, self.sinks)

        of_whole = _by_head(whole, qkv, [h for h in heads if any(h not in cut for cut in cuts)], len(heads))
        of_narrow = _by_head(narrow, qkv, [h for h in heads if any(h in cut for cut in cuts)], len(heads))
        outputs: list[Tensor] = []
        for cut in cuts:
            y_bthk = torch.cat([(of_narrow if h in cut else of_whole)[h] for h in heads], dim=2)
            outputs.append(mixer.o_proj(y_bthk.flatten(2)))
        return outputs


def _by_head(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    heads: Sequence[int],
    n_kv_heads: int,
) -> dict[int, Tensor]:
    """What `attend` gives for the query heads ``[b, t, r, k]`` of each of `heads`, from one call for all of them."""
    if not heads:
        return {}

    def of(x_bthk: Tensor) -> Tensor:
        if len(heads) == n_kv_heads:
            return x_bthk
        groups = x_bthk.chunk(n_kv_heads, dim=2)
        return torch.cat([groups[h] for h in heads], dim=2)

    q_bthk, k_btgk, v_btgk = qkv
    y_bthk = attend(of(q_bthk), of(k_btgk), of(v_btgk))
    return dict(zip(heads, y_bthk.chunk(len(heads), dim=2), strict=True))
