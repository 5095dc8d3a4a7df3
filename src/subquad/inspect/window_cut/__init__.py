"""Which layers, or which heads, need their whole context: cut them to a window and see what it costs."""

from subquad.core.card import Card
from subquad.inspect.window_cut.cut import CutScore, Measured, Unit, WindowCut, Yardstick
from subquad.inspect.window_cut.search import Choice, choose, grow, joint, refine, spreads

__all__ = [
    "CARD",
    "Choice",
    "CutScore",
    "Measured",
    "Unit",
    "WindowCut",
    "Yardstick",
    "choose",
    "grow",
    "joint",
    "refine",
    "spreads",
]

CARD = Card(
    title="Importance of layers and heads by cutting attention to a window",
    entry="WindowCut",
    gives="the layers or heads to convert: those whose view of the far past is least missed, in loss and retrieval",
    needs="a model with full attention, some thousand tokens of text, and a tokenizer for the needles",
    status="incubating",
    claim="which layers are converted matters more than how many",
    measured="not reproduced: no result file yet",
)
