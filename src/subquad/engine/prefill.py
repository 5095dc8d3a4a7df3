"""Reading prompts into a state, without continuing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.models.stack import Stack, StackState


@torch.no_grad()
def prefill(model: Stack, prompts: Sequence[Sequence[int]], pool: StackState, chunk: int) -> Tensor:
    """Read the prompts into the empty `pool` in chunks of columns; return the stream ``[b, d]`` at each last token.

    A chunk is read by the rows that still have tokens in it, so that one long prompt costs the others nothing.
    """
    device = model.device
    last_bd: Tensor | None = None
    for start in range(0, max(map(len, prompts)), chunk):
        blocks = {row: list(p[start : start + chunk]) for row, p in enumerate(prompts) if len(p) > start}
        lengths, width = [len(block) for block in blocks.values()], max(map(len, blocks.values()))
        tokens_bt = torch.tensor([block + [0] * (width - len(block)) for block in blocks.values()], device=device)
        lengths_b = torch.tensor(lengths, device=device)
        everyone = len(blocks) == len(prompts)
        rows_b = torch.tensor(list(blocks), device=device)
        state = pool if everyone else pool.select(rows_b)
        if start == 0:  # nothing to look at costs less than an empty buffer
            state = model.init_state(len(prompts))
        hidden_btd, update = model.read(tokens_bt, state, lengths_b if min(lengths) < width else None)
        update.commit_(pool, None if everyone else rows_b, lengths_b)
        # A row's last chunk is its last write here.
        ends_bd = hidden_btd[torch.arange(len(blocks), device=device), lengths_b - 1]
        last_bd = ends_bd if last_bd is None else last_bd.index_copy(0, rows_b, ends_bd)
    assert last_bd is not None
    return last_bd
