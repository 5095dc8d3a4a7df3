"""Where documents come from: text files, JSONL, Hugging Face datasets, and what every Python carries."""

from __future__ import annotations

import ast
import gzip
import json
import lzma
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any, Protocol, cast

from subquad.core.errors import DataError, nearest

OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
DOCUMENT_CHARS = 8_192
LONGEST_CHARS = 65_536
# Of the folders beside Python's library those that are not part of it, or made to be odd.
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"})
COMPLETE = "Complete this Python function."


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of `transformers` serve."""

    eos_token_id: int | None
    chat_template: Any

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool, **options: Any
    ) -> Mapping[str, Any]:
        """``{"input_ids": one list of ids a text}``; `verbose` warns about texts beyond the model's context."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any:
        """The conversation as one string."""
        ...


Conversation = list[dict[str, str]]
Document = str | Conversation


@dataclass(frozen=True)
class Source:
    """Documents of one origin.

    Attributes:
        name: as it was asked for.
        open: starts from the first document, always in the same order.
        weight: its share of what is read, relative to the other sources' weights; None is by size.
        completions: only what the assistant says counts as a label, so that every document is a conversation.
    """

    name: str
    open: Callable[[], Iterator[Document]]
    weight: float | None = None
    completions: bool = False


def render(document: Document, tokenizer: Tokenizer) -> str:
    """A document as plain text; a conversation goes through the tokenizer's chat template where it has one."""
    if isinstance(document, str):
        return document
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(document, tokenize=False))
    return "\n\n".join(turn["content"] for turn in document)


def parse_source(spec: str) -> Source:
    """The source that `spec` names.

    Args:
        spec: ``FILE.txt`` (also .md, .rst), ``FILE.jsonl[#FIELD]`` or ``FILE.jsonl#PROMPT+RESPONSE``, each also with
            .gz or .xz behind it; ``datasets:NAME[:CONFIG][@SPLIT][#FIELD]``; ``pydoc``, Python's own manual; or
            ``pycode``, conversations that ask to complete a function of its library. Without a field a record is read
            by its ``text``, its ``messages``, or its ``prompt`` and ``response``. Behind it options as `split_options`
            takes them.

    Raises:
        DataError: no such file, a kind that is not known, or an option that can't be.
    """
    place, options = split_options(spec)
    return Source(spec, _opener(place), **options)


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """What stands before the options of a source, and the fields of `Source` that they set.

    Args:
        spec: a source, and behind it, in any order, ``,weight=NUMBER`` and ``,completions``.

    Raises:
        DataError: a weight that is no number above 0, or an option that is given twice.

    Example:
        >>> split_options("a.jsonl#q+a,completions,weight=2")
        ('a.jsonl#q+a', {'weight': 2.0, 'completions': True})
    """
    options: dict[str, Any] = {}
    while True:
        rest, _, option = spec.rpartition(",")
        name, equals, value = option.partition("=")
        # Any other comma belongs to a file's name.
        if not rest or (option != "completions" and (name, equals) != ("weight", "=")):
            return spec, options
        if name in options:
            raise DataError(f"{spec}: expected {name} once, got it twice; drop one")
        options[name] = _weight(spec, value) if equals else True
        spec = rest


def _weight(spec: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(f"{spec}: expected a weight above 0, got {value!r}; give a number such as weight=2")
    return weight


def _opener(place: str) -> Callable[[], Iterator[Document]]:
    if place in CARRIED:
        return CARRIED[place]
    name, _, field = place.partition("#")
    if name.startswith("datasets:"):
        return lambda: _hub(name.removeprefix("datasets:"), field)
    path = Path(name)
    if not path.is_file():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "; options are ,completions and ,weight=NUMBER" if "," in place else ""
        known = nearest(path.name.partition(",")[0], [*there, *CARRIED])
        raise DataError(f"{name}: expected a file of text, got no such file{known}{hint}")
    suffixes = [s for s in path.suffixes if s not in OPENERS]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".jsonl":
        return lambda: _jsonl(path, field)
    if kind in TEXT_SUFFIXES:
        return lambda: _text(path)
    raise DataError(
        f"{name}: expected one of {', '.join(TEXT_SUFFIXES)} or .jsonl (with .gz or .xz if packed), "
        f"got {kind or 'no suffix'!r}; rename it to what it holds"
    )


def _lines(path: Path) -> Iterator[str]:
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            yield from file
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"{path}: expected intact UTF-8 text, got {error}; repair or re-encode the file") from error


