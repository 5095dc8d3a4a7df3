"""The teacher's own samples as training text: texts from nothing, or its answers to the prompts of a file."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from subquad.core.errors import DataError
from subquad.data.sources import Conversation, Document, Source, parse_source, render, split_options
from subquad.engine.generate import Limits, generate_many
from subquad.engine.sampler import SamplingConfig
from subquad.models.difference import digest
from subquad.models.stack import Stack
from subquad.train.checkpoint import write_atomically
from subquad.train.loop import Display, Progress

MOST_ROWS = 512
ROWS_ON_CPU = 16


# The teacher itself, at some temperature, and the prompts that it answers.
OWN = re.compile(r"self(?:@(?P<temperature>[^:]*))?(?::(?P<prompts>.*))?")


def is_own(spec: str) -> bool:
    """Whether ``--data`` names the teacher itself.

    That is ``self``, or ``self:FILE`` with what `parse_source` takes; ``self@0.7`` and ``self@0.7:FILE`` are at another
    temperature than 1, and 0 is greedy.
    """
    return OWN.fullmatch(split_options(spec)[0]) is not None


def own_samples(
    spec: str,
    teacher: Stack,
    tokenizer: Any,
    folder: Path,
    *,
    documents: int,
    length: int,
    seed: int = 0,
    display: Display | None = None,
) -> Source:
    """The source of the teacher's samples that `spec` names, which are drawn now as far as `folder` has not got them.

    Args:
        spec: see `is_own`; with options as every source.
        teacher, tokenizer, documents, length, seed, display: as in `write_samples`.
        folder: where the samples go.

    Raises:
        DataError: as `parse_source` and `write_samples`, or a temperature that is none.
    """
    place, options = split_options(spec)
    own = OWN.fullmatch(place)
    assert own is not None
    prompts = None if own["prompts"] is None else parse_source(own["prompts"])
    # The name tells of which prompts, so that answers to several files lie side by side.
    name = "samples" if prompts is None else f"answers-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"
    name += "" if own["temperature"] is None or prompts else f"-{own['temperature']}"
    path = folder / f"{name}.jsonl"
    write_samples(
        teacher,
        tokenizer,
        path,
        documents=documents,
        length=length,
        prompts=prompts,
        seed=seed,
        temperature=_temperature(spec, own["temperature"]),
        display=display,
    )
    # Called as it was asked for, wherever the folder is moved to before a resume.
    return Source(spec, parse_source(str(path)).open, **options)


def _temperature(spec: str, text: str | None) -> float:
    try:
        temperature = 1.0 if text is None else float(text)
    except ValueError:
        temperature = math.nan
    if not 0 <= temperature < math.inf:
        raise DataError(f"{spec}: expected a temperature of at least 0 behind self@, got {text!r}; write self@0.7")
    return temperature


def write_samples(
    teacher: Stack,
    tokenizer: Any,
    path: Path,
    *,
    documents: int,
    length: int,
    prompts: Source | None = None,
    rows: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    display: Display | None = None,
) -> None:
    """Sample `documents` texts from the teacher and write them to `path` as JSONL.

    Without prompts each begins with the tokenizer's start token (or its end token, where it has no start), and is a
    record with ``text``. With prompts the teacher answers them through its chat template, and a record holds
    ``messages``, the answer last, and ``finish``: ``end``, or ``length`` for one that was cut off. Samples go to a file
    beside `path` as they come, and a call after an interruption draws only what is missing there. Another file beside
    it, ``.terms.json``, says what they were drawn from. The same seed gives the same texts, on a GPU but for rounding,
    in whatever order and company they are drawn.

    Args:
        teacher: the model.
        tokenizer: its tokenizer.
        path: a file that is there afterwards whole, or not at all; nothing is drawn where it is there before.
        documents: how many; with prompts at most one for each of them, chosen at random.
        length: most tokens of one; a prompt has at most half of it, or is left out, and an answer the other half.
        prompts: text is what the user says; of a conversation the last answer is left out and given anew.
        rows: sampled side by side; by default what half of a GPU's free memory holds, or a few on a CPU.
        seed: of the first; every document has its own.
        temperature: of the samples.
        display: told about the progress.

    Raises:
        DataError: no start and no end token to begin with, no prompt that is short enough, or samples at `path` that
            were drawn from something else.
    """
    _settle(
        path,
        {
            "teacher": digest(teacher),
            "prompts": prompts and prompts.name,
            "documents": documents,
            "length": length,
            "seed": seed,
            "temperature": temperature,
        },
    )
    if path.exists():
        return
    if prompts is None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise DataError("--data self: expected a tokenizer with a start or end token, got neither; give FILE")
        conversations: list[Conversation] = []
        contexts = [[start]] * documents
    else:
        conversations, contexts = _contexts(prompts, tokenizer, documents, length // 2, seed)
    new = length - (1 if prompts is None else length // 2)
    limits = Limits(max_new_tokens=new, end_tokens=_ends(teacher, tokenizer))
    part = _Part(path)
    # Longest first: prompts of like length are read together, and the time left is not guessed too low.
    missing = sorted((i for i in range(len(contexts)) if i not in part.records), key=lambda i: (-len(contexts[i]), i))
    if missing:
        # In bfloat16 a GPU samples several times as fast; a CPU does not.
        model = copy.deepcopy(teacher).to(torch.bfloat16) if teacher.device.type == "cuda" else teacher
        drawn = generate_many(
            model,
            [contexts[i] for i in missing],
            rows=rows or rows_at_once(model, length),
            limits=limits,
            sampling=[SamplingConfig(temperature=temperature, seed=seed + i) for i in missing],
        )
        shown = _Shown(display, len(contexts), len(part.records))
        for at, result in drawn:
            i, inner = missing[at], result.tokens[:-1] if result.finish == "end" else result.tokens
            if prompts is None:
                record: dict[str, Any] = {"text": tokenizer.decode([*contexts[i], *inner])}
            else:
                said = tokenizer.decode(inner, skip_special_tokens=True)
                messages = [*conversations[i], {"role": "assistant", "content": said}]
                record = {"messages": messages, "finish": result.finish}
            part.add(i, record)
            shown(len(result.tokens))
    part.finish()


def rows_at_once(model: Stack, capacity: int) -> int:
    """How many rows of `capacity` tokens are sampled side by side: what half of a GPU's free memory holds."""
    if model.device.type != "cuda":
        return ROWS_ON_CPU
    free, _ = torch.cuda.mem_get_info(model.device)
    # Beside a row's state stand its logits, the noise on them and their intermediate results.
    each = model.init_state(1, capacity, device="meta").nbytes + 64 * model.config.vocab_size
    return max(1, min(MOST_ROWS, free // 2 // each))


def _ends(teacher: Stack, tokenizer: Any) -> list[int]:
    ends = {*teacher.config.eos_tokens, tokenizer.eos_token_id} - {None}
    return sorted(ends)


def _contexts(
    prompts: Source, tokenizer: Any, documents: int, longest: int, seed: int
) -> tuple[list[Conversation], list[list[int]]]:
    """Conversations that wait for an answer, and the tokens that it comes after."""
    asked = [_asked(document, prompts.name) for document in prompts.open()]
    conversations: list[Conversation] = []
    contexts: list[list[int]] = []
    order = np.random.default_rng(seed).permutation(len(asked)).tolist()
    for start in range(0, len(order), 1024):
        some = [asked[i] for i in order[start : start + 1024]]
        texts = [_before_answer(one, tokenizer) for one in some]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for one, ids in zip(some, encoded, strict=True):
            if 0 < len(ids) <= longest and len(contexts) < documents:
                conversations.append(one)
                contexts.append(ids)
        if len(contexts) == documents:
            break
    if not contexts:
        raise DataError(
            f"{prompts.name}: expected prompts of at most {longest} tokens, got {len(asked)} others; raise --seq"
        )
    return conversations, contexts


def _asked(document: Document, name: str) -> Conversation:
    if isinstance(document, str):
        return [{"role": "user", "content": document}]
    turns = document[:-1] if document[-1]["role"] == "assistant" else document
    if not turns:
        raise DataError(f"{name}: expected a conversation that asks something, got only an answer; drop the record")
    return turns


def _before_answer(conversation: Conversation, tokenizer: Any) -> str:
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    return f"{render(conversation, tokenizer)}\n\n"


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _settle(path: Path, terms: dict[str, Any]) -> None:
    """Write down what the samples at `path` are drawn from, or refuse those that are there from something else."""
    record = path.with_suffix(".terms.json")
    if not path.exists() and not _unfinished(path).exists():
        text = json.dumps(terms, indent=1) + "\n"
        write_atomically(record, lambda file: file.write(text.encode()))
        return
    there: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for name, mine in terms.items():
        if there.get(name) != mine:
            raise DataError(
                f"{path}: expected samples with {name} {mine}, got {there.get(name, 'no record of it')}; "
                "give the same settings, move the samples away, or choose another --out"
            )


class _Part:
    """Records as they come, in a file of their own until all are there."""

    def __init__(self, path: Path) -> None:
        """Take up what an interrupted call left."""
        self.path, self.part = path, _unfinished(path)
        self.records: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(self._left())
        write_atomically(self.part, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
        self.file = self.part.open("a", encoding="utf-8")

    def _left(self) -> Iterator[str]:
        if not self.part.exists():
            return
        # The last line was not written whole, if it is not empty.
        for line in self.part.read_text(encoding="utf-8").split("\n")[:-1]:
            number, record = json.loads(line)
            self.records[number] = record
            yield line

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Write `record` now."""
        self.records[number] = record
        self.file.write(json.dumps([number, record]) + "\n")
        self.file.flush()

    def finish(self) -> None:
        """Put all records, in order, where they belong."""
        self.file.close()
        lines = "".join(json.dumps(record) + "\n" for _, record in sorted(self.records.items()))
        write_atomically(self.path, lambda file: file.write(lines.encode()))
        self.part.unlink()


class _Shown:
    """Tells a display how far the samples are, about once a second."""

    def __init__(self, display: Display | None, total: int, before: int) -> None:
        self.display, self.total, self.before = display, total, before
        self.documents = self.tokens = 0
        self.began = self.last = time.monotonic()

    def __call__(self, tokens: int) -> None:
        """One more document, of so many tokens."""
        self.documents += 1
        self.tokens += tokens
        now = time.monotonic()
        if self.display is None or (now - self.last < 1 and self.documents < self.total - self.before):
            return
        self.last, seconds = now, max(now - self.began, 1e-9)
        # Of this call's share only, so that the time left is right after an interruption.
        share = self.documents / (self.total - self.before)
        done = self.before + self.documents
        self.display(Progress("sample", done, self.tokens, seconds, share, float("nan"), self.tokens / seconds))
