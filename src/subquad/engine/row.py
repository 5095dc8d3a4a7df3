"""A request under way: its tokens, how far the state has read them, and what comes of new ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from subquad.engine.detokenize import Detokenizer
from subquad.engine.given import Given
from subquad.engine.history import History
from subquad.engine.masks import EXHAUSTED, Rule
from subquad.engine.request import Piece, Request
from subquad.models.stack import StackState


@dataclass
class Row:
    """One request under way.

    Attributes:
        id, request: its number, and what is asked.
        tokens: of the prompt, and all that were drawn behind them.
        text: makes the text of them, where someone asked for it.
        ends: token ids that end it.
        rule: what holds it to a grammar.
        drawn: tokens behind the prompt.
        read: tokens that the state has read.
        saved: what it goes on from, once it was paused.
        marks: numbers of tokens read at which the state is to be kept for others.
    """

    id: int
    request: Request
    tokens: list[int]
    text: Detokenizer | None
    ends: set[int]
    rule: Rule | None = None
    drawn: int = 0
    read: int = 0
    saved: tuple[StackState, History] | None = None
    marks: list[int] = field(default_factory=list[int])

    @property
    def filled(self) -> bool:
        """All but the last token are read: that one begins the next block."""
        return self.read == len(self.tokens) - 1

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.request.limits.max_new_tokens - self.drawn

    def take(self, new: Given) -> list[Piece]:
        """New tokens as pieces, up to the one that ends it."""
        text, ends, left = self.text, self.ends, self.left
        pieces: list[Piece] = []
        own, top = new.scored
        for i, token in enumerate(new.tokens):
            shown, finish = "", None
            if token < 0:
                finish = "exhausted" if token == EXHAUSTED and self.rule is not None else "diverged"
            elif token in ends:
                finish = "end"
            elif text is not None:
                shown = text.push(token)
                finish = "stop" if text.stopped else None
            if finish is None and self.rule is not None and self.rule.push(token):
                finish = "end"
            if finish is None and i + 1 == left:
                finish = "length"
            if finish is not None and text is not None:
                shown += text.finish()
            score = own[i] if own and token >= 0 else math.nan
            pieces.append(Piece(self.id, max(token, -1), shown, score, finish, top[i] if top and token >= 0 else ()))
            if finish is not None:
                break
        self.drawn += len(pieces)
        self.read += len(pieces)
        self.tokens += new.tokens[: len(pieces)]
        return pieces
