"""The generators of tasks, against evaluators of their own."""

from __future__ import annotations

import gzip
import statistics
import sys

import numpy as np
import pytest
import torch

from subquad.core.errors import ConfigError, DataError
from subquad.evals.learning import load_task, tasks
from subquad.evals.learning.digits import read_idx
from subquad.evals.learning.listops import CLOSE
from subquad.evals.learning.task import IGNORE

# Every task at a size that takes no time.
SMALL = {
    "characters": ["length=32"],
    "digits": [],
    "induction": [],
    "listops": ["short"],
    "mqar": [],
    "passkey": [],
    "pathfinder": ["32"],
    "recall": [],
    "selective_copy": ["short"],
}


def idx(array, path):
    axes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = b"\0\0\x08" + bytes([array.ndim]) + axes + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder of MNIST's form: 30 and 12 images of 4 x 3 pixels, of which the first is the label."""
    folder = tmp_path_factory.mktemp("mnist")
    for name, n, ending in (("train", 30, ""), ("t10k", 12, ".gz")):
        labels = np.arange(n) % 10
        images = np.random.default_rng(n).integers(0, 256, (n, 4, 3))
        images[:, 0, 0] = labels
        idx(images, folder / f"{name}-images-idx3-ubyte{ending}")
        idx(labels, folder / f"{name}-labels-idx1-ubyte{ending}")
    return folder


def small(name, mnist):
    return load_task(name, [f"path={mnist}"] if name == "digits" else SMALL[name])


def test_every_task_is_tried_here():
    assert set(SMALL) == set(tasks())


@pytest.mark.parametrize("name", SMALL)
def test_batches_follow_from_seed_and_step(name, mnist):
    task, again = small(name, mnist), small(name, mnist)
    first = task.batch("train", 3, 5, 8)
    same = again.batch("train", 3, 5, 8)
    assert torch.equal(first.inputs, same.inputs) and torch.equal(first.targets, same.targets)
    rows = {row.numpy().tobytes() for row in first.inputs}
    for seed, step in ((3, 6), (4, 5)):
        other = task.batch("train", seed, step, 8)
        assert first.inputs.shape != other.inputs.shape or not torch.equal(first.inputs, other.inputs)
    # Nothing of the test was trained on.
    test = task.batch("test", 3, 0, 8 if task.held_out is None else min(8, task.held_out))
    seen = set(rows)
    for step in range(2 if name == "pathfinder" else 20):
        seen |= {row.numpy().tobytes() for row in task.batch("train", 3, step, 8).inputs}
    held_out = {row.numpy().tobytes() for row in test.inputs}
    assert len(held_out) == len(test) and not held_out & seen


@pytest.mark.parametrize("name", SMALL)
def test_batches_fit_what_the_task_says(name, mnist):
    task = small(name, mnist)
    batch = task.batch("train", 0, 0, 6)
    assert len(batch) == 6 and batch.lengths_b.max() <= task.length
    if task.vocab_size is None:
        assert batch.inputs.shape == (6, task.length, task.channels) and batch.inputs.abs().max() <= 1
    else:
        assert batch.inputs.min() >= 0 and batch.inputs.max() < task.vocab_size
    assert batch.targets.shape == ((6,) if task.pooled else batch.inputs.shape)
    asked = batch.targets[batch.targets != IGNORE]
    assert len(asked) and asked.min() >= 0 and asked.max() < task.outputs


@pytest.mark.parametrize(("size", "keys"), [("h3", 4), ("h3_40", 9)])
def test_recall_asks_for_what_was_shown(size, keys):
    batch = load_task("recall", [size]).batch("test", 0, 0, 64)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        shown = dict(zip(row[:-2:2], row[1:-2:2], strict=True))
        assert all(key < keys <= value < 2 * keys for key, value in shown.items())
        # A key has one value throughout.
        assert all(shown[k] == v for k, v in zip(row[:-2:2], row[1:-2:2], strict=True))
        assert row[-2] == 2 * keys and targets[-1] == shown[row[-1]]
        assert targets[:-1] == [IGNORE] * (len(row) - 1)


