"""One token's sum over a history in Triton: a stream of inputs beside a stream of taps."""

import triton
import triton.language as tl


@triton.jit
def past_kernel(
    history_ptr, seen_ptr, taps_ptr, part_ptr, D, G, L, stride_b, stride_s,
    OWN: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A share of the tokens of a row, a tile of channels. Grid: tiles of channels, rows, shares."""
    row, share = tl.program_id(1), tl.program_id(2)
    d, s = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BS)
    seen = tl.load(seen_ptr + row)
    each = tl.cdiv(tl.cdiv(seen, SPLITS), BS) * BS
    start, stop = share * each, tl.minimum((share + 1) * each, seen)
    history_ptr += row.to(tl.int64) * stride_b
    # Channels with a filter of their own lie side by side, and are loaded so.
    group = d
    if not OWN:
        group = d // (D // G)
    total = tl.zeros((BS, BD), tl.float32)
    for first in range(start, stop, BS):
        at = first + s
        lag = seen - at
        here = (at < stop)[:, None] & (d < D)[None, :]
        x = tl.load(history_ptr + at[:, None] * stride_s + d[None, :], mask=here, other=0.0)
        # A row that has ended may stand behind the last tap.
        heard = here & (lag < L)[:, None]
        k = tl.load(taps_ptr + lag[:, None] * G + group[None, :], mask=heard, other=0.0)
        total += x.to(tl.float32) * k.to(tl.float32)
    place = (share * tl.num_programs(1) + row).to(tl.int64) * D + d
    tl.store(part_ptr + place, tl.sum(total, 0), mask=d < D)
