"""Attention to the last tokens and the sinks, alone or joined in one normaliser with a linear state for all before."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from subquad.core.errors import ConfigError
from subquad.core.layout import Layout
from subquad.ops import chunks, launch
from subquad.ops.backends import Backends
from subquad.ops.window import Far, WindowState
from subquad.ops.windowed.equation import equation

__all__ = ["Far", "attend", "equation"]

_backends = Backends(__name__)


def attend(
    q_bthk: Tensor,
    k_btgk: Tensor,
    v_btgv: Tensor,
    far: Far | None,
    past: WindowState | None,
    layout: Layout,
    *,
    window: int,
    sinks: int,
    scale: float,
) -> Tensor:
    """Outputs of `equation`, by chunks of tokens, in time linear in t; arguments and result are the same.

    The tensors' device chooses the implementation; see `subquad.ops.backends`. Triton's takes any window, any number of
    sinks, head dims and features up to 256 (128 in float32), a carried state and right padding; packed documents, whose
    sinks stand inside the block, run in PyTorch, and so does float16. Gradients flow into every floating argument.

    Raises:
        ConfigError: shapes do not fit each other.
    """
    more = () if far is None else (far.weight_bthf, far.f_btgf)
    _check(q_bthk, k_btgk, v_btgv, far, past, layout)
    documents = () if layout.documents_bt is None else (layout.documents_bt,)
    chosen = _backends.choose(q_bthk, k_btgk, v_btgv, *more, *documents)
    q_bthk, k_btgk, v_btgv, *more = chunks.blank(chunks.kept(layout), q_bthk, k_btgk, v_btgv, *more)
    if far is not None:
        far = replace(far, weight_bthf=more[0], f_btgf=more[1])
    return chosen.attend(q_bthk, k_btgk, v_btgv, far, past, layout, window=window, sinks=sinks, scale=scale)


def _check(
    q_bthk: Tensor, k_btgk: Tensor, v_btgv: Tensor, far: Far | None, past: WindowState | None, layout: Layout
) -> None:
    sizes = launch.axes(q_bthk=q_bthk, k_bthk=k_btgk, weight_bthf=None if far is None else far.weight_bthf)
    sizes |= launch.axes(k_btgk=k_btgk, v_btgv=v_btgv, f_btgf=None if far is None else far.f_btgf)
    launch.heads(q_bthk.shape[2], k_btgk=k_btgk)
    if far is not None and far.weight_bthf.shape != (*q_bthk.shape[:3], sizes["f"]):
        raise ConfigError(
            f"weight_bthf: expected shape {(*q_bthk.shape[:3], sizes['f'])}, a weight of each query for each feature, "
            f"got {tuple(far.weight_bthf.shape)}; reshape it"
        )
    if far is not None and far.bias_hf is not None and far.bias_hf.shape != far.weight_bthf.shape[2:]:
        raise ConfigError(
            f"bias_hf: expected shape {tuple(far.weight_bthf.shape[2:])}, got {tuple(far.bias_hf.shape)}; reshape it"
        )
    if layout.shape != q_bthk.shape[:2]:
        raise ConfigError(f"layout: expected shape {tuple(q_bthk.shape[:2])}, got {layout.shape}; build it for q")
    carried = past is not None
    if far is not None and carried != (far.window_f_bgnf is not None) | (far.state_bgfv is not None):
        raise ConfigError("expected the window's features and the linear state with a past and only then; give both")
    if past is not None and far is not None and far.window_f_bgnf is not None:
        given, size = far.window_f_bgnf.shape[2], past.window_k_bgwk.shape[2]
        if not min(q_bthk.shape[1], size) <= given <= size:
            raise ConfigError(
                f"window_f_bgnf: expected features of {min(q_bthk.shape[1], size)} to {size} tokens, got {given}; "
                "give those of the oldest tokens in the window"
            )