def test_recall_teaches_every_value_that_was_shown_before():
    batch = load_task("recall").batch("train", 0, 0, 64)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        known = {}
        for i in range(0, len(row) - 2, 2):
            assert targets[i] == known.get(row[i], IGNORE) and targets[i + 1] == IGNORE
            known[row[i]] = row[i + 1]
        assert targets[-1] == known[row[-1]]


def test_a_passkey_stands_in_the_text_and_is_the_answer():
    batch = load_task("passkey").batch("train", 0, 0, 32)
    depths = []
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        text, key = bytes(row).decode(), bytes(targets[-5:]).decode()
        # Taught is what was said before, at the second place and at the last.
        second = text.index(key, text.index(key) + 1) - 1
        assert {i for i, x in enumerate(targets) if x != IGNORE} == {*range(second, second + 5), *range(1019, 1024)}
        assert bytes(targets[second : second + 5]).decode() == key
        assert text.endswith(f"What is the passkey?\nThe passkey is {key[:-1]}")
        assert text.count(f"The passkey is {key}.") == text.count(f"{key} is the passkey.") == 1
        depths.append(text.index(key) / len(row))
    assert min(depths) < 0.25 and max(depths) > 0.7
    tested = load_task("passkey").batch("test", 0, 0, 4).targets
    assert bool(((tested != IGNORE).sum(1) == 5).all()) and bool((tested[:, -5:] != IGNORE).all())


@pytest.mark.parametrize("size", ["h3", "mamba"])
def test_induction_asks_for_what_stood_behind_the_mark(size):
    task = load_task("induction", [size])
    batch = task.batch("train", 0, 0, 64)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        mark = task.vocab_size - 1
        assert row.count(mark) == 2 and row[-1] == mark
        assert targets == [IGNORE] * (len(row) - 1) + [row[row.index(mark) + 1]]


