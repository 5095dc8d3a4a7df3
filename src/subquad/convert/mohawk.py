"""MOHAWK: match the mixing matrices, then the layers' outputs, then the whole model's distribution."""

from __future__ import annotations

from subquad.core.card import Card
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

CARD = Card(
    title="Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models",
    entry="RECIPE",
    arxiv="2408.10189",
    needs="a teacher of dense attention, and a student mixer that is linear in its values head by head",
    gives="a student whose mixing, layers and distribution were each brought to the teacher's, from the inside out",
    status="incubating",
    claim="Phi-1.5 as a Mamba-2 with 3 B tokens, ahead of all open models without attention of its size",
    measured="not reproduced",
)

RECIPE = Recipe(
    mixer="mamba2",
    options=("write=dt",),
    place="uniform",
    keep=0.0,
    batch=16,
    seq=2048,
    phases=(
        Phase("matrix", Rate(5e-4, warmup=0.1), share=80 / 3000),
        Phase("align", Rate(5e-4, warmup=0.1), share=160 / 3000),
        Phase("distill", Rate(5e-4, old=1.0, warmup=0.1), share=2760 / 3000),
    ),
)
