"""The run behind ``subquad draft --head``: data, training, figures on held-out text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer

from subquad.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from subquad.data import Source
    from subquad.models.load import LoadedModel
    from subquad.train.draft_head import Stood
    from subquad.train.loop import Display

# Tokens of the data that are counted for the vocabulary.
COUNTED = 2_000_000
# Points of a curve.
POINTS = 60


@dataclass(frozen=True)
class HeadRun:
    """What a head is trained by; a run that goes on must be asked for the same.

    Attributes:
        model: as it is named.
        data: texts as in `parse_source`, and ``self`` for the model's own samples.
        tokens: to train on.
        window: pairs that the head's attention sees.
        guesses: tokens that it guesses in one read.
        vocab: how many of the commonest tokens it may guess; 0 is all.
        lr: peak learning rate.
        batch, seq: sequences of a batch, and tokens of a sequence.
        held_out: share of the documents that no training sees.
        samples: how many documents of the model's own; None is as many as the budget asks for.
        eval_tokens: held-out tokens for the figures at the end.
        seed: of shuffles and samples.
        aux_layers: of the model, whose streams the head sees too; None is `usual_aux_layers`.
    """

    model: str
    data: tuple[str, ...]
    tokens: int
    window: int
    guesses: int
    vocab: int
    lr: float
    batch: int
    seq: int
    held_out: float
    samples: int | None
    eval_tokens: int
    seed: int
    aux_layers: tuple[int, ...] | None

    @property
    def drafter(self) -> str:
        """The slug of what drafts with such a head."""
        return "gad" if self.guesses > 1 else "draft_head"


def train_head(settings: HeadRun, out: Path, *, resume: bool, device: torch.device) -> None:
    """Train a head and save it in `out`, with ``log.jsonl``, ``run.json``, ``results.json``, a table and pictures.

    Raises:
        ConfigError: settings that make no sense, differ from those of the run to resume, or would overwrite a run.
        DataError: data that is missing, broken or too short.
        DivergenceError, StoppedError: as in `fit_head`.
    """
    import torch

    from subquad.data import TokenStream, held_out_batch
    from subquad.models.checkpoint import check_target
    from subquad.models.draft_head import MODEL_TYPE, save_head, untrained
    from subquad.models.head_config import HeadConfig, usual_aux_layers
    from subquad.models.load import load_model
    from subquad.train.checkpoint import RunFolder
    from subquad.train.display import Line
    from subquad.train.draft_head import Lesson, fit_head, measure
    from subquad.train.loop import Budget, Habits, stopping_at_once
    from subquad.train.optimiser import Rate

    gpu = device.type == "cuda"
    check_target(out, MODEL_TYPE)  # now, and not after the training
    folder = RunFolder(out)
    resume = _opened(folder.facts(), settings, out, resume=resume) and folder.checkpoint.exists()
    with stopping_at_once(out), Line() as line:
        loaded = load_model(settings.model, dtype=torch.bfloat16 if gpu else torch.float32, device=device)
        if loaded.tokenizer is None:
            raise ConfigError(f"{settings.model}: expected a tokenizer beside the weights, got none; add its files")
        config, aux_layers = loaded.model.config, settings.aux_layers
        shape = HeadConfig.like(
            config,
            settings.window,
            target=loaded.name,
            guesses=settings.guesses,
            aux_layers=usual_aux_layers(config) if aux_layers is None else aux_layers,
        )
        sources = _sources(settings, loaded, out, line)
        cut: dict[str, Any] = {"time": settings.seq, "fraction": settings.held_out}
        held_out = held_out_batch(sources, loaded.tokenizer, tokens=settings.eval_tokens, **cut)
        vocab = out / "vocab.json"
        if settings.vocab and not (resume and vocab.exists()):
            write_vocab(vocab, loaded, sources, settings.vocab)
        if not resume:
            folder.log.unlink(missing_ok=True)
            folder.note(settings=asdict(settings))
        ids: list[int] = json.loads(vocab.read_text(encoding="utf-8")) if settings.vocab else []
        lesson = Lesson(settings.guesses) if settings.guesses > 1 else Lesson()
        head = untrained(replace(shape, kept=len(ids)), ids, seed=settings.seed).to(device).begin_(loaded.model)
        stream = TokenStream(sources, loaded.tokenizer, batch=settings.batch, seed=settings.seed, **cut)
        try:
            fit_head(
                loaded.model,
                head,
                stream,
                Budget(settings.tokens),
                Rate(settings.lr),
                folder,
                lesson=lesson,
                resume=resume,
                habits=Habits(save_minutes=2.0, log_steps=10 if gpu else 1),
                display=line,
                say=line.say,
            )
        finally:
            stream.close()
        line.say(f"comparing guesses along {held_out.tokens_bt.numel():,} held-out tokens")
        stood = measure(loaded.model, head, held_out, lesson.steps)
        save_head(head, out)
        write_results(out, stood, folder.lines())
        folder.note(finished=True)
        folder.checkpoint.unlink(missing_ok=True)
    typer.echo(table(stood))
    typer.echo(f"saved in {out}; use it with --draft {settings.drafter},path={out}")


def _opened(facts: dict[str, Any], settings: HeadRun, out: Path, *, resume: bool) -> bool:
    """Whether there is a run to go on with."""
    if facts and not resume:
        raise ConfigError(f"--out {out}: holds a run already; give --resume to go on, or another folder")
    if facts.get("finished"):
        raise ConfigError(f"--resume: the run in {out} is finished; use it with --draft {settings.drafter},path={out}")
    # As JSON gives them back; a run may be older than the choice of layers.
    now, was = json.loads(json.dumps(asdict(settings))), facts.get("settings")
    was = was and {"aux_layers": [], **was}
    changed = [f"{k} {was.get(k)} (now {v})" for k, v in now.items() if was.get(k) != v] if was else []
    if changed:
        raise ConfigError(
            f"--resume: expected the settings of the run, got others: {', '.join(changed)}; give the same"
        )
    return was is not None


def _sources(settings: HeadRun, loaded: LoadedModel, out: Path, display: Display) -> list[Source]:
    """What `settings.data` names; the model's own samples are drawn for it."""
    from subquad.convert.transplant.samples import is_own, own_samples
    from subquad.data import parse_source

    documents = settings.samples or max(64, -(-settings.tokens // settings.seq))
    sources: list[Source] = []
    for spec in settings.data:
        if is_own(spec):
            drawn = {"documents": documents, "length": settings.seq, "seed": settings.seed}
            sources.append(own_samples(spec, loaded.model, loaded.tokenizer, out, display=display, **drawn))
        else:
            sources.append(parse_source(spec))
    return sources


def write_vocab(path: Path, loaded: LoadedModel, sources: Sequence[Source], size: int) -> None:
    """Write the ids of the `size` commonest tokens of the sources, the model's end tokens among them."""
    from collections import Counter

    from subquad.data.sources import render

    counts = Counter[int]()
    for number, source in enumerate(sources, 1):
        for document in source.open():
            text = render(document, loaded.tokenizer)
            counts.update(loaded.tokenizer.encode(text, add_special_tokens=False))
            if counts.total() > COUNTED * number / len(sources):
                break
    ends = set(loaded.model.config.eos_tokens)
    common = [token for token, _ in counts.most_common(size) if token not in ends][: size - len(ends)]
    path.write_text(json.dumps(sorted([*ends, *common])) + "\n", encoding="utf-8")
    typer.echo(f"{path}: {len(ends) + len(common)} tokens, {counts.total():,} counted", err=True)


def table(stood: Stood) -> str:
    """The figures as a table in Markdown."""
    rows = ["| guess | likeliest token of the model | stands at temperature 1 |", "| --- | --- | --- |"]
    pairs = zip(stood.agreement, stood.acceptance, strict=True)
    rows += [f"| {number} | {same:.1%} | {stands:.1%} |" for number, (same, stands) in enumerate(pairs, 1)]
    greedy, drawn = (stood.tokens_a_round(greedy=how) for how in (True, False))
    rows.append(f"| tokens a round of {len(stood.agreement)} | {greedy:.2f} | {drawn:.2f} |")
    return "\n".join(rows)


def write_results(out: Path, stood: Stood, log: Sequence[dict[str, Any]]) -> None:
    """Write the figures as JSON and as a table, and how loss and guesses went as pictures."""
    from subquad.evals.figures import Chart, standalone

    rounds = {"greedy": stood.tokens_a_round(greedy=True), "temperature 1": stood.tokens_a_round(greedy=False)}
    content = asdict(stood) | {"tokens_a_round": rounds}
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    pictures = {
        "loss": ("kl", "KL of the guesses to the model", "nats"),
        "guesses": ("agreement", "Guesses that are the model's likeliest token", "share"),
    }
    lines = [f"Held-out text, {stood.tokens:,} tokens guessed:", "", table(stood)]
    for name, (key, title, unit) in pictures.items():
        chart = Chart(title, "tokens trained on", unit, curves(log, key), log_y=key == "kl")
        (out / f"{name}.svg").write_text(standalone(chart, name), encoding="utf-8")
        lines += ["", f"![{title}]({name}.svg)"]
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def curves(log: Sequence[dict[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """A series for each guess, of means over neighbouring steps."""
    size = -(-len(log) // POINTS)
    parts = [log[start : start + size] for start in range(0, len(log), max(size, 1))]
    return {
        f"guess {s + 1}": [(part[-1]["tokens"], fmean(line[key][s] for line in part)) for part in parts]
        for s in range(len(log[0][key]) if log else 0)
    }
