"""Centroids of many point clouds at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE = 4096


def lloyd(points_gnk: Tensor, n_centres: int, *, iterations: int) -> Tensor:
    """k-means by Lloyd's iterations (IEEE Trans. Inf. Theory 28, 1982), for each of g clouds, ``[g, n_centres, k]``.

    Deterministic: starts at points spread evenly over the cloud's order, and an empty cluster keeps its centre. Of more
    than 4,096 points an even subset is used; of fewer points than centres some centres coincide.

    Args:
        points_gnk: the clouds.
        n_centres: clusters of each.
        iterations: passes over the points.
    """
    n = points_gnk.shape[1]
    taken = torch.linspace(0, n - 1, min(n, SAMPLE), device=points_gnk.device).long()
    points_gnk = points_gnk[:, taken]
    starts = torch.linspace(0, len(taken) - 1, n_centres, device=points_gnk.device).long()
    centres_gck = points_gnk[:, starts].clone()
    for _ in range(iterations):
        closeness_gnc = points_gnk @ centres_gck.mT - 0.5 * centres_gck.square().sum(-1)[:, None]
        member_gnc = F.one_hot(closeness_gnc.argmax(-1), n_centres).to(points_gnk.dtype)
        count_gc1 = member_gnc.sum(1)[..., None]
        centres_gck = torch.where(count_gc1 > 0, member_gnc.mT @ points_gnk / count_gc1.clamp(min=1), centres_gck)
    return centres_gck
