"""Launches that begin while the one before them ends (programmatic dependent launch), for chains of short kernels."""

from __future__ import annotations

import functools

import torch

from subquad.ops import backends


@functools.cache
def options(device: torch.device) -> dict[str, bool]:
    """What a launch is given whose kernel calls `begin`: on Hopper and later it may overlap the one before."""
    nvidia = device.type == "cuda" and torch.version.hip is None and not backends.interpreted()
    can = nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if can else {"OVERLAP": False}
