"""A smaller model guesses several chains a row, the model reads them side by side: a longer one stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.engine.chains import draft_stream
from subquad.engine.draft import Draft, read_vocab, take_lengths, take_options
from subquad.engine.history import History
from subquad.engine.model_draft import ModelDrafter
from subquad.engine.sampler import Sampler
from subquad.models.stack import Stack
from subquad.ops.draw import gumbel

CARD = Card(
    title="SpecTr: Fast Speculative Decoding via Optimal Transport",
    entry="SpecTr",
    arxiv="2310.15141",
    needs="a smaller model, best of the same vocabulary, and room for several copies of the rows' state",
    gives="more tokens a read of the model than one chain of guesses, of the same distribution, for few rows",
    status="incubating",
    claim="2.13 times faster than plain decoding, 1.37 times faster than one chain of guesses",
    measured="not reproduced",
    examples={
        "chains": {"model": "attention", "branch": "3"},
        "tree": {"model": "mamba2", "branch": "2+2"},
    },
)


@dataclass(frozen=True)
class _Node:
    """A guess of the tree, with all guesses before it and what they were drawn from."""

    tokens: tuple[Tensor, ...]
    drawn_from: tuple[Tensor, ...]
    history: History


class SpecTr(ModelDrafter):
    """Several chains of guesses a row, the paths of a tree that a smaller model draws; see `ModelDrafter`.

    Guesses behind the same guesses are drawn independently, as `verify_chains` needs them. Where nothing is drawn, in
    greedy rows and coupled ones, any will do, and they are the best ones, no two alike.

    Args:
        model, coupled, vocab: as in `ModelDrafter`.
        branch: how many first guesses, how many second ones behind each of them, and so on, and one behind each from
            there on. ``(8,)`` is eight independent chains, as in the paper.

    Example:
        >>> from subquad.engine.generate import generate
        >>> generate(model, prompts, drafter=SpecTr(small, branch=(3, 2)))  # doctest: +SKIP
    """

    def __init__(
        self, model: Stack, branch: Sequence[int] = (4,), *, coupled: bool = False, vocab: Sequence[int] | None = None
    ) -> None:
        super().__init__(model, coupled=coupled, vocab=vocab)
        most = model.config.vocab_size if self.vocab is None else len(set(self.vocab))
        if not branch or not 1 <= min(branch) <= max(branch) <= most:
            raise ConfigError(
                f"spectr: expected branches of 1 to {most}, as many as there are tokens, got {list(branch)}; try 4"
            )
        self.branch, self.forks = tuple(branch), max(branch) > 1

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``model``, ``branch`` joined by ``+``, ``coupled=true``, and ``vocab=FILE``; see `Drafter.build`."""
        take_options("spectr", options, ("model", "branch", "coupled", "vocab"))
        coupled = options.get("coupled", "false")
        if "model" not in options or coupled not in ("true", "false"):
            raise ConfigError(
                f"spectr: expected model=NAME, and coupled=true or false, got {dict(options)}; write "
                "spectr,model=NAME,branch=4"
            )
        branch = take_lengths("spectr", options, "branch", "4")
        vocab = read_vocab(options.get("vocab"))
        return cls(models(options["model"]), branch, coupled=coupled == "true", vocab=vocab)

    @torch.no_grad()
    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """k reads, each of all guesses of a depth side by side; see `Drafter.propose`."""
        (hidden_bd, length_b), pool = self._read_kept(rows, k), self._pool.first(rows)
        state, nodes = pool, [_Node((), (), history)]
        branches = (*self.branch, *[1] * k)[:k]
        for i, branch in enumerate(branches):
            if i:
                if state.batch != rows * len(nodes):
                    state = pool.fork(len(nodes))
                tokens_bt = torch.stack([torch.stack(node.tokens, 1) for node in nodes], 1).flatten(0, 1)
                hidden_bd = self._read_guesses(tokens_bt, state)
            logits_bnv = self._guessable.logits(hidden_bd).unflatten(0, (rows, len(nodes)))
            nodes = [
                child
                for j, node in enumerate(nodes)
                for child in self._children(sampler, node, logits_bnv[:, j], range(j * branch, (j + 1) * branch))
            ]
        tokens_bk = torch.stack([torch.stack(node.tokens, 1) for node in nodes], 1).flatten(0, 1)
        q_bkv = None
        if nodes[0].drawn_from:
            q_bkv = torch.stack([torch.stack(node.drawn_from, 1) for node in nodes], 1).flatten(0, 1)
        return Draft(tokens_bk, length_b, q_bkv, branches)

    def _children(self, sampler: Sampler, node: _Node, logits_bv: Tensor, at: range) -> list[_Node]:
        """Guesses behind a node, which are those `at` of their depth."""
        rows, v = logits_bv.shape
        seed_b, step_b, greedy_b1 = sampler.seed_b[:rows], node.history.step_b, sampler.greedy_b[:rows, None]
        scores_bv = sampler.process(logits_bv, node.history)
        if sampler.draws and self.coupled:
            scores_bv = scores_bv + gumbel(seed_b, step_b, v).masked_fill(greedy_b1, 0)
        guess_bm, drawn_from = scores_bv.topk(len(at)).indices, node.drawn_from
        if sampler.draws and not self.coupled:
            q_bv = sampler.probabilities(logits_bv, node.history)
            drawn = [(q_bv.log() + gumbel(seed_b, step_b, v, draft_stream(j))).argmax(-1) for j in at]
            guess_bm, drawn_from = torch.where(greedy_b1, guess_bm, torch.stack(drawn, 1)), (*drawn_from, q_bv)
        return [_Node((*node.tokens, g_b), drawn_from, node.history.after(g_b)) for g_b in guess_bm.unbind(1)]
