"""Guesses verified by replay, as the engine does it, beside the usual way that copies every layer's state a token.

Ids are ``spec.replay_vs_copies.k4``: ``.engine`` is a round of a purely recurrent 8B shape at batch 64 that verifies
four guesses a row, ``.state_bytes`` what its rows hold, and ``.op`` a layer's recurrence alone; see
`subquad.bench.decoding`. Which guesses stand is the same for both ways, row by row: a bias forces every token, and a
script says which of the guesses are that token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from subquad.bench import shapes
from subquad.bench.decoding import DRAFTED, run_verification
from subquad.bench.harness import Bench
from subquad.bench.ops.gdn import STEP
from subquad.core.errors import SubquadError
from subquad.core.layout import Layout
from subquad.core.mixer import Counts
from subquad.core.state import State
from subquad.engine.draft import Draft, Drafter
from subquad.engine.history import History
from subquad.engine.request import Limits, Request
from subquad.engine.rounds import Rounds
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.mixers.gated_deltanet import L2_EPS, GatedDeltaNet
from subquad.models.stack import Stack
from subquad.ops import decode, skinny
from subquad.ops.decode import Block, Rule, Weights
from subquad.ops.replay import ReplayState, ReplayUpdate

# The token that every row says, another one, and how likely a guess is the former.
RIGHT, WRONG, SHARE = 7, 8, 0.7
# Rounds until all is captured; then groups of rounds in turns.
WARM, TURNS, ROUNDS = 3, 5, 8


def run(bench: Bench) -> None:
    """Batch 64, four guesses: a layer's recurrence, then whole rounds."""
    bench.name = "spec.replay_vs_copies"
    rows = bench.size(64, smoke=3)
    run_verification(bench, STEP, rows, f"k{DRAFTED}.op")
    with torch.no_grad():
        _rounds(bench, shapes.shape_8b(bench, 0), rows)


def _rounds(bench: Bench, model: Stack, rows: int) -> None:
    turns, each = bench.size((TURNS, ROUNDS), smoke=(1, 2))
    contenders = {"ours": _start(model, rows, turns, each), "copies": _start(with_copies(model), rows, turns, each)}
    for rounds in contenders.values():
        for _ in range(WARM):
            rounds.run(rows, DRAFTED)
        rounds.take(rows)
    _prove(bench, contenders["ours"].pool, contenders["copies"].pool)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    given: dict[str, int] = dict.fromkeys(contenders, 0)
    for turn in range(turns):
        # Alternating who goes first keeps a drifting clock from favouring one.
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            began = time.perf_counter()
            for _ in range(each):
                contenders[name].run(rows, DRAFTED)
            given[name] += sum(len(one.tokens) for one in contenders[name].take(rows))
            taken[name].append((time.perf_counter() - began) / each * 1e3)
    assert given["ours"] == given["copies"]
    _prove(bench, contenders["ours"].pool, contenders["copies"].pool, "at the end")
    a_round = given["ours"] / (rows * turns * each)
    # Rounds of both are CUDA graphs, or of none.
    graphs = {name: rounds.captured for name, rounds in contenders.items()}
    shape: dict[str, Any] = {"b": rows, "k": DRAFTED, "tokens_a_round": a_round, "graphs": graphs["ours"]}
    if graphs["ours"] != graphs["copies"]:
        raise SubquadError(f"{bench.name}: expected rounds of both ways captured or of none, got {graphs}; free memory")
    baseline = "a step and a state copy a token"
    bench.value(
        f"k{DRAFTED}.engine",
        statistics.median(taken["ours"]),
        "ms",
        "lower",
        baseline=baseline,
        baseline_value=statistics.median(taken["copies"]),
        shape=shape,
        reps=[list(pair) for pair in zip(taken["ours"], taken["copies"], strict=True)],
    )
    held = contenders["ours"].pool.nbytes
    copies = sum(layer.held.recurrent_bhkv.nbytes for layer in _layers(contenders["ours"].pool)) * (1 + DRAFTED)
    bench.value(
        f"k{DRAFTED}.state_bytes",
        held,
        "bytes",
        "lower",
        baseline=baseline,
        baseline_value=held + copies,
        shape=shape,
    )


def _layers(pool: State) -> list[ReplayState]:
    layers: Any = pool
    return list(layers.layers)


def _prove(bench: Bench, ours: State, copies: State, when: str = "behind the first rounds") -> None:
    """The states of the first and the last layer are the same, all kept tokens in them."""
    rtol = 1e-3 if bench.dtype == torch.float32 else shapes.ROUNDING
    for name, at in (("first", 0), ("last", -1)):
        got, want = (_layers(pool)[at].settled().recurrent_bhkv for pool in (ours, copies))
        bench.gate(f"{name} layer's state {when}: replay equals copies", got, want, rtol=rtol)


def _start(model: Stack, rows: int, turns: int, each: int) -> Rounds:
    """Rows that have read nothing but a first token, each forced to say the same one for ever."""
    new = (WARM + turns * each) * (1 + DRAFTED) + 1
    rounds = Rounds(model, rows, new + 1, 1 + DRAFTED, each + WARM, Script(rows), compile=False)
    sampling = SamplingConfig(logit_bias={RIGHT: 1e4})
    requests = [Request([1 + i % 5], Limits(max_new_tokens=new, end_tokens=[]), sampling) for i in range(rows)]
    rounds.admit(range(rows), requests, [0] * rows)
    rounds.start(range(rows), [request.prompt for request in requests])
    return rounds


