"""Several replicas of a server as a Ray Serve application.

    serve run subquad.serve.deployment:build model=my-hybrid replicas=2

A light front takes requests, and sends those whose prompts begin alike to the same replica; see `Front`.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Literal

from prometheus_client.core import Metric
from pydantic import BaseModel, ConfigDict, Field
from ray import serve  # pyright: ignore
from ray.exceptions import RayActorError  # pyright: ignore
from ray.serve.config import RequestRouterConfig  # pyright: ignore
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError  # pyright: ignore
from ray.serve.request_router import RequestRouter  # pyright: ignore
from starlette.types import ASGIApp, Message

from subquad.core.errors import ConfigError
from subquad.serve.affinity import order
from subquad.serve.bounds import Bounds
from subquad.serve.calls import StoppedError
from subquad.serve.front import Asked, Front, ReplicaLostError, play
from subquad.serve.guard import Guard, Keys
from subquad.serve.metrics import merge
from subquad.serve.served import Room
from subquad.serve.site import Site

MEGABYTE = 2**20
FRONT_REQUESTS = 8192
"""That a front holds at a time; replicas refuse earlier, when their queues are full."""

FIGURES_SECONDS = 5.0


class Plan(BaseModel):
    """What ``serve run`` is told, as ``name=value``; the options of ``subquad serve`` by the same names, and Ray's.

    Replicas are on GPUs where `gpus`, of each, is above 0. API keys come from SUBQUAD_API_KEY, separated by spaces,
    and from a file with a key a line.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str = ""
    replicas: int = Field(2, ge=1)
    fronts: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    dtype: Literal["", "float32", "bfloat16", "float16", "float64"] = ""
    rows: int = Field(8, ge=1)
    max_tokens: int = Field(4096, ge=2)
    prefix_mb: float = Field(256, ge=0)
    draft: str = "copyspec"
    draft_tokens: int = Field(0, ge=0)
    queue: int = Field(1024, ge=1)
    patience: float = Field(10, ge=0)
    body_mb: float = Field(4, gt=0)
    request_seconds: float = Field(600, gt=0)
    rate: int = Field(0, ge=0)
    drain_seconds: float = Field(30, ge=0)
    api_key_file: str = ""

    def room(self) -> Room:
        """Of a replica's model."""
        return Room(
            rows=self.rows,
            tokens=self.max_tokens,
            prefix_bytes=int(self.prefix_mb * MEGABYTE),
            queue=self.queue,
            patience=self.patience,
            draft_tokens=self.draft_tokens or None,
        )

    def bounds(self, *, rate: int) -> Bounds:
        """Of a client."""
        return Bounds(int(self.body_mb * MEGABYTE), request_seconds=self.request_seconds, rate=rate)

    def keys(self) -> list[str]:
        """That open.

        Raises:
            ConfigError: a file that can't be read or holds none.
        """
        found = os.environ.get("SUBQUAD_API_KEY", "").split()
        if self.api_key_file:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file: expected a key a line, got {error}; check the path") from error
            if not lines:
                raise ConfigError(f"api_key_file: expected a key a line, got none in {self.api_key_file}; write one")
            found += lines
        return found


