"""What a kernel does so that it may begin before the launch before it has ended."""

import triton
import triton.language as tl


@triton.jit
def prefetch(ptrs, OVERLAP: tl.constexpr):
    """Begin to bring the lines that hold `ptrs` into the L2 cache; what no launch before has written only."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [ptrs.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Let the next launch begin now, and wait until the one before has written everything.

    What no launch before has written, such as a weight, may be read before this.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
