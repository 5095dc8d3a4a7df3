"""A step's launches recorded once and replayed: many small kernels then cost the device's time, and not the host's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from subquad.core.errors import UnsupportedError

# Runs before the recording, in which libraries set up what they may not set up while it runs.
WARM_UP = 1
# Of the gradients' norm: what sums in another order may differ by in half precision.
TOLERANCE = 0.02


class Recorded:
    """A CUDA graph of ``run(*inputs)`` and its backward, for inputs of one shape.

    After a call the parameters' gradients are those of the call alone: they are not added to.

    Args:
        run: takes tensors on the device, returns tensors there, calls ``backward`` itself, and asks the device nothing.
        inputs: an example, for the shapes, and for the check of the recording against a plain run.
        parameters: whose gradients it leaves.

    Raises:
        UnsupportedError: `run` can't be recorded, or the recording does not do the same; both can run plainly on.
    """

    def __init__(
        self, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._inputs, self._parameters = [x.clone() for x in inputs], list(parameters)
        self._clear()
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                run(*self._inputs)
                self._clear()
            plain = [x.detach().clone() for x in run(*self._inputs)]
            wanted = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        here.wait_stream(beside)
        self._clear()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=beside):
                self._outputs = [x.detach() for x in run(*self._inputs)]
        except RuntimeError as error:
            self._clear()
            raise UnsupportedError(f"expected a step that can be recorded, got {str(error).splitlines()[0]}") from error
        self._gradients = [p.grad for p in self._parameters]
        self._check(plain, wanted)
        self._clear()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What ``run(*inputs)`` returns, in memory of its own; gradients stand in the parameters.

        Args:
            inputs: of the example's shapes, on the device or in locked memory.
        """
        for held, x in zip(self._inputs, inputs, strict=True):
            held.copy_(x, non_blocking=True)
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        return tuple(x.clone() for x in self._outputs)

    def _clear(self) -> None:
        for p in self._parameters:
            p.grad = None

    def _check(self, plain: list[Tensor], wanted: list[Tensor | None]) -> None:
        """Replay the example and compare it with what a plain run said."""
        replayed = self(*self._inputs)
        pairs = [*zip(replayed, plain, strict=True)]
        for a, b in zip(self._gradients, wanted, strict=True):
            if (a is None) != (b is None):
                raise UnsupportedError("expected a recorded step to reach the parameters of a plain one, got others")
            if a is not None and b is not None:
                pairs.append((a, b))
        apart, size = (
            float(torch.stack([x.norm() for x in found]).norm())
            for found in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        if not apart <= TOLERANCE * size:
            raise UnsupportedError(
                f"expected a recorded step to do what a plain one does, got results {apart:.3g} apart, of {size:.3g}"
            )
