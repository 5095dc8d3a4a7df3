"""What all parts of a server share: its models, its bounds, what is measured and logged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from subquad.serve.bounds import Bounds
from subquad.serve.errors import ApiError
from subquad.serve.metrics import Metrics
from subquad.serve.served import Served

LOG = logging.getLogger("subquad.serve")


class Site:
    """A server's models and their surroundings.

    Args:
        served: at least one model, each of another name.
        bounds: what one client may ask.
        log_prompts: also log what is asked and answered.

    Attributes:
        under_way: requests that are being answered.
    """

    def __init__(self, served: Sequence[Served], bounds: Bounds, *, log_prompts: bool = False) -> None:
        self.served, self.bounds, self.log_prompts = list(served), bounds, log_prompts
        self.metrics = Metrics(self.served)
        self.under_way = 0
        self._draining = threading.Event()

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Take nothing new from now on; what is under way goes on."""
        self._draining.set()

    def why_not_ready(self) -> str | None:
        """Why no request should come now; None where it may."""
        if self.draining:
            return "the server is stopping"
        for one in self.served:
            if one.worker.failed is not None:
                return f"{one.name} has failed"
            if not one.worker.ready:
                return f"{one.name} is not ready yet"
        return None

    def find(self, name: str) -> Served:
        """The model a request asks for.

        Raises:
            ApiError: there is none of that name, or nothing new is taken.
        """
        if self.draining:
            raise ApiError(503, "the server is stopping", code="unavailable", headers={"Retry-After": "5"})
        return self.named(name)

    def named(self, name: str) -> Served:
        """The model of that name.

        Raises:
            ApiError: there is none.
        """
        found = next((one for one in self.served if one.name == name), None)
        if found is None:
            known = ", ".join(one.name for one in self.served)
            raise ApiError(404, f"model: expected one of {known}, got {name!r}", "model", "model_not_found")
        return found
