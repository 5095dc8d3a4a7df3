"""LoLCATs: only the feature maps learn to stand for softmax, then low-rank adapters absorb what is left."""

from __future__ import annotations

from subquad.core.card import Card
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

CARD = Card(
    title="LoLCATs: On Low-Rank Linearizing of Large Language Models",
    entry="RECIPE",
    arxiv="2410.10254",
    needs="a teacher of dense attention; instructions or other text of the kind it will be used on",
    gives="a window with a linear state in every layer, from 0.2 % of the parameters: the smallest trained difference",
    status="incubating",
    claim="closes 77.8 % of the gap of linearised Llama 3.1 70B in 5-shot MMLU with 40 M tokens",
    measured="not reproduced",
)

RECIPE = Recipe(
    mixer="windowed_linear",
    options=("window=64", "sinks=0", "features=128"),
    place="uniform",
    keep=0.0,
    batch=8,
    seq=1024,
    phases=(
        Phase(
            "align",
            Rate(1e-2, warmup=0.0, schedule="cosine", floor=1e-3, betas=(0.9, 0.999)),
            share=0.5,
            train=("*.k_map_*", "*.q_map_*"),
        ),
        Phase(
            "supervise",
            Rate(1e-4, warmup=0.0, schedule="cosine", floor=0.1, betas=(0.9, 0.999)),
            share=0.5,
            train=(
                "*.mixer.*q_proj.weight",
                "*.mixer.*k_proj.weight",
                "*.mixer.*v_proj.weight",
                "*.mixer.*o_proj.weight",
            ),
            options={"rank": 8, "alpha": 16.0},
        ),
    ),
)
