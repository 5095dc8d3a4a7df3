"""Shape of a draft head, and the layers of a model that it sees by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subquad.core.errors import ConfigError
from subquad.models.config import ModelConfig

HEAD_DIM = 64


@dataclass(frozen=True)
class HeadConfig:
    """Shape of a head.

    Attributes:
        vocab_size, d_model: of the model that it guesses for.
        d_mlp: hidden width of its SwiGLU.
        n_heads: of its attention, each of ``d_model / n_heads`` channels.
        window: pairs that its attention sees.
        kept: how many tokens it may guess; 0 is all.
        norm_eps: epsilon of its norms.
        target: name of the model that it was trained for.
        guesses: how many tokens one read guesses; with more than 1 it is a `BlockHead`.
        aux_layers: of the model, ascending, from 0; the head sees the streams behind these too.
    """

    vocab_size: int
    d_model: int
    d_mlp: int
    n_heads: int
    window: int
    kept: int = 0
    norm_eps: float = 1e-5
    target: str = ""
    guesses: int = 1
    aux_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no head."""
        object.__setattr__(self, "aux_layers", tuple(self.aux_layers))
        if min(self.window, self.guesses, self.d_mlp) < 1 or not 0 <= self.kept <= self.vocab_size:
            raise ConfigError(
                f"draft head: expected window, guesses and d_mlp >= 1 and kept in 0..{self.vocab_size}, got "
                f"{self.window}, {self.guesses}, {self.d_mlp} and {self.kept}; change them"
            )
        if self.n_heads < 1 or self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"draft head: expected n_heads that cut d_model={self.d_model} into even parts, got {self.n_heads}; "
                "change it"
            )
        if self.aux_layers != tuple(sorted(set(self.aux_layers))) or min(self.aux_layers, default=0) < 0:
            raise ConfigError(f"draft head: expected aux_layers that ascend from 0, got {self.aux_layers}; change them")

    @staticmethod
    def like(
        model: ModelConfig,
        window: int,
        *,
        kept: int = 0,
        target: str = "",
        guesses: int = 1,
        aux_layers: Sequence[int] = (),
    ) -> HeadConfig:
        """A head as wide as `model`, whatever its mixers are; where that has no MLPs, with one of 4 times the width."""
        most = max(1, model.d_model // HEAD_DIM)
        n_heads = next(n for n in range(most, 0, -1) if n == 1 or model.d_model % (2 * n) == 0)
        sizes = (model.vocab_size, model.d_model, model.d_mlp or 4 * model.d_model, n_heads, window)
        config = HeadConfig(*sizes, kept, model.norm_eps, target, guesses, tuple(aux_layers))
        config.check(model)
        return config

    def check(self, model: ModelConfig) -> None:
        """Refuse a model of other sizes.

        Raises:
            ConfigError: another vocabulary or width, or too few layers.
        """
        for name in ("vocab_size", "d_model"):
            mine, theirs = getattr(self, name), getattr(model, name)
            if mine != theirs:
                raise ConfigError(
                    f"draft head: expected a model of {name} {mine} as {self.target or 'the one it was made for'} has, "
                    f"got {theirs}; train a head for this model: subquad draft MODEL --head"
                )
        if (last := max(self.aux_layers, default=0)) >= len(model.layers):
            raise ConfigError(
                f"draft head: expected aux_layers from 0 to {len(model.layers) - 1}, got {last}; "
                "name layers of this model"
            )


def usual_aux_layers(model: ModelConfig) -> tuple[int, ...]:
    """The layers that end the first and the second third of a model; none where it has fewer than three."""
    count = len(model.layers)
    return (count // 3 - 1, 2 * count // 3 - 1) if count >= 3 else ()
