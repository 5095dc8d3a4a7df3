"""What one client may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """What one client may ask of a server.

    Attributes:
        body_bytes: of a request.
        depth: of nested JSON.
        body_seconds: in which a body must have come.
        request_seconds: in which a request must be answered.
        rate: requests a minute and client; 0 is any number.
    """

    body_bytes: int = 4 * 2**20
    depth: int = 64
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    rate: int = 0
