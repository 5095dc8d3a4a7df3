"""The card of a published method: literals only, readable without importing the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STATUSES = ("incubating", "stable", "retired")


@dataclass(frozen=True)
class Card:
    """What a method is, needs and gives, and what the paper and we measured.

    Attributes:
        title: name of the method as its paper gives it.
        entry: the class, function or recipe of the module that is the method.
        arxiv: arXiv id, or "" where there is no paper.
        needs: what must be there to use it.
        gives: what it is for, in one line.
        status: one of incubating, stable, retired.
        claim: the paper's headline claim, in one line.
        measured: our figure for it, or "not reproduced" with the reason.
        result: file under bench/results with that figure, or "".
        causal: no token sees a later one.
        splittable: reading in pieces equals reading at once.
        from_attention: has a mapping from softmax attention.
        constant_state: the state does not grow with the context.
        examples: name to config fields of tiny variants; a family's contract tests run over each.
    """

    title: str
    entry: str
    gives: str
    status: str
    arxiv: str = ""
    needs: str = ""
    claim: str = ""
    measured: str = ""
    result: str = ""
    causal: bool = True
    splittable: bool = True
    from_attention: bool = False
    constant_state: bool = False
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
