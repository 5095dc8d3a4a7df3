"""RADLADS: align the attention's outputs at a falling rate, distil at a small flat one, end on long text."""

from __future__ import annotations

from subquad.core.card import Card
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

CARD = Card(
    title="RADLADS: Rapid Attention Distillation to Linear Attention Decoders at Scale",
    entry="RECIPE",
    arxiv="2505.03005",
    needs="a teacher of dense attention; the same kind of text that it was trained on",
    gives="a student without attention from 350 to 700 million tokens, most of them in short sequences",
    status="incubating",
    claim="Qwen2.5 of 7 to 72 B converted with at most 700 M tokens, state of the art among pure recurrent models",
    measured="not reproduced",
)

BETAS = (0.9, 0.95)

RECIPE = Recipe(
    mixer="gated_deltanet",
    place="uniform",
    keep=0.0,
    batch=32,
    seq=512,
    phases=(
        Phase("align", Rate(1e-3, warmup=0.01, schedule="cosine", floor=0.01, betas=BETAS), share=1 / 7),
        Phase("distill", Rate(1e-5, old=1.0, warmup=0.01, schedule="constant", betas=BETAS), share=5 / 7),
        Phase(
            "supervise",
            Rate(1e-5, old=1.0, warmup=0.01, schedule="constant", betas=BETAS),
            name="long",
            share=1 / 7,
            seq=8192,
        ),
    ),
)
