"""What is worked out of linear state spaces beforehand, so that a step asks little of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """What a step asks of g systems with n complex modes, all real.

    The output is a sum over the state before the token: what the step does to the state is worked into its weights, so
    that reading asks for a fraction of what stepping does.

    Attributes:
        reads_gnp: what the output takes of the real and the imaginary parts of the state before the token.
        direct_g: what it takes of the token itself.
        moves_kgnp: keep and input, and low and sees of a rank-one part; real and imaginary part along p.
    """

    reads_gnp: Tensor
    direct_g: Tensor
    moves_kgnp: Tensor

    def to(self, dtype: torch.dtype) -> Table:
        """In another dtype."""
        return Table(*(x.to(dtype) for x in self))


def table(
    keep_gn: Tensor, input_gn: Tensor, output_gn: Tensor, low_gn: Tensor | None = None, sees_gn: Tensor | None = None
) -> Table:
    """What a step needs of systems; all arguments are complex ``[g, n]``.

    ``x <- keep x + input u - low Re(sum sees x)``, then ``y = Re sum output x``; without `low` and `sees` the system is
    diagonal. It asks for a handful of launches, so whoever decodes keeps it as long as the weights stay.
    """
    moves, reads_gn = [keep_gn, input_gn], output_gn * keep_gn
    if low_gn is not None and sees_gn is not None:
        moves += [low_gn, sees_gn]
        reads_gn = reads_gn - sees_gn * (output_gn * low_gn).sum(-1, keepdim=True).real
    # Re(c x) = Re c Re x - Im c Im x.
    reads_gnp = torch.view_as_real(reads_gn.conj().resolve_conj())
    moves_kgnp = torch.view_as_real(torch.stack(torch.broadcast_tensors(*moves)))
    return Table(reads_gnp, (output_gn * input_gn).sum(-1).real.contiguous(), moves_kgnp)
