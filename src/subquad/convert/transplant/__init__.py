"""Transplant: put new mixers where a teacher's attention stood, started from its weights and measured habits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from subquad.convert.transplant.measure import attention_of
from subquad.core.attention import AttentionStats
from subquad.core.card import Card
from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError
from subquad.core.mixer import Mixer
from subquad.core.registry import load
from subquad.models.stack import Stack, build_mixer

CARD = Card(
    title="The Mamba in the Llama: Distilling and Accelerating Hybrid Models",
    entry="transplant",
    arxiv="2408.15237",
    needs="a teacher whose converted layers are attention, and text or the teacher's own samples",
    gives="a hybrid from a pretrained Transformer: weights mapped, layers aligned in parallel, then distilled whole",
    status="incubating",
    claim="a hybrid with a quarter of the attention layers performs comparably to the Transformer in chat benchmarks",
    measured="chat not reproduced; half of SmolLM2-135M: 1.009 x the perplexity, tasks and needles as the teacher",
    result="convert.h100.half.json",
)


def transplant(
    teacher: Stack,
    placement: Mapping[int, str | Mapping[str, Any]],
    *,
    stats: Mapping[int, AttentionStats] | None = None,
    share: bool = False,
) -> Stack:
    """A student with other mixers in some layers, each built from the attention that it replaces.

    Args:
        teacher: not changed.
        placement: the new mixer by layer: its slug, or ``{"mixer": slug}`` with options of its `from_attention`.
        stats: from `measure`, by layer; None is the data-free start.
        share: use the teacher's own tensors for what is kept, instead of copies: half the memory, where nothing but
            the new mixers will be trained.

    Raises:
        ConfigError: an unknown mixer, or a layer that is not there.
        UnsupportedError: a mixer without a mapping from attention, or a layer that is no attention.
    """
    mixers: dict[int, Mixer] = {}
    slugs: dict[int, str] = {}
    for i, placed in sorted(placement.items()):
        if not 0 <= i < len(teacher.blocks):
            raise ConfigError(f"layer {i}: expected 0 to {len(teacher.blocks) - 1}; count from 0")
        options = {"mixer": placed} if isinstance(placed, str) else dict(placed)
        slugs[i] = options.pop("mixer")
        cls: type[Mixer] = load("mixers", slugs[i])
        with torch.no_grad():
            mixers[i] = cls.from_attention(
                attention_of(teacher, i).weights(), None if stats is None else stats[i], **options
            )
    return _with(teacher, mixers, {i: _layer(slugs[i], mixer) for i, mixer in mixers.items()}, share)


def rebuild(teacher: Stack, layers: Mapping[int, Mapping[str, Any]], *, share: bool = False) -> Stack:
    """The student of a run to resume: its mixers by their configs, with weights that the checkpoint will replace.

    Args:
        teacher: as in the run.
        layers: what `ModelConfig` says of each converted layer.
        share: as in `transplant`.
    """
    mixers = {
        i: build_mixer(dict(layer), teacher.config.d_model).to(teacher.device, teacher.dtype)
        for i, layer in layers.items()
    }
    return _with(teacher, mixers, layers, share)


def _layer(slug: str, mixer: Mixer) -> dict[str, Any]:
    values = config_to_dict(mixer.config)
    return {"mixer": slug} | {k: v for k, v in values.items() if k != "d_model"}


def _with(teacher: Stack, mixers: Mapping[int, Mixer], layers: Mapping[int, Mapping[str, Any]], share: bool) -> Stack:
    # Tensors named in the memo are taken as they are; what will be replaced need not be copied either.
    spared = [teacher] if share else [teacher.blocks[i].mixer for i in mixers]
    student = copy.deepcopy(teacher, {id(p): p for module in spared for p in module.parameters()})
    for i, mixer in mixers.items():
        student.blocks[i].mixer = mixer
    described = tuple(layers.get(i, layer) for i, layer in enumerate(teacher.config.layers))
    student.config = dataclasses.replace(teacher.config, layers=described)
    return student