class Script(Drafter):
    """Guesses whose acceptance is known beforehand: each is the right token with probability `SHARE`, by a fixed seed.

    Args:
        rows: of the engine.
        rounds: after so many the script begins anew.
    """

    always = True

    def __init__(self, rows: int, rounds: int = 64) -> None:
        right = torch.rand(rounds, rows, DRAFTED, generator=torch.Generator().manual_seed(0)) < SHARE
        self._script_nbk = torch.where(right, RIGHT, WRONG)

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Of no use outside its bench; see `Drafter.build`."""
        return cls(1)

    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """To the device; see `Drafter.open`."""
        self._script_nbk = self._script_nbk.to(target.device)
        self._at_1 = torch.zeros(1, dtype=torch.int64, device=target.device)

    def prepare(self, rows: int, k: int) -> None:
        """Nothing; see `Drafter.prepare`."""

    def put(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Nothing; see `Drafter.put`."""

    def propose(self, rows: int, k: int, sampler: Sampler, history: History) -> Draft:
        """The script's next line; see `Drafter.propose`."""
        tokens_bk = self._script_nbk.index_select(0, self._at_1 % len(self._script_nbk))[0, :rows, :k]
        return Draft(tokens_bk, torch.full_like(tokens_bk[:, 0], k))

    def observe(self, tokens_bt: Tensor, n_b: Tensor, hidden_btd: Tensor) -> None:
        """On to the next line; see `Drafter.observe`."""
        self._at_1 += 1

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Nothing; see `Drafter.move`."""


def with_copies(model: Stack) -> Stack:
    """The same model, sharing its weights, whose layers are `CopyingDeltaNet`."""
    with torch.device("meta"):
        other = Stack(model.config)
        for block in other.blocks:
            mixer: Any = block.mixer
            block.mixer = CopyingDeltaNet(mixer.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False)


class CopyingDeltaNet(GatedDeltaNet):
    """Gated DeltaNet, verified in the usual way: a step a token, a copy of the state at each, and one of them chosen.

    All else is as in the replay: projections of the whole block at once, the step one launch in place, the state's
    copies in buffers that never move, and the choice one pass of its own. A state is so read and written twice a token
    and once more; a kernel that wrote each token's state by itself would read it once and write it once a token.
    """

    def init_pool(self, rows: int, capacity: int, block: int, **factory: Any) -> State:
        """The pool of a replay, and room for a copy a token beside it."""
        pool = super().init_pool(rows, capacity, block, **factory)
        assert isinstance(pool, ReplayState)
        self._kept_nhkv = pool.held.recurrent_bhkv.repeat(block, 1, 1, 1)
        return pool

    def _step(
        self, x_btd: Tensor, state: ReplayState, layout: Layout, norm: nn.RMSNorm | None = None
    ) -> tuple[Tensor, ReplayUpdate]:
        qkv, config, b = self.qkv, self.config, len(x_btd)
        layers = qkv.v_proj, qkv.k_proj, qkv.q_proj, self.z_proj, self.dt_proj, self.beta_proj
        v, k, q, z, dt, beta = skinny.project(x_btd, *layers, norm=norm)
        g_bth, _ = self.decay(dt)
        rule = Rule(delta=True, activation=config.activation, l2_eps=L2_EPS, scale=config.key_dim**-0.5)
        v, k, q = (
            x.unflatten(-1, (-1, w)) for x, w in ((v, config.value_dim), (k, config.key_dim), (q, config.key_dim))
        )
        whole = (q, k, v, g_bth[..., None], beta.sigmoid())
        weights = Weights(qkv.conv_weight, qkv.conv_bias)
        kept_nbhkv = self._kept_nhkv.unflatten(0, (-1, len(self._kept_nhkv) // state.held.block))
        outputs: list[Tensor] = []
        for i in range(x_btd.shape[1]):
            token = Block(*(x[:, i : i + 1] for x in whole))
            outputs.append(decode.advance_(token, state.held, rule, weights, state.seen_b, state.pending_b))
            state.seen_b.add_(state.pending_b)
            state.pending_b.fill_(1)
            # What stands here lacks the token just read, which the next step brings in.
            kept_nbhkv[i, :b].copy_(state.held.recurrent_bhkv)
        return self._leave(torch.cat(outputs, dim=1), z), _CopiesUpdate(state, layout, self._kept_nhkv)


@dataclass(frozen=True)
class _CopiesUpdate(ReplayUpdate):
    """A block of which the state before each token was kept."""

    kept_nhkv: Tensor

    def store_(self, pool: State, rows: Tensor | None, n_b: Tensor) -> Counts:
        """The state before the last token kept comes back, and that token is pending."""
        assert isinstance(pool, ReplayState)
        assert rows is None
        at_b, row_b = (n_b - 1).clamp(min=0), torch.arange(len(n_b), device=n_b.device)
        rows_in_all = len(self.kept_nhkv) // pool.held.block
        torch.index_select(self.kept_nhkv, 0, at_b * rows_in_all + row_b, out=pool.held.recurrent_bhkv)
        # The pool has seen all of the block but its last token.
        pool.seen_b.add_(at_b - (self.layout.shape[1] - 1))
        pool.pending_b.copy_(n_b.clamp(max=1))
        return Counts()
