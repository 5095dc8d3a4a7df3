"""A model that is served: its tokenizer, its worker, and how requests for it are made."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from subquad.core.errors import ConfigError
from subquad.engine.draft import Drafter
from subquad.engine.engine import Engine
from subquad.engine.grammar import Grammar
from subquad.engine.prefix import PrefixCache
from subquad.engine.request import Limits, Request
from subquad.engine.sampler import SamplingConfig
from subquad.models.load import LoadedModel
from subquad.serve.decoder import Decoder
from subquad.serve.queue import Turns
from subquad.serve.worker import Worker

LOG = logging.getLogger("subquad.serve.served")
T = TypeVar("T")
MOST_DRAFTED = 15
"""Guesses a row and round that may be chosen."""
COMPILERS = 2
"""Grammars of a model that are compiled at the same time."""


@dataclass(frozen=True)
class Room:
    """How much a served model takes.

    Attributes:
        rows: requests at a time; None is as many as fit `state_bytes`.
        state_bytes: of all rows together; None does not bound them.
        tokens: most of a request, prompt and what is written together.
        prefix_bytes: of the states of beginnings; 0 keeps none. While some are kept there are buffers beside them, two
            for as many rows as an eighth of all, 1 to 16.
        queue: most requests that wait.
        patience: seconds that one waits before a row is put aside for it.
        draft_tokens: guesses a row and round; None chooses by what they bring.
    """

    rows: int | None = None
    state_bytes: int | None = None
    tokens: int = 4096
    prefix_bytes: int = 256 * 2**20
    queue: int = 1024
    patience: float = 10.0
    draft_tokens: int | None = None

    def count(self, loaded: LoadedModel, capacity: int, block: int) -> int:
        """Rows of so many tokens for a model, of which a round reads a block.

        Raises:
            ConfigError: not even one fits.
        """
        if self.state_bytes is None:
            return 8 if self.rows is None else self.rows
        each = loaded.model.init_pool(1, capacity, block, device=torch.device("meta")).nbytes
        fit = self.state_bytes // each
        if fit < 1:
            raise ConfigError(
                f"state_bytes: expected at least {each} for a row of {capacity} tokens, got {self.state_bytes}; "
                "give more, or serve fewer tokens"
            )
        return fit if self.rows is None else min(fit, self.rows)


@dataclass
class Served:
    """A model, its worker, and a tokenizer for each side of it.

    Attributes:
        name: by which clients ask for it.
        loaded: the model.
        worker: steps its engine.
        tokenizer: encodes, in other threads than decode.
        decoder: decodes, in the worker's thread and the event loop's.
        created: seconds since 1970.
    """

    name: str
    loaded: LoadedModel
    worker: Worker
    tokenizer: Any
    decoder: Decoder
    created: int = field(default_factory=lambda: int(time.time()))
    _compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(COMPILERS, "grammars"))

    @classmethod
    def build(
        cls,
        loaded: LoadedModel,
        name: str,
        room: Room,
        *,
        drafter: Drafter | None = None,
        turns: Turns | None = None,
        compile: bool = False,
    ) -> Served:
        """Allocate for a model; its worker is not started yet.

        Raises:
            ConfigError: no tokenizer, or no room.
        """
        if loaded.tokenizer is None:
            raise ConfigError(f"{loaded.name}: expected a tokenizer with the model, got none; save one beside it")
        capacity = min(room.tokens, loaded.model.config.max_positions)
        guesses = 0 if drafter is None else room.draft_tokens or MOST_DRAFTED
        engine = Engine(
            loaded.model,
            rows=room.count(loaded, capacity, 1 + guesses),
            capacity=capacity,
            drafter=drafter,
            draft_tokens=room.draft_tokens if drafter is not None else None,
            most_drafted=MOST_DRAFTED,
            prefixes=PrefixCache(room.prefix_bytes) if room.prefix_bytes else None,
            compile=compile,
        )
        worker = Worker(engine, queue=room.queue, patience=room.patience, turns=turns)
        return cls(name, loaded, worker, copy.deepcopy(loaded.tokenizer), Decoder(loaded.tokenizer))

    def start(self) -> None:
        """Start the worker; on a GPU it first does what greedy and sampled requests need."""
        engine = self.worker.engine
        fields = {
            "model": self.name,
            "rows": engine.rows,
            "tokens_a_row": engine.capacity,
            "state_bytes": engine.nbytes,
        }
        LOG.info("serving", extra={"fields": fields})
        kinds = [SamplingConfig(), SamplingConfig(temperature=1.0), SamplingConfig(temperature=0.7, top_p=0.9)]
        self.worker.start([Request([0], Limits(1), kind) for kind in kinds])
        # The first grammar of a tokenizer takes longest. A tokenizer that takes none says so to those who ask for one.
        self._compiler.submit(Grammar.json_object, self.tokenizer)

    @property
    def ends(self) -> list[int]:
        """Token ids that end a row."""
        own = {*self.loaded.model.config.eos_tokens, self.tokenizer.eos_token_id}
        return sorted(own - {None})

    async def aside(self, work: Callable[[], T]) -> T:
        """Do what takes long, such as to encode a long text, in another thread."""
        return await asyncio.to_thread(work)

    async def grammar(self, make: Callable[[Any], Grammar]) -> Grammar:
        """Compile a grammar in a thread for such work alone: what is large delays nobody who asks for none."""
        return await asyncio.get_running_loop().run_in_executor(self._compiler, make, self.tokenizer)
