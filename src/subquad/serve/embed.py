"""``/v1/embeddings``: a text as one vector of the model's last stream."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from subquad.models.stack import Stack
from subquad.serve.calls import LateError
from subquad.serve.completions import encode
from subquad.serve.errors import ApiError
from subquad.serve.schemas import EmbeddingBody
from subquad.serve.site import Site
from subquad.serve.watch import left_or_done


@torch.no_grad()
def embed(model: Stack, tokens: Sequence[int], pooling: str) -> Tensor:
    """The stream behind the final norm, float32 ``[d]`` of length 1 on the CPU.

    Args:
        model: reads the text from its beginning.
        tokens: at least one.
        pooling: ``mean`` over the positions, or the ``last`` one.
    """
    hidden_td = model.hidden(torch.tensor([tokens], device=model.device))[0].float()
    vector_d = hidden_td.mean(0) if pooling == "mean" else hidden_td[-1]
    return torch.nn.functional.normalize(vector_d, dim=0).cpu()


def router(site: Site) -> APIRouter:
    """The endpoint of one server."""
    routes = APIRouter(tags=["embeddings"])

    @routes.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingBody, http: Request) -> Response:
        """A vector of length 1 for each text; between the others' steps, one text at a time."""
        served = site.find(body.model)
        model, most = served.loaded.model, served.worker.engine.capacity
        width, vocab_size = model.config.d_model, model.config.vocab_size
        if body.dimensions not in (None, width):
            raise ApiError(400, f"dimensions: expected {width} as the model has, got {body.dimensions}", "dimensions")
        inputs = await served.aside(lambda: encode(served.tokenizer, body.input))
        for i, tokens in enumerate(inputs):
            if not 1 <= len(tokens) <= most:
                raise ApiError(400, f"input: expected 1 to {most} tokens, got {len(tokens)} in number {i}", "input")
            if max(tokens) >= vocab_size:
                raise ApiError(400, f"input: expected token ids below {vocab_size}, got {max(tokens)}", "input")

        async def work() -> list[Tensor]:
            pooling = body.pooling or "mean"
            return [await served.worker.call(lambda t=tokens: embed(model, t, pooling)) for tokens in inputs]

        seconds = site.bounds.request_seconds
        try:
            async with asyncio.timeout(seconds):
                vectors = await left_or_done(http.receive, work())
        except TimeoutError as error:
            raise LateError(f"expected to end within {seconds:g} s") from error
        data = [
            {"object": "embedding", "index": i, "embedding": _coded(vector_d, body.encoding_format or "float")}
            for i, vector_d in enumerate(vectors)
        ]
        tokens = sum(map(len, inputs))
        site.metrics.requests.labels(served.name, http.url.path, "ok").inc()
        site.metrics.prompt_tokens.labels(served.name).inc(tokens)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    return routes


def _coded(vector_d: Tensor, encoding: str) -> Any:
    if encoding == "float":
        return vector_d.tolist()
    return base64.b64encode(vector_d.numpy().astype("<f4").tobytes()).decode()
