"""Stage matrix: every new mixer learns the matrix by which its layer's attention mixes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.core.mixer import Mixer
from subquad.core.state import precise
from subquad.models.flops import forward, mixing, training_apart
from subquad.models.stack import Stack
from subquad.train.stages import StudentStage, Work
from subquad.train.stages.align import by_rows, listen, split_rows


def probes(x_btd: Tensor, heads: int, width: int, generator: torch.Generator) -> Tensor:
    """``[b, t, h, v]`` of independent signs: `width` probe vectors along time for each row, the same for all heads.

    ``E v v^T = 1``, so that ``E |A v|^2 = |A|_F^2`` for any matrix A; of all such entries, signs vary least.
    """
    b, t, _ = x_btd.shape
    bits_bt1v = torch.randint(2, (b, t, 1, width), generator=generator, device=generator.device)
    return (2 * bits_bt1v - 1).to(x_btd).expand(b, t, heads, width)


def heads_of(mixer: Mixer) -> int:
    """Heads that the mixer mixes by; one where it doesn't say."""
    config: Any = mixer.config
    return getattr(config, "n_heads", 1)


def squared_frobenius(mixed_bthv: Tensor) -> Tensor:
    """Unbiased estimate of ``|A|_F^2`` of every head, ``[h]``, summed over the rows, from ``A v`` for `probes` v.

    A need not be built: mixers mix the probes, in time and memory linear in t where theirs are. It may be a difference
    of two matrices, as long as both have mixed the same probes.
    """
    mixed_bthv = mixed_bthv.to(precise(mixed_bthv.dtype))
    return (mixed_bthv * mixed_bthv).sum((0, 1, 3)) / mixed_bthv.shape[-1]


class Matrix(StudentStage):
    """Minimise the mean over layers and heads of ``|M - M*|_F^2 / |M*|_F^2`` (after arXiv 2408.10189, equation 3).

    M is a mixer's matrix over tokens and M* the attention's, both from the teacher's own stream, and both known by what
    they do to random signs: ``E |M v - M* v|^2 = |M - M*|_F^2``. What stands behind the mixing (values, gate, norm,
    output projection) gets no gradient. Both norms are those of the whole batch, which goes through in parts of the
    machine's rows.
    """

    name = "matrix"
    layerwise = True

    @dataclass(frozen=True)
    class Config:
        """How well the distance is known.

        Attributes:
            probes: random vectors for each row; the estimate's variance falls with their number.
            seed: of the probes.
        """

        probes: int = 16
        seed: int = 0

        def __post_init__(self) -> None:
            """Refuse an estimate of nothing."""
            if self.probes < 1:
                raise ConfigError(f"matrix: expected probes >= 1, got {self.probes}; give some")

    def __init__(self, work: Work, config: Config | None = None) -> None:
        """Match the new mixers of `work` to the attention of its source.

        Raises:
            UnsupportedError: a mixer without a mixing matrix.
            ConfigError: a mixer with other heads than the attention's.
        """
        super().__init__(work)
        self.config = config or self.Config()
        self.source = work.source.eval()
        self.pairs = {i: (work.student.blocks[i].mixer, self.source.blocks[i].mixer) for i in work.layers}
        for i, (mixer, attention) in self.pairs.items():
            self._try(i, mixer, attention)
        self.clipped = self.by_layer()
        self._at = 0

    @classmethod
    def eligible(cls, student: Stack, layers: Sequence[int]) -> list[str]:
        """The new mixers' own."""
        mixers = tuple(f"blocks.{i}.mixer." for i in layers)
        return [name for name, _ in student.named_parameters() if name.startswith(mixers)]

    def _try(self, i: int, mixer: Mixer, attention: Mixer) -> None:
        """One token through both, so that what can't be compared is refused before the training."""
        heads = [heads_of(m) for m in (mixer, attention)]
        x_btd = torch.zeros(1, 1, self.work.student.config.d_model, device=self.device, dtype=self.work.student.dtype)
        with torch.no_grad():
            for m, h in zip((mixer, attention), heads, strict=True):
                m.mix_values(x_btd, x_btd.new_zeros(1, 1, h, 1))
        if heads[0] != heads[1]:
            raise ConfigError(
                f"matrix: layer {i}: expected {heads[1]} heads as the attention has, got {heads[0]}; leave n_heads out"
            )

    def step(self) -> dict[str, Tensor]:
        """One batch."""
        losses: list[Tensor] = []
        # By the step, so that a resumed run draws what it would have drawn.
        generator = torch.Generator(self.device).manual_seed((self.config.seed << 32) + self._at)
        tokens_bt = next(self.stream).to(self.device).tokens_bt
        (own,) = self.processes.parts(len(tokens_bt))

        def heard(i: int, x_btd: Tensor, _: Tensor, layout: Layout) -> None:
            # For all rows of the batch, so that a row's are the same whichever process has it.
            every_btd = x_btd[:1].expand(len(tokens_bt), -1, -1)
            v_bthv = probes(every_btd, heads_of(self.pairs[i][1]), self.config.probes, generator)[own]
            losses.append(self._learn(i, x_btd, v_bthv, layout))

        listen(self.source, tokens_bt[own], self.work.layers, heard, rows=self.machine.rows)
        self._at += 1
        layers = torch.stack(losses)
        return {"loss": layers.mean(), "layers": layers}

    def _learn(self, i: int, x_btd: Tensor, v_bthv: Tensor, layout: Layout) -> Tensor:
        """Add the gradients of a layer; this process's share of its loss over the whole batch."""
        mixer, attention = self.pairs[i]
        rows = self.machine.rows
        target_bthv = by_rows(attention.mix_values, layout, rows, x_btd, v_bthv)
        norm_h = self.processes.sum(squared_frobenius(target_bthv))
        total = torch.zeros((), device=norm_h.device, dtype=norm_h.dtype)
        for at, (x, v, target) in split_rows(layout, rows, x_btd, v_bthv, target_bthv):
            with torch.enable_grad():
                mixed_bthv = mixer.mix_values(x, v, at)
                wide = precise(mixed_bthv.dtype)
                loss = (squared_frobenius(mixed_bthv.to(wide) - target.to(wide)) / norm_h).mean()
                if loss.requires_grad:  # the patterns may leave a layer as it is
                    loss.backward()  # pyright: ignore[reportUnknownMemberType]
            total = total + loss.detach()
        return total

    def flops_per_token(self) -> float:
        """The teacher's forward up to the last layer, its mixing of the probes, and each mixer's forward and backward.

        Probes are counted as if they were values of the mixers' own width.
        """
        seq, trained = self.stream.time, [*self.new, *self.old]
        heard = forward(self.source, seq, layers=max(self.pairs) + 1, head=False)
        return heard + sum(training_apart(m, seq, trained) + mixing(a, seq) for m, a in self.pairs.values())

    def state_dict(self) -> dict[str, Any]:
        """The stream's position and the number of steps, which the probes are drawn by."""
        return super().state_dict() | {"at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set both."""
        super().load_state_dict(state)
        self._at = state["at"]


STAGE = Matrix
