"""What a conversion reads: the model to convert, sources of text, streams of tokens, and what no training sees."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from subquad.convert.transplant.samples import is_own, own_samples
from subquad.convert.transplant.settings import Settings, Surroundings
from subquad.core.errors import ConfigError
from subquad.data import Source, TokenStream, held_out_text, parse_source
from subquad.data.overlap import Overlap, check_overlap
from subquad.evals.text import CHARS_A_TOKEN, TextTokens, read_text, tokenize_text
from subquad.models.load import check_pair, load_model
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel

# Of an evaluation text, looked for in the data.
OVERLAP_CHARS = 10_000_000


class Streams:
    """The run's streams by length of their sequences, each as many tokens a batch; closed together."""

    def __init__(self, settings: Settings, sources: list[Source], loaded: LoadedModel) -> None:
        self.settings, self.sources, self.loaded = settings, sources, loaded
        self._open: dict[int, TokenStream] = {}

    def __call__(self, seq: int) -> TokenStream:
        """The stream of sequences of `seq` tokens."""
        if seq not in self._open:
            self._open[seq] = TokenStream(
                self.sources,
                self.loaded.tokenizer,
                batch=self.settings.rows_of(seq),
                time=seq,
                seed=self.settings.seed,
                fraction=self.settings.held_out,
            )
        return self._open[seq]

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open.values():
            stream.close()


def source_model(settings: Settings, loaded: LoadedModel, here: Surroundings) -> Stack:
    """The model to convert: the teacher, or a smaller one that speaks its tokens."""
    if settings.start is None:
        return loaded.model
    start = load_model(settings.start, dtype=torch.float32, device=here.device)
    check_pair(loaded, start)
    return start.model.requires_grad_(False)


def overlap_with(settings: Settings, sources: list[Source], loaded: LoadedModel, here: Surroundings) -> list[Overlap]:
    """What each source holds of each evaluation text."""
    if not settings.eval_texts:
        return []
    here.say(f"looking for {', '.join(settings.eval_texts)} in the data")
    texts = {spec: read_text(spec, loaded.tokenizer, OVERLAP_CHARS) for spec in settings.eval_texts}
    found = check_overlap(sources, texts)
    for one in found:
        here.say(f"warning: {one}" if one.found else f"{one.text} is not in {one.source}: {one.figure}")
    return found


def held_out(settings: Settings, sources: list[Source], loaded: LoadedModel) -> TextTokens:
    """What no training sees, for the evaluation at the end."""
    chars = settings.eval_tokens * CHARS_A_TOKEN
    text = held_out_text(sources, loaded.tokenizer, fraction=settings.held_out, chars=chars)
    return tokenize_text(loaded.tokenizer, text, settings.eval_tokens)


def first_rows(stream: TokenStream, rows: int) -> Tensor:
    """``[rows, t]``: the first sequences of a stream."""
    return torch.cat([batch.tokens_bt for batch in islice(stream, -(-rows // stream.batch))])[:rows]


def open_sources(settings: Settings, loaded: LoadedModel, out: Path, here: Surroundings) -> list[Source]:
    """The sources that `settings.data` names; the teacher's own samples are drawn for it.

    Raises:
        ConfigError: none is named, or samples are there that were drawn in another way.
        DataError: as in `parse_source`.
    """
    if not settings.data:
        raise ConfigError(
            "expected --data, got none; give --data FILE, --data pydoc, or --data self for no data at all"
        )
    sources: list[Source] = []
    for spec in settings.data:
        if not is_own(spec):
            sources.append(parse_source(spec))
            continue
        documents = settings.samples or _documents(settings)
        here.say(f"{spec}: up to {documents} documents of at most {settings.time} tokens from the teacher")
        sources.append(
            own_samples(
                spec,
                loaded.model,
                loaded.tokenizer,
                out,
                documents=documents,
                length=settings.time,
                seed=settings.seed,
                display=here.display,
            )
        )
    return sources


def _documents(settings: Settings) -> int:
    budgets = settings.recipe.budgets(settings.tokens).values()
    tokens = sum(budget.tokens for budget in budgets if budget.tokens is not None)
    return max(64, -(-tokens // settings.time)) if tokens else 256
