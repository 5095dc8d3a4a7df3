"""The Mamba in the Llama: every second attention layer becomes a Mamba-2, in two steps, everything else frozen."""

from __future__ import annotations

from subquad.core.card import Card
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

CARD = Card(
    title="The Mamba in the Llama: Distilling and Accelerating Hybrid Models",
    entry="RECIPE",
    arxiv="2408.15237",
    needs="a teacher of dense attention; text that the teacher wrote (--data self) is what the paper trains on",
    gives="a uniform hybrid with Mamba-2, converted layer group by layer group, with the teacher's MLPs untouched",
    status="incubating",
    claim="62 of 68 MMLU points of Llama-3-8B-Instruct at half the attention, 20 B tokens, days on eight A100",
    measured="not reproduced",
)

# The published loss is the cross-entropy to the text, a mean over tokens, plus 0.1 times a KL divergence that is summed
# over the 2,048 tokens of a sequence: 205 to 1, here as a weight of the cross-entropy.
LABELS = 1 / 204.8

RATE = Rate(8e-5, warmup=0.05, schedule="cosine", floor=0.0, betas=(0.9, 0.98), clip=0.1)

RECIPE = Recipe(
    mixer="mamba2",
    options=("activation=silu", "write=dt", "rotary=null"),
    place="uniform",
    keep=0.5,
    batch=64,
    seq=2048,
    phases=(
        Phase("stepwise", RATE, name="half", share=0.5, options={"converted": 0.5, "labels": LABELS}),
        Phase("stepwise", RATE, name="all", share=0.5, options={"converted": 1.0, "labels": LABELS}),
        # Optional: left out until it has tokens of its own.
        Phase("supervise", Rate(2e-5, old=1.0, warmup=0.01, schedule="cosine", floor=0.0, betas=(0.9, 0.999))),
    ),
)
