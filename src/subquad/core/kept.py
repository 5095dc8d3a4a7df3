"""What follows from weights alone, kept while they stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """A value made of weights, made anew when one of them has changed, and every time while they are learned.

    A change is seen by where a weight lies, its version, which every operation in place raises, and its dtype. A CUDA
    graph reads the value that was kept when it was captured.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, T] | None = None

    def __call__(
        self, weights: Iterable[Tensor], make: Callable[[], T], enough: Callable[[T], bool] = lambda _: True
    ) -> T | None:
        """The value; None where it can't be kept, and is to be made as part of what differentiates or compiles it.

        Args:
            weights: all that it is made of.
            make: makes it, without gradients.
            enough: whether one that was made earlier serves.
        """
        weights = list(weights)
        learning = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if learning or torch.compiler.is_compiling() or any(w.is_inference() for w in weights):
            return None
        key = [(w.data_ptr(), w._version, w.dtype) for w in weights]
        if self._held is None or self._held[0] != key or not enough(self._held[1]):
            # For training, too, that takes it as it is.
            with torch.inference_mode(False), torch.no_grad():
                self._held = key, make()
        return self._held[1]
