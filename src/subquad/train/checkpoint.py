"""The run folder: a checkpoint that is whole or not there, a log of every step, and the record of the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from subquad.core.errors import CheckpointError
from subquad.models.checkpoint import recover

SCHEMA = 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under another name and move it in place: whoever looks sees the old one or the new one, whole.

    Folders on the way are made.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError.
        with suppress(OSError):
            part.unlink(missing_ok=True)
        kept = "the old one is intact" if path.exists() else "there was none before"
        raise CheckpointError(
            f"{path}: could not be written ({error}); {kept}; free some space or write elsewhere; "
            "a conversion goes on with --resume"
        ) from error


class RunFolder:
    """``checkpoint.pt``, ``log.jsonl`` and ``run.json`` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint, self.log, self.record = path / "checkpoint.pt", path / "log.jsonl", path / "run.json"
        self._writing: Future[None] | None = None
        recover(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path}: expected a folder to write to, got {error}; choose another --out"
            ) from error

    def save(self, content: dict[str, Any], *, later: bool = False) -> None:
        """Write the checkpoint: nested dictionaries of tensors, numbers and strings.

        Args:
            content: what it holds.
            later: copy the tensors to the host's memory and return; `settle`, or the next save, waits for the disk.
        """
        self.settle()
        content = {"schema": SCHEMA} | content
        if not later:
            write_atomically(self.checkpoint, lambda file: torch.save(content, file))
            return
        copied = _on_host(content)
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing = writer.submit(write_atomically, self.checkpoint, lambda file: torch.save(copied, file))
        writer.shutdown(wait=False)

    def settle(self) -> None:
        """Wait until what is being written lies on the disk.

        Raises:
            CheckpointError: it could not be written; the checkpoint before it is intact.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load(self) -> dict[str, Any]:
        """The checkpoint, on the CPU.

        Raises:
            CheckpointError: none there, not readable, or of another schema.
        """
        if not self.checkpoint.exists():
            raise CheckpointError(f"{self.path}: expected a checkpoint to resume, got none; start without --resume")
        try:
            content: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.checkpoint}: expected a checkpoint, got {type(error).__name__}; restore it or start anew"
            ) from error
        if content.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{self.checkpoint}: expected schema {SCHEMA}, got {content.get('schema')}; "
                "resume with the version that wrote it"
            )
        return content

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; a last line that a killed process left unfinished is dropped."""
        if not self.log.exists():
            return []
        whole = self.log.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in whole]

    def spent(self) -> dict[str, tuple[int, float]]:
        """Tokens and seconds of every stage in the log, by its name."""
        return {line["stage"]: (line["tokens"], line["seconds"]) for line in self.lines()}

    def rewind(self, stages: Iterable[str], stage: str, step: int) -> None:
        """Drop from the log what came after `step` of `stage`, which a resumed run writes again.

        Args:
            stages: those of the run, in order.
        """
        order = list(stages)
        at = (order.index(stage), step)
        kept = [line for line in self.lines() if (order.index(line["stage"]), line["step"]) <= at]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.log, lambda file: file.write(text.encode()))

    def note(self, **facts: Any) -> None:
        """Add facts to ``run.json``; a fact of the same name is replaced."""
        text = json.dumps(self.facts() | facts, indent=2) + "\n"
        write_atomically(self.record, lambda file: file.write(text.encode()))

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        return json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}


def _on_host(tree: Any) -> Any:
    """A copy that no later step changes; other things than tensors in dictionaries and lists are taken as they are."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {k: _on_host(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_on_host(v) for v in tree)
    return tree
