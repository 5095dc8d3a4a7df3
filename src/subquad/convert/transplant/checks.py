"""What a conversion refuses before it costs anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from subquad.core.errors import ConfigError, DataError
from subquad.data import TokenStream
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel
from subquad.train.logits import LogitCache, Origin

if TYPE_CHECKING:
    from subquad.convert.transplant.settings import Settings


def check_settings(settings: Settings) -> None:
    """Refuse what no model need be loaded for.

    Raises:
        ConfigError: no budget, sequences longer than a batch, or a calibration without measurements.
    """
    batch = settings.rows * settings.time
    for name, seq in settings.lengths().items():
        if seq > batch:
            raise ConfigError(
                f"phase {name}: expected sequences of at most the {batch} tokens of a batch ({settings.rows} x "
                f"{settings.time}), got {seq}; give --stage {name}.seq={batch}, or a larger --batch"
            )
    if settings.recipe.calibrate and not settings.measure_tokens:
        raise ConfigError("--calibrate: expected tokens to measure on, got --measure-tokens 0; give some")


def check_positions(settings: Settings, models: Mapping[str, Stack]) -> None:
    """Refuse sequences longer than what one of `models` was made for.

    Args:
        settings: their phases that have a budget are looked at.
        models: by what they are called.

    Raises:
        ConfigError: with the option that asked for them.
    """
    own = {f"--stage {p.name}.seq": p.seq for p in settings.recipe.phases if p.seq and p.name in settings.lengths()}
    for option, seq in {"--seq": settings.time, **own}.items():
        for whose, model in models.items():
            if seq > model.config.max_positions:
                raise ConfigError(
                    f"{option} {seq}: expected at most {whose}'s {model.config.max_positions} positions; lower it"
                )


def check_caches(settings: Settings, loaded: LoadedModel, streams: Callable[[int], TokenStream]) -> None:
    """Refuse, before its phase has come, a cache of logits of something else, or one that ends too soon.

    Args:
        settings: whose phases may read a cache.
        loaded: the teacher.
        streams: by length of their sequences.

    Raises:
        CheckpointError: no cache, or a damaged one.
        DataError: it was made of another teacher, tokenizer or stream, or of too little of it.
    """
    lengths, budgets = settings.lengths(), settings.recipe.budgets(settings.tokens)
    phases = [phase for phase in settings.recipe.phases if phase.name in budgets]
    if all(phase.stage != "distill_cached" for phase in phases):
        return
    read = dict.fromkeys(lengths.values(), 0)
    for phase in phases:
        # Phases with sequences of one length read one stream, each behind the one before, in whole steps; of several
        # passes this is the least they read.
        seq = lengths[phase.name]
        stream = streams(seq)
        step = stream.batch * stream.time
        read[seq] += step * ceil(ceil((budgets[phase.name].tokens or 0) / step) / phase.options.get("passes", 1))
        if phase.stage == "distill_cached":
            folder = Path(phase.options["cache"]).expanduser()
            cache = LogitCache(folder)
            cache.origin.check(Origin.of(loaded.name, loaded.model, cache.origin.k, stream), folder)
            if cache.tokens < read[seq]:
                raise DataError(
                    f"{folder}: expected the first {read[seq]} tokens, for phase {phase.name} and those before it, got "
                    f"{cache.tokens}; go on with subquad cache --tokens {read[seq]}"
                )
