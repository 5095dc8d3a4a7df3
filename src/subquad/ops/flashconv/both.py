"""Both directions of time from one: a second filter runs over rows turned round."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Forwards(Protocol):
    """A convolution in the direction of time."""

    def __call__(self, u: Tensor, k_gl: Tensor, bias_d: Tensor | None = None, **others: Tensor | None) -> Tensor:
        """As `subquad.ops.flashconv.parallel`, without filters backwards in time."""
        ...


def both_ways(
    forwards: Forwards,
    u: Tensor,
    k_gl: Tensor,
    bias_d: Tensor | None,
    behind_gl: Tensor | None,
    **others: Tensor | None,
) -> Tensor:
    """`forwards` with `k_gl`, plus over the row turned round with `behind_gl` where that is given.

    Args:
        forwards: the convolution.
        u, k_gl, bias_d, behind_gl: see `subquad.ops.flashconv.parallel`.
        others: its gates and documents, by name.
    """
    y = forwards(u, k_gl, bias_d, **others)
    if behind_gl is None:
        return y
    turned = {name: None if x is None else x.flip(1) for name, x in others.items()}
    documents_bt = turned.get("documents_bt")
    if documents_bt is not None:
        turned["documents_bt"] = documents_bt[:, :1] - documents_bt
    return y + forwards(u.flip(1), behind_gl, **turned).flip(1)
