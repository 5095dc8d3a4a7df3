"""Weights into a model: every tensor named, none missing, none left over, none of another shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from subquad.core.errors import CheckpointError
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

_SHOWN = 3


def build(config: ModelConfig, weights: Mapping[str, Tensor], *, where: str) -> Stack:
    """A `Stack` made of the given tensors, sharing their storage.

    Args:
        config: of the model.
        weights: its state dict, without ``lm_head.weight`` where the head is tied.
        where: what was read, for the message.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape than the config asks for.
    """
    with torch.device("meta"):
        model = Stack(config)
    expected = model.state_dict()
    if config.tied:
        del expected["lm_head.weight"]
    extra, missing = sorted(set(weights) - set(expected)), sorted(set(expected) - set(weights))
    if extra:
        absent = f"; {_listed('missing tensor', missing)}" if missing else ""
        raise CheckpointError(
            f"{where}: {_listed('unknown tensor', extra)}{absent}; check that config and weights belong together"
        )
    if missing:
        raise CheckpointError(
            f"{where}: {_listed('missing tensor', missing)}; the checkpoint is incomplete, fetch or save it again"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name}: expected shape {tuple(tensor.shape)}, got {tuple(weights[name].shape)}; "
                "check that config and weights belong together"
            )
    model.load_state_dict(dict(weights), strict=False, assign=True)
    if config.tied:
        model.lm_head.weight = model.embed.weight
    unset = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not unset, f"a mixer keeps {unset} outside its state dict, so no checkpoint can restore it"
    return model.requires_grad_(True).eval()


def _listed(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}{'s' if len(names) > 1 else ''} {shown}{rest}"
