"""From loaded models to a site that serves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from subquad.engine.draft import Drafter, parse_drafter
from subquad.engine.translate import translate
from subquad.models.load import LoadedModel, load_model
from subquad.models.stack import Stack
from subquad.serve.bounds import Bounds
from subquad.serve.queue import Turns
from subquad.serve.served import Room, Served
from subquad.serve.site import Site


def build_site(
    models: Mapping[str, LoadedModel],
    room: Room,
    bounds: Bounds,
    *,
    draft: Sequence[str] = ("copyspec",),
    compile: bool = False,
    log_prompts: bool = False,
) -> Site:
    """Allocate for models that take turns; their workers are not started yet.

    Args:
        models: by the names that clients ask for.
        room: of each model.
        bounds: of a client.
        draft: what guesses tokens, as `parse_drafter` reads it; ``["none"]`` decodes plainly.
        compile: fuse rounds.
        log_prompts: also log what is asked and answered.

    Raises:
        ConfigError: no such drafter, no tokenizer, or no room.
    """

    def drafter(target: LoadedModel) -> Drafter | None:
        def small(spec: str) -> Stack:
            weight = next(target.model.parameters())
            dtype: torch.dtype = weight.dtype
            return translate(load_model(spec, dtype=dtype, device=weight.device), target)

        return None if list(draft) == ["none"] else parse_drafter(list(draft), small)

    turns = Turns()
    served = [
        Served.build(one, name, room, drafter=drafter(one), turns=turns, compile=compile)
        for name, one in models.items()
    ]
    return Site(served, bounds, log_prompts=log_prompts)
