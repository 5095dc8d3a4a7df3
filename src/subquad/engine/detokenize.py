"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subquad.core.errors import ConfigError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 16


class Detokenizer:
    """The text of one row, given out piece by piece; the pieces add up to the text of all tokens.

    A token may hold part of a character, and a leading space may show only after another token. So a short window
    is decoded with and without the new token, and the difference is the new text; an unfinished character, which
    decodes to U+FFFD, waits for the rest of its bytes.

    Args:
        tokenizer: has ``decode`` as in transformers.
        prompt: tokens before the first that is pushed; their text is not given out.
        stop: strings that end the text; neither they nor what follows is given out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise ConfigError(f"stop: expected strings of at least one character, got {list(stop)}; drop the empty one")
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self.held = ""
        # A window that begins inside a character may never decode it: a character has at most four bytes.
        windows = [list(prompt[max(len(prompt) - CONTEXT - extra, 0) :]) for extra in range(4)]
        # Most often the first will do.
        certain = ((window, n) for window in windows if (n := self._certain(window)) > 0)
        self.window, self.given = next(certain, (windows[0], 0))
        self.boundary = 0 if self._decode(self.window).endswith(UNFINISHED) else len(self.window)

    def _certain(self, tokens: list[int]) -> int:
        # Where tokens end inside a character, some tokenizers give up the whole run of bytes before it.
        shorter = [tokens[: max(len(tokens) - k, 0)] for k in range(4)]
        return max(len(self._decode(t).rstrip(UNFINISHED)) for t in shorter)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def push(self, *tokens: int) -> str:
        """The text that has become certain with `tokens`; `stopped` is True once a stop string has come."""
        self.window += tokens
        text = self._decode(self.window)
        certain = text.rstrip(UNFINISHED)
        piece, self.given = certain[self.given :], max(self.given, len(certain))
        if certain == text and len(self.window) >= self.boundary + CONTEXT:
            # Slide to the last boundary of characters that leaves enough context.
            self.window = self.window[self.boundary :]
            self.given, self.boundary = len(self._decode(self.window)), len(self.window)
        return self._release(self.held + piece)

    def finish(self) -> str:
        """What was held back, after the last token."""
        tail = "" if self.stopped else self.held + self._decode(self.window)[self.given :]
        self.held = ""
        return tail

    def _release(self, text: str) -> str:
        found = [at for at in map(text.find, self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        lengths = (n for s in self.stop for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
        keep = max(lengths, default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