class AffineRouter(RequestRouter):  # pyright: ignore[reportUntypedBaseClass]
    """Sends a request where its beginning is known, unless that replica is much busier than another."""

    def initialize_state(self, spare: int) -> None:
        """Called by Ray.

        Args:
            spare: requests that a replica may have more than the least busy one.
        """
        self._spare = spare
        self._under_way = Counter[Any]()

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The replicas, best first, each a rank of its own."""
        asked: Asked = pending_request.args[0]
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        return [[by_name[name]] for name in order(asked.key, {n: self._under_way[n] for n in by_name}, self._spare)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """A replica has taken one."""
        self._under_way[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """A replica is done with one."""
        self._under_way[replica_id.unique_id] -= 1


class Replica:
    """One server: a whole model in a process of its own."""

    async def __init__(self, plan: Plan, keys: list[str]) -> None:
        import torch

        from subquad.models.load import load_model
        from subquad.serve.app import create_app
        from subquad.serve.build import build_site
        from subquad.serve.server import log_to_stderr

        # As in subquad serve: bfloat16 on a GPU, else the model's own.
        dtype = plan.dtype or ("bfloat16" if plan.gpus else "")
        device = torch.device("cuda" if plan.gpus else "cpu")
        loaded = load_model(plan.model, dtype=getattr(torch, dtype) if dtype else None, device=device)
        self.site = build_site(
            {plan.name or loaded.name: loaded}, plan.room(), plan.bounds(rate=0), draft=plan.draft.split(",")
        )
        log_to_stderr()
        self.name = serve.get_replica_context().replica_id.unique_id
        self.app = named(create_app(self.site, Keys(keys)), self.name)
        for one in self.site.served:
            one.start()
        while not all(one.worker.ready for one in self.site.served):
            self.check_health()
            await asyncio.sleep(0.05)

    async def answer(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        """The messages of an answer."""
        async for some in play(self.app, asked):
            yield some

    def figures(self) -> tuple[str, list[Metric]]:
        """Its name, and all of its figures."""
        return self.name, list(self.site.metrics.registry.collect())

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica whose worker has failed."""
        for one in self.site.served:
            if one.worker.failed is not None:
                raise RuntimeError(f"{one.name} has failed") from one.worker.failed

    async def __del__(self) -> None:
        for one in self.site.served:
            await asyncio.to_thread(one.worker.stop)


def named(app: ASGIApp, name: str) -> ASGIApp:
    """An application whose answers say who gave them."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-replica", name.encode())]}
            await send(message)

        await app(scope, receive, noted)

    return answer


@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Ingress:
    """Guards, and has the replicas answer."""

    def __init__(self, replicas: Any, plan: Plan, keys: list[str]) -> None:
        self._replicas, self._plan, self._keys = replicas, plan, keys
        self._streams = replicas.options(stream=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        bounds = self._plan.bounds(rate=self._plan.rate)
        return Guard(Front(self.ask, self.figures, bounds.request_seconds), Site((), bounds), Keys(self._keys))

    async def ask(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        """Have a replica answer.

        Raises:
            ReplicaLostError: it went before it was done.
        """
        response = self._streams.answer.remote(asked)
        try:
            async for some in response:
                yield some
        except (RayActorError, ReplicaUnavailableError) as error:
            raise ReplicaLostError("the replica is lost; try again") from error
        finally:
            response.cancel()

    async def figures(self) -> bytes:
        """Of all replicas that answer.

        Raises:
            StoppedError: none does.
        """
        try:
            asked = self._replicas.broadcast("figures")
            got = await asked.results_async(timeout_s=FIGURES_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError) as error:
            raise StoppedError("no replica tells its figures") from error
        return merge(dict(one for one in got if not isinstance(one, Exception)))


def build(told: Plan | Mapping[str, str]) -> Any:
    """The application, for ``serve run`` and ``serve.run``.

    Args:
        told: a plan, or what `Plan` reads as one.

    Raises:
        ConfigError: keys that can't be read.
        ValidationError: no plan.
    """
    plan = Plan.model_validate(told)
    keys = plan.keys()
    replicas = serve.deployment(
        Replica,
        num_replicas=plan.replicas,
        # As many as its own queue takes, so that it is the one that refuses, and a few that only ask how it is.
        max_ongoing_requests=plan.rows + plan.queue + 16,
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=AffineRouter, request_router_kwargs={"spare": plan.rows}
        ),
        health_check_period_s=2,
        # Requests are logged by what answers them.
        logging_config={"enable_access_log": False},
        graceful_shutdown_timeout_s=plan.drain_seconds,
    )
    front = serve.deployment(
        Ingress,
        name="Front",
        num_replicas=plan.fronts,
        max_ongoing_requests=FRONT_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
        graceful_shutdown_timeout_s=plan.drain_seconds,
    )
    return front.bind(replicas.bind(plan, keys), plan, keys)
