"""The model that learns a task: a plain stack of any mixers, with an entrance and an exit that fit the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError, nearest
from subquad.core.registry import load, methods
from subquad.evals.learning.encoder import Encoder
from subquad.evals.learning.task import Batch, Task
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.ops.state_space import together

# Width of a head, where the model is wide enough for one.
HEAD = 32
# Fields of a mixer's config that follow from the model's width: how many heads there are, and how wide they are.
COUNTS = ("n_heads", "n_kv_heads")
WIDTHS = ("head_dim", "key_dim", "value_dim")
# What a model norms over: the channels of a token, or the tokens of a batch.
NORMS = ("rms", "batch")


def fitted(slug: str, d_model: int, length: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """A layer of a `ModelConfig` with `options`, and what else the mixer must be told from width and `length` of a row.

    Heads are `HEAD` wide and together as wide as the model. A mixer whose heads are plain attention's
    (``head_dim``) knows nothing of order by itself and gets rotary embeddings.

    Raises:
        ConfigError: no such mixer, or one that must be told what does not follow from them.
    """
    kind: Any = load("mixers", slug).Config
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "d_model"}
    heads = int(options.get("n_heads", max(1, d_model // HEAD)))
    width = int(options.get("head_dim", d_model // max(heads, 1)))
    follows = dict.fromkeys(COUNTS, heads) | dict.fromkeys(WIDTHS, width) | {"max_len": length, "shape": (length,)}
    layer: dict[str, Any] = {"mixer": slug}
    for name, field in fields.items():
        must = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in options:
            layer[name] = options[name]
        elif must and name in follows:
            layer[name] = follows[name]
        elif must:
            raise ConfigError(f"mixer {slug}: expected {name}, which no default fits; give --set {slug}.{name}=...")
        elif name == "rotary" and "head_dim" in fields:
            layer[name] = {"theta": 10000.0, "dim": width}
    unknown = [name for name in options if name not in fields]
    if unknown:
        raise ConfigError(f"mixer {slug}: unknown option {unknown[0]!r}{nearest(unknown[0], fields)}")
    values = {"d_model": d_model} | {k: v for k, v in layer.items() if k != "mixer"}
    config_from_dict(kind, values, where=f"mixer {slug}")
    return layer


def checked(slugs: Sequence[str], task: Task) -> list[str]:
    """The mixers named, each once, of which every one can serve `task`.

    Raises:
        ConfigError: an unknown mixer, or one that looks ahead where the task asks what comes next.
    """
    cards = methods("mixers")
    for slug in slugs:
        if slug not in cards:
            raise ConfigError(f"--mixer: unknown mixer {slug!r}{nearest(slug, cards)}")
        if not (cards[slug].causal or task.pooled):
            raise ConfigError(
                f"--mixer {slug}: expected a causal mixer, for the task asks what comes next, got one that looks "
                "ahead; take another mixer, or a task with one class a row"
            )
    return list(dict.fromkeys(slugs))


def layers_of(
    mixers: Sequence[str], n_layers: int, d_model: int, options: Mapping[str, Mapping[str, Any]], task: Task
) -> tuple[dict[str, Any], ...]:
    """The layers of a model, `mixers` in turns.

    Args:
        mixers: slugs; one for all layers, or several for a hybrid.
        n_layers: 0 is a model that looks at each token alone.
        d_model: width.
        options: by slug, fields of the mixers' configs.
        task: what is to be learned.

    Raises:
        ConfigError: more mixers than layers, one told to look ahead where the task asks what comes next, or as in
            `fitted`.
    """
    if len(mixers) > n_layers > 0:
        raise ConfigError(
            f"--layers: expected at least {len(mixers)} for {', '.join(mixers)}, got {n_layers}; add some"
        )
    for slug in mixers:
        if options.get(slug, {}).get("bidirectional") and not task.pooled:
            raise ConfigError(
                f"--set {slug}.bidirectional=true: expected false, for the task asks what comes next, got true; leave "
                "it out, or take a task with one class a row"
            )
    return tuple(fitted(slug, d_model, task.length, options.get(slug, {})) for slug in islice(cycle(mixers), n_layers))


def check_norm(norm: str, task: Task) -> None:
    """Refuse a norm that is none, or that looks ahead where the task asks what comes next.

    Raises:
        ConfigError: one of both.
    """
    if norm not in NORMS:
        raise ConfigError(f"--norm: unknown {norm!r}{nearest(norm, NORMS)}")
    if norm == "batch" and not task.pooled:
        raise ConfigError(
            "--norm batch: expected rms, for the task asks what comes next, got statistics over whole rows; leave it "
            "out, or take a task with one class a row"
        )


class Learner(nn.Module):
    """A `Stack` or `Encoder` whose tokens are the task's, or values, and whose head gives its tokens or classes.

    Args:
        task: whose inputs and outputs it has.
        layers: of the stack's config.
        d_model: width.
        d_mlp: of the SwiGLU; 0 is none, None is two times the model's.
        norm: ``rms`` is a `Stack`, ``batch`` an `Encoder`.

    Raises:
        ConfigError: as in `check_norm`, or layers that the kind of model does not take.
    """

    def __init__(
        self,
        task: Task,
        layers: Sequence[Mapping[str, Any]],
        d_model: int,
        d_mlp: int | None = None,
        norm: str = "rms",
    ) -> None:
        super().__init__()
        check_norm(norm, task)
        self.pooled = task.pooled
        d_mlp = 2 * d_model if d_mlp is None else d_mlp
        config = ModelConfig(task.outputs, d_model, d_mlp, tuple(layers), max_positions=task.length)
        self.stack = Encoder(config) if norm == "batch" else Stack(config)
        if task.vocab_size is None:
            self.stack.add_module("embed", nn.Linear(task.channels, d_model))
        elif task.vocab_size != task.outputs:
            embed = nn.Embedding(task.vocab_size, d_model)
            if norm == "rms":
                nn.init.normal_(embed.weight, std=0.02)
            self.stack.add_module("embed", embed)

    def forward(self, batch: Batch) -> Tensor:
        """Logits: ``[b, outputs]`` of the mean over each row's tokens, or ``[b, t, outputs]``."""
        layout = batch.layout
        with together(self.stack, batch.inputs.shape[1]):
            hidden_btd = self.stack.hidden(batch.inputs, layout)
        if self.pooled:
            hidden_btd = torch.where(layout.valid_bt[..., None], hidden_btd, 0).sum(1) / batch.lengths_b[:, None]
        return self.stack.head(hidden_btd)
