"""What a client is told when a request fails, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from subquad.core.errors import SubquadError
from subquad.serve.calls import LateError, QueueFullError, StoppedError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ErrorDetail(BaseModel):
    """What went wrong, and where in the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's body of an error."""

    error: ErrorDetail


class ClientGoneError(Exception):
    """The client has left before it was answered."""


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what was expected, what came, what to do.
        param: the field it is about.
        code: a word for programs.
        headers: more of them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As an answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error; of what nobody foresaw, nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, f"the queue is full: {error}; try again", code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, LateError):
        return ApiError(408, f"timeout: {error}; ask for fewer tokens", code="timeout")
    if isinstance(error, StoppedError):
        return ApiError(503, f"not available: {error}", code="unavailable", headers={"Retry-After": "5"})
    if isinstance(error, SubquadError):
        name = str(error).partition(":")[0]
        return ApiError(400, str(error), param=name if name.isidentifier() else None)
    return ApiError(500, "the server has failed at this; its log says why", code="internal")


async def _answer(_: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


async def _wrong_field(_: Request, error: Exception) -> JSONResponse:
    first = cast("RequestValidationError", error).errors()[0]
    where = ".".join(str(part)[:80] for part in first["loc"] if part != "body")[:400]
    return ApiError(400, f"{where or 'body'}: {first['msg']}", param=where or None).response()


async def _nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _http(_: Request, error: Exception) -> JSONResponse:
    told = cast("HTTPException", error)
    return ApiError(told.status_code, str(told.detail), headers=told.headers).response()


def handle_errors(app: FastAPI) -> None:
    """Have every error answered in OpenAI's form."""
    # Starlette raises what nobody foresaw again once it is answered, so that it is logged.
    for kind in (ApiError, QueueFullError, LateError, StoppedError, SubquadError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientGoneError, _nobody)
    app.add_exception_handler(RequestValidationError, _wrong_field)
    app.add_exception_handler(HTTPException, _http)
