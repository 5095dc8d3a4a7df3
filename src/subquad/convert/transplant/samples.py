"""The teacher's own samples as training text, for when there is no data at all."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from subquad.core.errors import DataError
from subquad.engine.generate import Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.models.stack import Stack
from subquad.train.checkpoint import write_atomically
from subquad.train.loop import Display, Progress


def write_samples(
    teacher: Stack,
    tokenizer: Any,
    path: Path,
    *,
    documents: int,
    length: int,
    batch: int = 16,
    seed: int = 0,
    display: Display | None = None,
) -> None:
    """Sample `documents` texts from the teacher at temperature 1 and write them to `path` as JSONL.

    Each begins with the tokenizer's start token (or its end token, where it has no start) and ends where the teacher
    ends it, at the latest after `length` tokens. The same seed gives the same texts.

    Args:
        teacher: the model.
        tokenizer: its tokenizer.
        path: a file that is there afterwards whole, or not at all.
        documents: how many.
        length: most tokens of one.
        batch: sampled side by side.
        seed: of the first; every document has its own.
        display: told about the progress.

    Raises:
        DataError: the tokenizer has neither a start nor an end token.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise DataError("--data self: expected a tokenizer with a start or end token, got neither; give --data FILE")
    texts: list[str] = []
    began, tokens = time.monotonic(), 0
    while len(texts) < documents:
        rows = min(batch, documents - len(texts))
        sampling = SamplingConfig(temperature=1.0, seed=seed + len(texts))
        results = generate(teacher, [[start]] * rows, limits=Limits(max_new_tokens=length - 1), sampling=sampling)
        for result in results:
            inner = result.tokens[:-1] if result.finish == "end" else result.tokens
            texts.append(tokenizer.decode([start, *inner]))
            tokens += len(result.tokens)
        if display is not None:
            seconds = time.monotonic() - began
            share = len(texts) / documents
            display(Progress("sample", len(texts), tokens, seconds, share, float("nan"), tokens / seconds))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_atomically(path, lambda file: file.write(lines.encode()))
