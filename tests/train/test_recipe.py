"""A recipe's budgets, schedule and order of phases: what is refused, and what is left out."""

import dataclasses

import pytest

from subquad.core.errors import ConfigError
from subquad.train.loop import Budget
from subquad.train.optimiser import Rate
from subquad.train.recipe import PLAIN, Phase, Recipe, cached, override


def test_a_phase_is_left_out_by_0_alone():
    recipe = Recipe((Phase("align", Rate(1e-3), share=0.1), Phase("distill", Rate(1e-3), share=0.9)))
    missing = r"phase align: expected --tokens, of which it takes 0.1, got none; give --tokens, or the phase its own"
    for settings in ([], ["distill.tokens=30M"], ["distill.minutes=3"]):
        with pytest.raises(ConfigError, match=missing):
            override(recipe, settings).budgets(None)
    for zero in ("align.tokens=0", "align.minutes=0", "align.share=0"):
        assert override(recipe, [zero, "distill.minutes=3"]).budgets(None) == {"distill": Budget(None, 3)}
    assert override(recipe, ["align.tokens=0", "distill.share=1"]).budgets(500) == {"distill": Budget(500)}
    # No training at all has to be said, too.
    for settings, tokens in (([], 0), (["align.tokens=0", "distill.minutes=0"], None)):
        assert override(recipe, settings).budgets(tokens) == {}
    assert PLAIN.budgets(0) == {}
    with pytest.raises(ConfigError, match="got none; give a stage its own: --stage align.tokens=100k .0 for no train"):
        PLAIN.budgets(None)
    with pytest.raises(ConfigError, match="got --tokens 9 and no phase with a share of them; give a stage its own"):
        PLAIN.budgets(9)


def test_the_schedule_says_what_every_phase_will_do():
    phases = Phase("align", Rate(1e-3), share=0.1), Phase("distill", Rate(3e-4), share=0.9, minutes=3.0, seq=4096)
    recipe = Recipe((*phases, Phase("supervise", Rate(1e-5))))
    assert recipe.schedule(20_000, 1024) == [
        "align: 2,000 tokens in sequences of 1,024, rate 0.001",
        "distill: 18,000 tokens or 3 minutes in sequences of 4,096, rate 0.0003",
        "supervise: left out",
    ]


def test_a_recipe_never_goes_back():
    def chain(*shares):
        return tuple(Phase("stepwise", Rate(1.0), name=str(i), options={"converted": x}) for i, x in enumerate(shares))

    Recipe((Phase("align", Rate(1.0)), *chain(0.25, 0.25, 1.0), Phase("distill", Rate(1.0))))
    with pytest.raises(
        ConfigError, match="phase 1 to convert at least 1 of the layers, .* got 0.25; raise 1.converted"
    ):
        Recipe(chain(1.0, 0.25))
    with pytest.raises(ConfigError, match="expected phase 0 to convert at least 1 of the layers"):
        Recipe((Phase("distill", Rate(1.0)), *chain(0.5)))


def test_cached_reads_the_same_phase_from_disk():
    recipe = Recipe(
        (Phase("align", Rate(1e-3), share=0.1), Phase("distill", Rate(3e-4), share=0.9, train=("*norm*",), seq=64))
    )
    align, distill = cached(override(recipe, ["distill.labels=0.5", "distill.reverse=0"]), "there").phases
    assert align == recipe.phases[0]
    assert distill == dataclasses.replace(
        recipe.phases[1], stage="distill_cached", options={"cache": "there", "labels": 0.5}
    )
    for setting in ("distill.temperature=2", "distill.reverse=0.1"):
        with pytest.raises(ConfigError, match="expected phase distill at temperature 1 and reverse 0"):
            cached(override(recipe, [setting]), "there")
    with pytest.raises(ConfigError, match="--teacher-logits: expected a recipe with a stage distill, got align"):
        cached(Recipe(recipe.phases[:1]), "there")
