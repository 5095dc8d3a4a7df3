"""Lloyd's iterations find well separated clusters, and cope with fewer points than centres."""

from __future__ import annotations

import torch

from subquad.ops.kmeans import lloyd


def test_separated_clusters_are_found_in_every_cloud() -> None:
    torch.manual_seed(0)
    truth = torch.tensor([[[0.0, 0], [10, 0], [0, 10]], [[5, 5], [-5, 5], [5, -5]]])
    points = (truth[:, :, None] + 0.1 * torch.randn(2, 3, 200, 2)).flatten(1, 2)
    found = lloyd(points, 3, iterations=5)
    distance = torch.cdist(truth, found).min(-1).values
    assert distance.max() < 0.05  # 0.1 / sqrt(200) = 0.007 a coordinate


def test_fewer_points_than_centres() -> None:
    points = torch.tensor([[[1.0], [2.0]]])
    found = lloyd(points, 4, iterations=3)
    assert sorted(set(found.flatten().tolist())) == [1.0, 2.0]
