"""Copies from the prompt beside plain decoding, and the pointer's search against a rescan of the whole context."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from subquad.bench.drafting import run_drafter
from subquad.bench.harness import Bench
from subquad.decode.aggressive import Aggressive
from subquad.engine.draft import Draft
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

# Of a stack that only lends its device and vocabulary.
LAYER = {"mixer": "attention", "n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
# Tokens that a text is made of: so few that single ones, and pairs of a long text, are ambiguous.
WORDS = 512
EVERY = 20


class Rescan(Aggressive):
    """The same rule; every search compares the last tokens with the whole context."""

    def _seek(self, rows: int) -> Tensor:
        """As `Aggressive._seek`."""
        tokens_bn, end_b1 = self._told.tokens_bn[:rows], self._told.length_b[:rows, None]
        found_b = torch.full_like(end_b1[:, 0], -1)
        for gamma in self.suffix:
            last_bg = self._told.read(end_b1 - gamma + torch.arange(gamma, device=end_b1.device))
            same_bn = (tokens_bn.unfold(1, gamma, 1) == last_bg[:, None]).all(-1)
            ends_n = gamma + torch.arange(same_bn.shape[1], device=end_b1.device)
            same_bn = same_bn & (ends_n < self._source_b[:rows, None])
            ahead_bn = same_bn & (ends_n > self._sure_b[:rows, None])
            places_bn = torch.where(ahead_bn.any(1, keepdim=True), ahead_bn, same_bn)
            once_b = (places_bn.sum(1) == 1) & (found_b < 0)
            found_b = torch.where(once_b, gamma + places_bn.to(torch.int64).argmax(1), found_b)
        return found_b


def edited(prompt: list[int], rng: random.Random) -> list[int]:
    """The prompt with an edit every `EVERY` tokens: another token, one more, or one less."""
    output: list[int] = []
    for i, token in enumerate(prompt):
        kind = i // EVERY % 3 if i % EVERY == EVERY - 1 else 3
        output += ([rng.randrange(WORDS)], [rng.randrange(WORDS), token], [], [token])[kind]
    return output


def run(bench: Bench) -> None:
    """Real prompts; then rewritten contexts of 1k and 8k tokens, one row and 32: guesses, and what a round costs."""
    run_drafter(bench, lambda _: Aggressive())
    contexts, batches, k = bench.size(((1024, 8192), (1, 32), 8), smoke=((64,), (1, 2), 4))
    vocab = bench.size(49152, smoke=WORDS)
    target = Stack(ModelConfig(vocab, 8, 8, (LAYER,))).to(**bench.factory)
    for context in contexts:
        for rows in batches:
            _measure(bench, target, context, rows, k)


def _measure(bench: Bench, target: Stack, context: int, rows: int, k: int) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(WORDS) for _ in range(context)] for _ in range(rows)]
    outputs = [edited(prompt, rng) for prompt in prompts]
    lengths_b = torch.tensor([len(output) for output in outputs], device=bench.device)
    width = int(lengths_b.max()) + k + 1
    output_bn = torch.tensor([output + [0] * (width - len(output)) for output in outputs], device=bench.device)
    ours, rescan = Aggressive(), Rescan()
    for drafter in (ours, rescan):
        drafter.open(target, rows, context + width)
        drafter.put(range(rows), prompts)
    sampler = Sampler([SamplingConfig()] * rows, bench.device)
    history = History.start([[0]] * rows, 0, bench.device)
    hidden_btd = torch.zeros(rows, k + 1, 0, **bench.factory)
    columns_t = torch.arange(k + 1, device=bench.device)

    def counted(draft: Draft) -> Tensor:
        return torch.where(columns_t[:-1] < draft.length_b[:, None], draft.tokens_bk, -1)

    done_b = torch.zeros_like(lengths_b)
    got, want, took = list[Tensor](), list[Tensor](), 0
    while bool((done_b < lengths_b).any()):
        took += int((done_b < lengths_b).sum())
        guess_bk = counted(ours.propose(rows, k, sampler, history))
        got.append(guess_bk)
        want.append(counted(rescan.propose(rows, k, sampler, history)))
        next_bt = output_bn.gather(1, (done_b[:, None] + columns_t).clamp(max=width - 1))
        stood_b = (guess_bk == next_bt[:, :-1]).to(torch.int64).cumprod(1).sum(1)
        n_b = torch.minimum(stood_b + 1, lengths_b - done_b)
        for drafter in (ours, rescan):
            drafter.observe(next_bt, n_b, hidden_btd)
        done_b = done_b + n_b
    bench.gate(f"{rows} rows of {context}: the guesses of a rescan", torch.stack(got), torch.stack(want), rtol=0.0)

    shape = {"b": rows, "t": context, "k": k, "suffix": "+".join(map(str, ours.suffix)), "edit_every": EVERY}
    a_round = int(lengths_b.sum()) / took
    bench.value(f"tokens_a_round.t{context}.b{rows}", a_round, "tokens", "higher", shape=shape)
    # A round that keeps nothing costs the same and fills nothing, so that it can be repeated.
    tokens_bt, n_b = output_bn[:, : k + 1].contiguous(), torch.zeros_like(lengths_b)

    def round_of(drafter: Aggressive) -> Tensor:
        drafter.observe(tokens_bt, n_b, hidden_btd)
        return drafter.propose(rows, k, sampler, history).tokens_bk

    times = bench.race({"ours": lambda: round_of(ours), "rescan": lambda: round_of(rescan)}, [()])
    bench.speed(
        f"round.t{context}.b{rows}",
        times,
        baseline="rescan",
        baseline_name="comparing the whole context",
        shape=shape,
    )
