"""The files of the page at ``/`` and of the one at ``/docs``: all that a browser loads is this server's own."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).with_name("page")
PLACES = {"": "index.html", "docs": "docs.html"}
# As the pages say of themselves, and that no other site may show them in a frame.
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def router() -> APIRouter:
    """One route for names at the root; a mount there would answer every path of the API that has no such method."""
    routes, files = APIRouter(), StaticFiles(directory=PAGE)

    @routes.api_route("/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(http: Request, name: str = "") -> Response:
        response = await files.get_response(PLACES.get(name, name), http.scope)
        response.headers.update(HEADERS)
        return response

    return routes
