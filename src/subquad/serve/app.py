"""The application: models, health, metrics, and the rooms of the endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from subquad import __version__
from subquad.serve import chat, completions, embed, files
from subquad.serve.errors import ErrorBody, handle_errors
from subquad.serve.guard import Guard, Keys
from subquad.serve.metrics import TEXT_FORMAT
from subquad.serve.served import Served
from subquad.serve.site import Site

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field that can't be, or a request that does not fit.",
        401: "No API key that is known.",
        404: "No such model.",
        408: "It took too long.",
        413: "A body that is too large.",
        429: "Too many requests of this client, or a full queue.",
        503: "The server is stopping, or not ready.",
    }.items()
}


def create_app(site: Site, keys: Keys | None = None) -> FastAPI:
    """The ASGI application of a server.

    Args:
        site: what it serves, within which bounds.
        keys: of which a client needs one; None lets everyone in.
    """
    about = "An OpenAI-compatible server for hybrid models."
    # FastAPI's own pages of documentation load scripts from another host.
    app = FastAPI(
        title="subquad",
        version=__version__,
        description=about,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    handle_errors(app)
    app.add_middleware(Guard, site=site, keys=keys or Keys(()))
    for room in (chat, completions, embed):
        app.include_router(room.router(site), responses=REFUSALS)

    @app.get("/v1/models", tags=["models"], responses={401: REFUSALS[401]})
    async def models() -> dict[str, Any]:
        """The models there are."""
        return {"object": "list", "data": [_card(one) for one in site.served]}

    @app.get("/v1/models/{name:path}", tags=["models"], responses={k: REFUSALS[k] for k in (401, 404)})
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return _card(site.named(name))

    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """Whether the process is there."""
        return {"status": "ok"}

    @app.get("/ready", tags=["operation"], response_model=None, responses={503: {"description": "Not now."}})
    async def ready() -> Response:
        """Whether requests should come."""
        why = site.why_not_ready()
        return JSONResponse({"status": why or "ready"}, 503 if why else 200)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """All figures, as Prometheus reads them."""
        return Response(site.metrics.text(), media_type=TEXT_FORMAT)

    app.include_router(files.router())
    _document(app, [one.name for one in site.served])
    return app


def _card(one: Served) -> dict[str, Any]:
    return {"id": one.name, "object": "model", "created": one.created, "owned_by": "subquad"}


def _document(app: FastAPI, names: Sequence[str]) -> None:
    """Have the OpenAPI page name the models, and wrong fields be answered with 400, never with FastAPI's own 422."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for body in schema["components"]["schemas"].values():
            if "model" in body.get("properties", {}):
                body["properties"]["model"] = {"type": "string", "enum": list(names), "title": "Model"}
        return schema

    app.openapi = openapi
