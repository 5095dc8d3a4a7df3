"""Sequential digits: an image of a written digit, one pixel a step; which digit is it?

The images are MNIST's, in the four files that they have always come in, packed or not; or else the 1,797 digits of
8 x 8 pixels that scikit-learn brings along, every fifth of them held out.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from subquad.core.errors import ConfigError, DataError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import Batch, Task, shuffled

CARD = TaskCard(
    title="sequential digits: a written digit, pixel by pixel",
    entry="Digits",
    source="1504.00941",
    scored="the row's digit",
    chance="1 in 10",
    sizes={"sklearn": {"path": ""}, "permuted": {"path": "", "permuted": True}},
)
FILES = {"train": "train", "test": "t10k"}
# Of the order that permuted pixels come in, which is the same in every run.
ORDER_SEED = 0
Images = NDArray[Any]


class Digits(Task):
    """Pixel-by-pixel digits (arXiv 1504.00941, section 4.2), also in a fixed random order of the pixels.

    Values are from -1, black, to 1. Training draws images in the order of a new shuffle every epoch.
    """

    @dataclass(frozen=True)
    class Config:
        """Where they are.

        Attributes:
            path: folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
                ``t10k-labels-idx1-ubyte``, also with .gz behind; "" takes scikit-learn's digits.
            permuted: pixels in a random order, the same for all images.
        """

        path: str = ""
        permuted: bool = False

    vocab_size = None
    outputs = 10
    pooled = True

    def __init__(self, config: Config) -> None:
        """Read the images.

        Raises:
            DataError: a file that is missing or broken.
            ConfigError: no path, and no scikit-learn.
        """
        self.config = config
        self.data = {s: read_mnist(Path(config.path), s) if config.path else bundled(s) for s in FILES}
        images_nt = self.data["train"][0]
        self.length, self.held_out = images_nt.shape[1], len(self.data["test"][0])
        order_t = np.random.default_rng(ORDER_SEED).permutation(self.length)
        self.order_t = order_t if config.permuted else np.arange(self.length)

    def batch(self, split: str, seed: int, step: int, rows: int) -> Batch:
        """Rows of a shuffle in training, of the files' own order in the test."""
        images_nt, labels_n = self.data[split]
        if split == "test":
            return self._take(images_nt, labels_n, np.arange(step * rows, min((step + 1) * rows, len(labels_n))))
        return self._take(images_nt, labels_n, shuffled(seed, step, rows, len(labels_n)))

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Any images of the training, for who wants some."""
        images_nt, labels_n = self.data["train"]
        return self._take(images_nt, labels_n, rng.integers(0, len(labels_n), rows))

    def _take(self, images_nt: Images, labels_n: Images, picked_b: Images) -> Batch:
        values_bt = images_nt[picked_b][:, self.order_t].astype(np.float32) * 2 - 1
        labels_b = torch.from_numpy(labels_n[picked_b].astype(np.int64))
        return Batch(torch.from_numpy(values_bt)[..., None], labels_b, torch.full((len(picked_b),), self.length))


def bundled(split: str) -> tuple[Images, Images]:
    """scikit-learn's digits from 0 to 1, ``[n, 64]``, and their labels.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # pyright: ignore
    except ImportError as error:
        raise ConfigError(
            "digits: expected a folder of MNIST's files or the package scikit-learn, got neither; give --size "
            'path=FOLDER, or pip install "subquad[digits]"'
        ) from error
    found: Any = load_digits()
    is_test_n = np.arange(len(found.target)) % 5 == 4
    keep_n = is_test_n if split == "test" else ~is_test_n
    return found.data[keep_n] / 16, found.target[keep_n]


def read_mnist(folder: Path, split: str) -> tuple[Images, Images]:
    """Images from 0 to 1, ``[n, pixels]``, and labels of one split.

    Raises:
        DataError: files that are missing, broken, or don't belong together.
    """
    images = read_idx(folder / f"{FILES[split]}-images-idx3-ubyte")
    labels = read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels) or labels.max() > 9:
        raise DataError(
            f"{folder}: expected images and a digit for each, got {images.shape} and {labels.shape}; fetch them again"
        )
    return images.reshape(len(images), -1) / np.float32(255), labels


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of bytes in a file of the IDX format, also with .gz behind its name.

    Raises:
        DataError: no such file, or not of this format.
    """
    packed = path.with_name(f"{path.name}.gz")
    source = path if path.exists() else packed
    try:
        data = gzip.decompress(source.read_bytes()) if source == packed else source.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: expected this file or the same with .gz, got {error}; put it there") from error
    # Two zeros, 8 for unsigned bytes, the number of axes, and each of them as four bytes, the highest first.
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    start = 4 + 4 * axes
    if not axes or len(data) - start != int(np.prod(shape)):
        raise DataError(
            f"{source}: expected unsigned bytes in the IDX format, got {len(data):,} bytes of another kind or a part "
            "of them; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