def _text(path: Path) -> Iterator[Document]:
    # Plain text names no documents, so it is cut where a paragraph ends, each piece long enough to have a context.
    held: list[str] = []
    size = 0
    for line in _lines(path):
        held.append(line)
        size += len(line)
        if (size >= DOCUMENT_CHARS and not line.strip()) or size >= LONGEST_CHARS:
            yield "".join(held)
            held, size = [], 0
    if "".join(held).strip():
        yield "".join(held)


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: expected one JSON object a line, got {error}; repair the line"
            ) from error
        yield _document(record, field, f"{path}:{number}")


def _document(record: Any, field: str, where: str) -> Document:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}; write one record a line")
    record = cast("dict[str, Any]", record)
    prompt, plus, response = field.partition("+")
    wanted = [prompt, response] if plus else [field] if field else []
    for key in wanted:
        if key not in record:
            raise DataError(f"{where}: no field {key!r}{nearest(key, record)}")
    if plus:
        return _turns(str(record[prompt]), str(record[response]))
    if field and isinstance(record[field], str):
        return str(record[field])
    if not field and isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get(field or "messages")
    if isinstance(messages, list) and messages:
        return [_turn(message, where) for message in cast("list[Any]", messages)]
    if not field and "prompt" in record and "response" in record:
        return _turns(str(record["prompt"]), str(record["response"]))
    raise DataError(
        f"{where}: expected text, messages, or prompt and response, got {', '.join(record)}; "
        "name the field behind the file: FILE.jsonl#FIELD or FILE.jsonl#PROMPT+RESPONSE"
    )


def _turn(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f'{where}: expected messages like {{"role": ..., "content": ...}}, got {message}; correct them')
    return {key: str(message[key]) for key in ("role", "content")}


def _turns(prompt: str, response: str) -> Conversation:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _pydoc() -> Iterator[Document]:
    from pydoc_data.topics import topics  # pyright: ignore[reportMissingModuleSource, reportUnknownVariableType]

    yield from topics.values()


def _pycode() -> Iterator[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if NOT_LIBRARY.isdisjoint(path.relative_to(library).parts):
            yield from _functions(path)


def _functions(path: Path) -> Iterator[Document]:
    """What says how it is to be completed: functions that begin with a docstring and go on behind it."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return  # A file that is meant to be broken.
    lines = text.split("\n")  # as the parser counts them
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
            head, whole = (dedent("\n".join(lines[node.lineno - 1 : last.end_lineno])) for last in (node.body[0], node))
            yield _turns(f"{COMPLETE}\n\n```python\n{head}\n```", f"```python\n{whole}\n```")


# What every Python carries.
CARRIED: dict[str, Callable[[], Iterator[Document]]] = {"pydoc": _pydoc, "pycode": _pycode}


def _hub(name: str, field: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # pyright: ignore
    except ImportError as error:
        raise DataError('datasets: expected the package datasets, got none; pip install "subquad[datasets]"') from error
    name, _, split = name.partition("@")
    name, _, config = name.partition(":")
    try:
        records: Any = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub, its client and the data set's own files raise a dozen kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"datasets:{name}: could not load it ({reason}); check name, config, split, network") from error
    for number, record in enumerate(records, 1):
        yield _document(record, field, f"datasets:{name} record {number}")


def pieces(text: str, longest: int = LONGEST_CHARS) -> Iterator[str]:
    """`text` in pieces of at most about `longest` characters, cut before white space so that no word is torn."""
    start = 0
    while len(text) - start > longest:
        cut = next((i for i in islice(range(start + longest, start, -1), 4_096) if text[i].isspace()), start + longest)
        yield text[start:cut]
        start = cut
    yield text[start:]
