"""Our own recipe: chosen heads keep attention, the rest a window and a linear state; maps first, then the whole."""

from __future__ import annotations

from subquad.core.card import Card
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

CARD = Card(
    title="Conversion head by head, with windows, sinks and a linear state",
    entry="RECIPE",
    needs="a teacher of softmax attention, its own kind of text, and one GPU for some minutes",
    gives="the most of the teacher for the attention that is kept: which heads keep it is measured, not guessed",
    status="incubating",
    claim="aim: 1.10 x the teacher's perplexity and 93 % of its needles at a quarter of the attention",
    measured="1.008 x and 94 %, and a fiftieth of the KL that The Mamba in the Llama leaves at equal tokens",
    result="convert.best.json",
)

# Everything that attends, and every norm. MLPs, embedding and head stay the teacher's own: a quarter less work for each
# token, and what is trained is small enough to be passed on as a difference.
TRAINED = ("*.mixer.*", "*norm*")
# All else in a mixer came from the teacher, and starts where it should end.
MAPS = ("*.k_map_*", "*.q_map_*")

RECIPE = Recipe(
    mixer="windowed_linear",
    options=("window=272", "sinks=4", "features=16"),
    place="chosen",
    keep=0.25,
    batch=4,
    seq=8192,
    phases=(
        Phase("align", Rate(0.03), share=0.1, train=MAPS),
        Phase("distill", Rate(3e-3, old=0.01), share=0.9, train=TRAINED, new=MAPS),
    ),
)