def test_every_key_of_mqar_is_asked_for_once():
    task = load_task("mqar", ["zoology_128"])
    batch = task.batch("train", 0, 0, 32)
    gaps = []
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == 8
        asked = {row[i]: (i, target) for i, target in enumerate(targets) if target != IGNORE}
        assert {key: target for key, (_, target) in asked.items()} == pairs
        places = {i for i, _ in asked.values()}
        assert all(i >= 16 and i % 2 == 0 for i in places)
        assert all(token == 0 for i, token in enumerate(row) if i >= 16 and i not in places)
        gaps += [(i - 16) // 2 for i in places]
    # Among 56 places a uniform draw has its median at 28; the power law asks soon.
    assert statistics.median(gaps) < 12


def test_selective_copy_asks_for_the_tokens_in_their_order():
    batch = load_task("selective_copy").batch("train", 0, 0, 8)
    assert batch.inputs.shape == (8, 4096 + 16)
    for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        copied = [token for token in row[:4096] if token]
        assert len(copied) == 16 and 15 not in copied and row[4096:] == [15] * 16
        assert targets == [IGNORE] * 4096 + copied


def value_of(tokens):
    """An expression's value by a stack, and how deep it went."""
    stack, deepest, arguments = [[]], 1, []
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
            deepest = max(deepest, len(stack) - 1)
        else:
            operator, *values = stack.pop()
            arguments.append(len(values))
            results = (min, max, lambda x: int(statistics.median(x)), lambda x: sum(x) % 10)
            stack[-1].append(results[operator - 10](values))
    ((value,),) = stack
    return value, deepest, arguments


@pytest.mark.parametrize(
    ("size", "rows", "longer", "shorter", "depth", "most"),
    [("lra", 96, 500, 2000, 10, 10), ("short", 200, 10, 100, 5, 5)],
)
def test_listops_come_to_what_an_evaluator_says(size, rows, longer, shorter, depth, most):
    batch = load_task("listops", [size]).batch("train", 0, 0, rows)
    counts = []
    for row, n, target in zip(batch.inputs.tolist(), batch.lengths_b.tolist(), batch.targets.tolist(), strict=True):
        assert longer < n < shorter
        value, deepest, arguments = value_of(row[:n])
        assert value == target
        # Operators stand above the deepest level, which has digits only.
        assert deepest < depth and min(arguments) >= 2 and max(arguments) <= most
        counts += arguments
    assert set(counts) == set(range(2, most + 1))
    # As many arguments as any other, give or take five standard errors; long rows have more of what has many.
    if size == "lra":
        assert abs(counts.count(6) / len(counts) - 1 / 9) < 0.02
        assert batch.lengths_b.float().std() > 200


def test_a_lone_operator_is_evaluated_by_hand():
    from subquad.evals.learning.listops import Level, evaluated, written

    # [MED 1 [SM 9 8 ] 5 2 ] : 1, 7, 5, 2 have the median 3.5, which is rounded down.
    levels = [
        Level(np.array([12]), np.array([4])),
        Level(np.array([1, 13, 5, 2]), np.array([0, 2, 0, 0])),
        Level(np.array([9, 8]), np.array([0, 0])),
    ]
    assert written(levels).tolist() == [12, 1, 13, 9, 8, CLOSE, 5, 2, CLOSE]
    assert evaluated(levels) == 3


def traced(task, paths, b, start):
    """The end that a path from `start` comes to, from dash to dash by how they lie, not by which path they are of.

    A dash goes on from another where both point to one spot between them, a margin from either.
    """
    margin, dash = task.config.margin, task.config.dash
    way_s = paths.way_bs[b, paths.way_bs[b] >= 0]
    unit_s2 = task.ways_k2[way_s] / np.linalg.norm(task.ways_k2[way_s], axis=1, keepdims=True)
    tail_s2 = paths.pivot_bs2[b, paths.way_bs[b] >= 0] + margin * unit_s2
    head_s2 = tail_s2 + dash * unit_s2
    # Every dash both ways round.
    tail_d2, head_d2, unit_d2 = (
        np.concatenate(x) for x in ((tail_s2, head_s2), (head_s2, tail_s2), (unit_s2, -unit_s2))
    )
    n, left = len(way_s), np.ones(2 * len(way_s), bool)
    at = int(np.linalg.norm(tail_d2 - start, axis=1).argmin())
    while True:
        left[[at % n, at % n + n]] = False
        spot = head_d2[at] + margin * unit_d2[at]
        # No turn is sharper than the rules allow.
        may_d = left & (unit_d2 @ unit_d2[at] > np.cos(np.pi / 2 / task.config.turning))
        gap_d = np.where(may_d, np.linalg.norm(tail_d2 - margin * unit_d2 - spot, axis=1), np.inf)
        if gap_d.min() > 0.8:
            return None
        at = int(gap_d.argmin())
        at_end = np.linalg.norm(paths.end_b22[b] - head_d2[at], axis=1) < 0.75
        if at_end.any():
            return int(at_end.argmax())


def bright(picture, at, radius):
    grid = np.stack(np.meshgrid(*[np.arange(len(picture))] * 2, indexing="ij"), -1)
    return picture[np.linalg.norm(grid - at, axis=-1) <= radius - 0.5].min() > 0.99


@pytest.mark.parametrize(("size", "rows"), [("32", 32), ("128", 8)])
def test_the_dots_of_pathfinder_are_connected_as_the_label_says(size, rows):
    task = load_task("pathfinder", [size])
    paths = task.paths(np.random.default_rng(0), rows)
    ends = [[traced(task, paths, b, paths.start_b22[b, path]) for path in (0, 1)] for b in range(rows)]
    assert ends == [[0, 1]] * rows
    # The labels of a batch are those of the dots that its pictures have: the same numbers give the same paths.
    rng = np.random.default_rng(1)
    batch = task.draw(rng, rows)
    again = np.random.default_rng(1)
    paths = task.paths(again, rows)
    label_b, first_b = again.integers(0, 2, (2, rows))
    assert batch.targets.tolist() == label_b.tolist() and 0 < label_b.sum() < rows
    pictures = batch.inputs.reshape(rows, task.config.side, -1).numpy()
    for b in range(rows):
        start = paths.start_b22[b, first_b[b]]
        reached = traced(task, paths, b, start)
        dot, other = paths.end_b22[b, reached], paths.end_b22[b, 1 - reached]
        # A dot is as bright as can be for its radius around; the end of a mere dash is not.
        assert bright(pictures[b], start, task.config.dot)
        assert bright(pictures[b], dot if label_b[b] else other, task.config.dot)
        assert not bright(pictures[b], other if label_b[b] else dot, task.config.dot)


def test_digits_come_pixel_by_pixel_and_every_epoch_anew(mnist):
    task = load_task("digits", [f"path={mnist}"])
    assert (task.length, task.held_out) == (12, 12)
    first = torch.cat([task.batch("train", 0, step, 10).targets for step in range(3)])
    second = torch.cat([task.batch("train", 0, step, 10).targets for step in range(3, 6)])
    # Three of every digit in each epoch, in another order.
    assert first.bincount().tolist() == second.bincount().tolist() == [3] * 10 and first.tolist() != second.tolist()
    batch = task.batch("train", 0, 0, 10)
    pixel_b = (batch.inputs[:, 0, 0] + 1) / 2 * 255
    torch.testing.assert_close(pixel_b.round().long(), batch.targets)
    permuted = load_task("digits", [f"path={mnist}", "permuted=true"]).batch("train", 0, 0, 10)
    assert not torch.equal(permuted.inputs, batch.inputs)
    torch.testing.assert_close(permuted.inputs.sort(1).values, batch.inputs.sort(1).values)


def test_broken_files_of_digits_are_named(mnist, tmp_path):
    path = tmp_path / "images"
    idx(np.zeros((2, 3)), path)
    assert read_idx(path).shape == (2, 3)
    for content in (path.read_bytes()[:-1], b"\0\0\x0d\x01", b"", b"not an image"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="expected unsigned bytes in the IDX format"):
            read_idx(path)
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        idx(np.zeros((5, 2, 2)), tmp_path / name)
    for name in ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"):
        idx(np.zeros(4), tmp_path / name)
    with pytest.raises(DataError, match="expected images and a digit for each"):
        load_task("digits", [f"path={tmp_path}"])


def test_digits_without_files_say_what_would_bring_some(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "subquad\[digits\]"'):
        load_task("digits")


def test_characters_are_the_bytes_of_the_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:04d} äß\n" for i in range(300)))
    task = load_task("characters", [f"text={text}", "length=20"])
    whole = text.read_bytes()
    split = len(whole) - len(whole) // 10
    batch = task.batch("train", 0, 0, 16)
    for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        assert row[1:] == target[:-1] and bytes([*row, target[-1]]) in whole[:split]
    test = task.batch("test", 0, 0, task.held_out)
    read = b"".join(bytes(row) for row in test.inputs.tolist())
    assert whole[split:].startswith(read) and len(whole) - split - len(read) <= 20
    other = tmp_path / "other.txt"
    other.write_text("x" * 65)
    held = load_task("characters", [f"text={text}", "length=20", f"test={other}"])
    assert held.data["train"].tobytes() == whole and held.held_out == 3
    assert bytes(held.batch("test", 0, 0, 3).inputs[2].tolist()) == b"x" * 20
    other.write_text("x" * 20)
    with pytest.raises(DataError, match="20 bytes; give longer texts"):
        load_task("characters", [f"text={text}", "length=20", f"test={other}"])


def test_the_digits_of_scikit_learn_are_split():
    pytest.importorskip("sklearn")
    task = load_task("digits")
    assert task.length == 64 and task.held_out == 359 and len(task.data["train"][1]) == 1797 - 359
