"""Pathfinder: do two dots lie on the same dashed path? An image of paths that wind past each other, read row by row.

Two paths of equal length start near each other and grow in turn, dash by dash; shorter ones are strewn around them. One
dot marks the start of one path, the other the end of the same path or of the other one. The rules are those of Linsley
and others (arXiv 1805.08315) with the settings of the Long Range Arena: a dash starts a gap behind the last one, on a
circle, straight on more likely than not: with weight ``cos(min(c turn, pi/2))^2``. No dash comes so near to another
path, or to its own but for the dash behind it, that their margins touch.

All images of a batch grow side by side, so that one NumPy call serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from subquad.core.errors import ConfigError
from subquad.evals.learning import TaskCard
from subquad.evals.learning.task import Batch, Task

CARD = TaskCard(
    title="Pathfinder: whether two dots lie on one dashed path",
    entry="Pathfinder",
    source="2011.04006",
    scored="the row's class: on one path or not",
    chance="1 in 2",
    sizes={
        "32": {
            "side": 32,
            "dash": 2,
            "margin": 1,
            "thickness": 0.5,
            "apart": 7,
            "dot": 1.5,
            "turning": 1.0,
            "distractors": 5,
        },
        "128": {
            "side": 128,
            "dash": 5,
            "margin": 3,
            "thickness": 1.5,
            "apart": 20,
            "dot": 3.0,
            "turning": 1.8,
            "distractors": 7,
        },
    },
)
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.uint8]
# A path in a dead end goes so many dashes back, both paths' counted; after so many dead ends the image is begun anew.
BACK, DEAD_ENDS = 6, 24
# Places that are tried at once for the start of a short path, and how often one is begun again.
PLACES, RETRIALS = 64, 4
# Directions whose weights sum to less are a dead end.
LEAST = 1e-4


@dataclass(frozen=True)
class Paths:
    """The dashes of some images.

    Attributes:
        pivot_bs2: row and column of the point a margin in front of each dash.
        way_bs: index of its direction (`Pathfinder.ways_k2`), or -1 where there is no such dash.
        start_b22: where each of the two long paths begins, and
        end_b22: where it ends.
    """

    pivot_bs2: Ints
    way_bs: Ints
    start_b22: Ints
    end_b22: Ints

    def rows(self, keep: Any) -> Paths:
        """Some of the images."""
        return Paths(self.pivot_bs2[keep], self.way_bs[keep], self.start_b22[keep], self.end_b22[keep])


class Pathfinder(Task):
    """Pathfinder of the Long Range Arena (arXiv 2011.04006, section 2.2.5), its hard form: 14 dashes a path.

    Values are from -1, black, to 1; there is one channel. What differs from the original programme: directions are
    those of the grid points on the circle, a dash is drawn by its distance to each pixel instead of by a drawing
    library, and a place for the next dash is drawn among those that are free instead of up to three times among all.
    """

    @dataclass(frozen=True)
    class Config:
        """Rules; lengths in pixels.

        Attributes:
            side: of the image.
            dash, margin, thickness: length of a dash, distance kept around it, width of its line.
            apart: between the starts of the two paths, which stay twice as far from the edges.
            dot: radius of a dot.
            turning: c above; the larger, the straighter the paths.
            distractors: short paths.
            dashes: of each of the two paths; a short one has a third.
        """

        side: int
        dash: int
        margin: int
        thickness: float
        apart: int
        dot: float
        turning: float
        distractors: int
        dashes: int = 14

        def __post_init__(self) -> None:
            """Refuse what no image could hold."""
            if min(self.dash, self.margin, self.apart, self.dashes // 3) < 1 or self.distractors < 0:
                raise ConfigError(f"pathfinder: expected lengths from 1 and dashes from 3, got {self}; give more")
            if not self.thickness > 0 or not self.dot > 0 or not self.turning > 0:
                raise ConfigError(f"pathfinder: expected thickness, dot and turning above 0, got {self}; raise them")
            if self.side <= 4 * self.apart:
                raise ConfigError(
                    f"pathfinder: expected a side above 4 apart, got {self.side} and {self.apart}; starts must fit"
                )

    vocab_size = None
    outputs = 2
    pooled = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.length = config.side**2
        self.short = config.dashes // 3

    def draw(self, rng: np.random.Generator, rows: int) -> Batch:
        """Images and labels, half of them on one path."""
        paths = self.paths(rng, rows)
        label_b, first_b = rng.integers(0, 2, (2, rows))
        image_bt = self.picture(paths, first_b, np.where(label_b == 1, first_b, 1 - first_b)).reshape(rows, -1)
        values_btc = torch.from_numpy(image_bt.astype(np.float32) * 2 - 1)[..., None]
        return Batch(values_btc, torch.from_numpy(label_b), torch.full((rows,), self.length))

    def paths(self, rng: np.random.Generator, rows: int) -> Paths:
        """So many images' dashes; those that ran into a dead end are thrown away."""
        found: list[Paths] = []
        while (missing := rows - sum(len(p.way_bs) for p in found)) > 0:
            found.append(self._grown(rng, 3 * missing + 8))  # about a third come to their end
        whole = Paths(*(np.concatenate([getattr(p, name) for p in found]) for name in Paths.__annotations__))
        return whole.rows(slice(rows))

    @cached_property
    def ways_k2(self) -> Ints:
        """Where a dash may end, seen from its pivot: the grid points on the circle, by angle."""
        r = self.config.dash + self.config.margin
        turn = np.arange(0, 2 * np.pi, 1 / r)
        return np.unique(np.rint(r * np.stack([np.sin(turn), np.cos(turn)], -1)).astype(np.int64), axis=0)

    @cached_property
    def _unit_k2(self) -> Floats:
        return self.ways_k2 / np.linalg.norm(self.ways_k2, axis=1, keepdims=True)

    @cached_property
    def _next_k2(self) -> Ints:
        """From a dash's pivot to the next one's, a margin behind its end."""
        return np.rint((self.config.dash + 2 * self.config.margin) * self._unit_k2).astype(np.int64)

    @cached_property
    def _weight_kk(self) -> Floats:
        turn_kk = np.arccos(np.clip(self._unit_k2 @ self._unit_k2.T, -1, 1))
        return np.cos(np.minimum(self.config.turning * turn_kk, np.pi / 2)) ** 2

    @cached_property
    def _reach(self) -> int:
        """How far from its pivot a dash with its margin can matter."""
        return int(np.ceil(self.config.dash + 2 * self.config.margin + self.config.thickness)) + 1

    @cached_property
    def _distance_kyx(self) -> Floats:
        """Of every pixel around a pivot to the dash of each direction."""
        n, margin, dash = self._reach, self.config.margin, self.config.dash
        grid_yx2 = np.stack(np.meshgrid(*[np.arange(-n, n + 1)] * 2, indexing="ij"), -1)
        along_kyx = np.clip(np.einsum("yxi,ki->kyx", grid_yx2, self._unit_k2), margin, margin + dash)
        nearest = along_kyx[..., None] * self._unit_k2[:, None, None]
        return np.linalg.norm(grid_yx2 - nearest, axis=-1)

    @cached_property
    def _wide(self) -> int:
        """Width of the padded field, so that no dash reaches beyond it."""
        return self.config.side + 2 * self._reach

    def _cells(self, inside_kyx: Bools) -> tuple[Ints, Bools]:
        """Offsets in the flat padded field of the pixels that are inside, ``[k, m]``, and which of them are any."""
        most = int(inside_kyx.sum((1, 2)).max())
        order_km = np.argsort(~inside_kyx.reshape(len(inside_kyx), -1), axis=1, kind="stable")[:, :most]
        y, x = np.divmod(order_km, 2 * self._reach + 1)
        is_any = np.take_along_axis(inside_kyx.reshape(len(inside_kyx), -1), order_km, 1)
        return np.where(is_any, (y - self._reach) * self._wide + x - self._reach, 0), is_any

    @cached_property
    def _line_km(self) -> Ints:
        """Pixels of a dash of each direction; what fills up short lists is the dash's own end."""
        offsets_km, is_any = self._cells(self._distance_kyx <= 0.5)
        return np.where(is_any, offsets_km, (self.ways_k2 @ np.array([self._wide, 1]))[:, None])

    @cached_property
    def _near_km(self) -> Ints:
        """Pixels so near to a dash of each direction that no other may use them."""
        offsets_km, is_any = self._cells(self._distance_kyx < 2 * self.config.margin)
        return np.where(is_any, offsets_km, (self.ways_k2 @ np.array([self._wide, 1]))[:, None])

    def _flat(self, point: Ints) -> Ints:
        """Index of a pixel in the padded field."""
        return (point[..., 0] + self._reach) * self._wide + point[..., 1] + self._reach

    @cached_property
    def _own_kkm(self) -> Counts:
        """1 where a pixel of the next dash lies near to the last one, by the directions of both."""
        step_k = self._next_k2 @ np.array([self._wide, 1])
        near = [np.isin(step + self._line_km, near_m) for step, near_m in zip(step_k, self._near_km, strict=True)]
        return np.stack(near).astype(np.uint8)

    def _empty(self, n: int) -> Counts:
        """Fields where only the edges are taken: a margin and a pixel of the image, and all around it."""
        field = np.ones((n, self._wide, self._wide), np.uint8)
        edge = self._reach + self.config.margin + 1
        field[:, edge:-edge, edge:-edge] = 0
        return field.reshape(n, -1)

    def _extend(
        self, rng: np.random.Generator, taken: Counts, at_n: Ints, pivot_n2: Ints, way_n: Ints
    ) -> tuple[Ints, Ints, Bools]:
        """Pivot and direction of the next dash of each path, and whether there is one; its last stands in no way.

        Args:
            rng: draws the directions.
            taken: fields.
            at_n: each path's field.
            pivot_n2, way_n: of its last dash.
        """
        next_n2 = pivot_n2 + self._next_k2[way_n]
        cells_nkm = self._flat(next_n2)[:, None, None] + self._line_km
        free_nk = (taken[at_n[:, None, None], cells_nkm] == self._own_kkm[way_n]).all(-1)
        total_nk = (self._weight_kk[way_n] * free_nk).cumsum(1)
        pick_n1 = rng.random((len(at_n), 1)) * total_nk[:, -1:]
        return next_n2, (total_nk[:, :-1] <= pick_n1).sum(1), total_nk[:, -1] > LEAST

    def _take(self, taken: Counts, at_n: Ints, pivot_n2: Ints, way_n: Ints, times: int = 1) -> None:
        """Count a dash in, or with -1 out, where it lies too near in each of the fields `at_n`."""
        taken[at_n[:, None], self._flat(pivot_n2)[:, None] + self._near_km[way_n]] += np.uint8(times % 256)

    def _grown(self, rng: np.random.Generator, n: int) -> Paths:
        """As many of `n` images as both long paths came to their end in, with their short paths."""
        config, most = self.config, 2 * self.config.dashes
        taken, every = self._empty(n), np.arange(n)
        # The paths' dashes in turn.
        pivot_ns2, way_ns = np.zeros((n, most, 2), np.int64), rng.integers(0, len(self.ways_k2), (n, most))
        start_n22 = np.empty((n, 2, 2), np.int64)
        start_n22[:, 0] = rng.integers(2 * config.apart, config.side - 2 * config.apart, (n, 2))
        angle_n = rng.random(n) * 2 * np.pi
        start_n22[:, 1] = start_n22[:, 0] + np.rint(config.apart * np.stack([np.sin(angle_n), np.cos(angle_n)], -1))
        pivot_ns2[:, :2] = start_n22 - np.rint(config.margin * self._unit_k2[way_ns[:, :2]]).astype(np.int64)
        self._take(taken, every, pivot_ns2[:, 0], way_ns[:, 0])
        cells_nm = self._flat(pivot_ns2[:, 1])[:, None] + self._line_km[way_ns[:, 1]]
        done_n = np.where(taken[every[:, None], cells_nm].any(1), 0, 2)
        self._take(taken, every, pivot_ns2[:, 1], way_ns[:, 1])
        ends_n = np.zeros(n, np.int64)
        while len(at := np.flatnonzero((done_n >= 2) & (done_n < most) & (ends_n < DEAD_ENDS))):
            s = done_n[at]
            pivot_i2, way_i, free_i = self._extend(rng, taken, at, pivot_ns2[at, s - 2], way_ns[at, s - 2])
            on, s = at[free_i], s[free_i]
            pivot_ns2[on, s], way_ns[on, s] = pivot_i2[free_i], way_i[free_i]
            self._take(taken, on, pivot_ns2[on, s], way_ns[on, s])
            done_n[on] += 1
            back = at[~free_i]
            ends_n[back] += 1
            for _ in range(BACK):
                back = back[done_n[back] > 2]
                done_n[back] -= 1
                self._take(taken, back, pivot_ns2[back, done_n[back]], way_ns[back, done_n[back]], -1)
        whole = done_n == most
        end_n22 = pivot_ns2[:, -2:] + self.ways_k2[way_ns[:, -2:]]
        return self._strewn(rng, Paths(pivot_ns2, way_ns, start_n22, end_n22).rows(whole), taken[whole])

    def _strewn(self, rng: np.random.Generator, long: Paths, taken: Counts) -> Paths:
        """The long paths with short ones around them, as many as find room."""
        pivots, ways = [long.pivot_bs2], [long.way_bs]
        for _ in range(self.config.distractors):
            pivot_bs2, way_bs = self._short_path(rng, taken)
            pivots.append(pivot_bs2)
            ways.append(way_bs)
        return Paths(np.concatenate(pivots, 1), np.concatenate(ways, 1), long.start_b22, long.end_b22)

    def _short_path(self, rng: np.random.Generator, taken: Counts) -> tuple[Ints, Ints]:
        """A short path in each image, put into `taken`; where none fits after some trials, none."""
        n = len(taken)
        pivot_bs2, way_bs = np.zeros((n, self.short, 2), np.int64), np.full((n, self.short), -1)
        for _ in range(RETRIALS + 1):
            left = np.flatnonzero(way_bs[:, 0] < 0)
            place_ip2 = rng.integers(0, self.config.side, (len(left), PLACES, 2))
            try_ip = rng.integers(0, len(self.ways_k2), (len(left), PLACES))
            cells_ipm = self._flat(place_ip2)[..., None] + self._line_km[try_ip]
            free_ip = ~taken[left[:, None, None], cells_ipm].any(-1)
            some_i, first_i = free_ip.any(-1), free_ip.argmax(-1)
            left, i = left[some_i], np.flatnonzero(some_i)
            field, alive = taken[left], np.arange(len(left))
            self._take(field, alive, place_ip2[i, first_i[i]], try_ip[i, first_i[i]])
            pivot_is2 = np.repeat(place_ip2[i, first_i[i]][:, None], self.short, 1)
            way_is = np.repeat(try_ip[i, first_i[i]][:, None], self.short, 1)
            for s in range(1, self.short):
                pivot_j2, way_j, free_j = self._extend(rng, field, alive, pivot_is2[alive, s - 1], way_is[alive, s - 1])
                alive = alive[free_j]
                pivot_is2[alive, s], way_is[alive, s] = pivot_j2[free_j], way_j[free_j]
                self._take(field, alive, pivot_is2[alive, s], way_is[alive, s])
            taken[left[alive]] = field[alive]
            pivot_bs2[left[alive]], way_bs[left[alive]] = pivot_is2[alive], way_is[alive]
        return pivot_bs2, way_bs

    @cached_property
    def _ink(self) -> tuple[Ints, Floats]:
        """Offsets of the pixels that a dash of each direction colours, and how much."""
        shade_kyx = np.clip(0.5 + self.config.thickness / 2 - self._distance_kyx, 0, 1)
        offsets_km, is_any = self._cells(shade_kyx > 0)
        y, x = np.divmod(offsets_km + self._reach * (self._wide + 1), self._wide)
        shade_km = np.take_along_axis(shade_kyx.reshape(len(shade_kyx), -1), y * (2 * self._reach + 1) + x, 1)
        return offsets_km, np.where(is_any, shade_km, 0) / shade_kyx.max()

    def picture(self, paths: Paths, start_b: Ints, end_b: Ints) -> Floats:
        """The images ``[b, side, side]``, from 0 to 1, with dots at the start of one path and the end of one.

        Args:
            paths: from `paths`.
            start_b, end_b: 0 or 1, which path's.
        """
        side, n = self.config.side, len(paths.way_bs)
        field, b = np.zeros((n, self._wide**2)), np.arange(n)
        offsets_km, shade_km = self._ink
        for s in range(paths.way_bs.shape[1]):
            i = np.flatnonzero(paths.way_bs[:, s] >= 0)
            way_i = paths.way_bs[i, s]
            cells_im = self._flat(paths.pivot_bs2[i, s])[:, None] + offsets_km[way_i]
            # Short lists are filled up with the pivot's own pixel, which no dash colours.
            field[i[:, None], cells_im] = np.maximum(field[i[:, None], cells_im], shade_km[way_i])
        edge = self._reach
        image_byx = field.reshape(n, self._wide, self._wide)[:, edge:-edge, edge:-edge]
        grid_yx2 = np.stack(np.meshgrid(*[np.arange(side)] * 2, indexing="ij"), -1)
        for dot_b2 in (paths.start_b22[b, start_b], paths.end_b22[b, end_b]):
            distance_byx = np.linalg.norm(grid_yx2 - dot_b2[:, None, None], axis=-1)
            image_byx = np.maximum(image_byx, np.clip(0.5 + self.config.dot - distance_byx, 0, 1))
        return image_byx
