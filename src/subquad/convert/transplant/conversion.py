"""A whole conversion: teacher in, trained student, log, evaluation and report out."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import subquad
from subquad.convert.transplant import rebuild, transplant
from subquad.convert.transplant.measure import measure
from subquad.convert.transplant.placement import parse_options, place
from subquad.convert.transplant.samples import write_samples
from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError
from subquad.data import Source, TokenStream, held_out_text, parse_source
from subquad.evals.perplexity import Perplexity, perplexity, perplexity_ratio
from subquad.evals.text import CHARS_A_TOKEN, tokenize_text
from subquad.models.card import ModelCard
from subquad.models.checkpoint import check_target, save_pretrained
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Budget, Display, Habits, Progress
from subquad.train.pipeline import Recipe, fit

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out of a conversion; written to ``run.json``.

    Attributes:
        teacher: what `load_model` takes.
        mixers, layers, keep: as in `place`.
        options: as in `parse_options`.
        data: as in `parse_source`, and ``self`` for the teacher's own samples.
        samples: how many of these; None is as many as the token budget asks for, or 256.
        held_out: share of the documents kept for evaluation.
        batch, seq: sequences of a batch, tokens of a sequence.
        seed: of shuffles and samples.
        measure_tokens: tokens over which the teacher's attention is measured before the start; 0 is data-free.
        eval_tokens: held-out tokens for the evaluation at the end.
        recipe: the training.
    """

    teacher: str
    mixers: tuple[str, ...]
    data: tuple[str, ...]
    recipe: Recipe
    layers: str | None = None
    keep: float | None = None
    options: tuple[str, ...] = ()
    samples: int | None = None
    held_out: float = 0.05
    batch: int = 8
    seq: int = 1024
    seed: int = 0
    measure_tokens: int = 8192
    eval_tokens: int = 8192


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave.

    Attributes:
        teacher, student: both models.
        placement: slug of the new mixer by layer.
        teacher_perplexity, student_perplexity: on the same held-out windows.
        seconds: wall time of this call.
    """

    teacher: LoadedModel
    student: Stack
    placement: Mapping[int, str]
    teacher_perplexity: Perplexity
    student_perplexity: Perplexity
    seconds: float


@dataclass(frozen=True)
class Surroundings:
    """What decides nothing of the result: where, how often, and who is told.

    Attributes:
        device: where to train; on a GPU in bfloat16 over float32 weights.
        habits: how often to log and save.
        display: told about the progress of each stage.
        say: told one line about each thing that is settled.
        report: given the conversion before the run counts as finished, so that a resumed run reports too.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    habits: Habits | None = None
    display: Display | None = None
    say: Say = lambda line: None
    report: Callable[[Conversion], None] = lambda conversion: None


def convert(
    settings: Settings, out: Path, *, resume: bool = False, surroundings: Surroundings | None = None
) -> Conversion:
    """Convert a teacher as `settings` say, into the folder `out`.

    The folder holds the model as `save_pretrained` writes it, ``run.json`` (settings, versions, layers, figures),
    ``log.jsonl`` (one line a step) and, until the model is saved, ``checkpoint.pt``.

    Raises:
        ConfigError: settings that make no sense, differ from those of the run to resume, or would overwrite a run.
        DataError: data that is missing, broken or too short.
        DivergenceError, StoppedError: as in `fit`.
    """
    here = surroundings or Surroundings()
    began = time.monotonic()
    check_target(out)  # now, and not after hours of training
    folder = RunFolder(out)
    facts = _open(folder, settings, resume)
    loaded = load_model(settings.teacher, dtype=torch.float32, device=here.device)
    if loaded.tokenizer is None:
        raise ConfigError(f"{settings.teacher}: expected a tokenizer beside the weights, got none; add its files")
    teacher = loaded.model.requires_grad_(False)
    placement = place(len(teacher.blocks), settings.mixers, layers=settings.layers, keep=settings.keep)
    options = parse_options(settings.options, sorted(set(placement.values())))
    if settings.seq > teacher.config.max_positions:
        raise ConfigError(
            f"--seq {settings.seq}: expected at most the teacher's {teacher.config.max_positions} positions; lower it"
        )
    here.say(describe(placement, len(teacher.blocks)))
    sources = _sources(settings, loaded, out, here)
    held_out = held_out_text(
        sources, loaded.tokenizer, fraction=settings.held_out, chars=settings.eval_tokens * CHARS_A_TOKEN
    )
    text = tokenize_text(loaded.tokenizer, held_out, settings.eval_tokens)
    with closing(_stream(settings, sources, loaded)) as stream:  # its thread works while the student is made
        share = settings.recipe.distill is None
        if facts is None:
            stats = None
            if settings.measure_tokens:
                here.say(f"measuring the attention of {len(placement)} layers on {settings.measure_tokens:,} tokens")
                batches = -(-settings.measure_tokens // (settings.batch * settings.seq))
                with closing(_stream(settings, sources, loaded)) as sample:
                    tokens = list(islice(sample, batches))
                stats = measure(teacher, tokens, sorted(placement))
            student = transplant(teacher, placement, options=options, stats=stats, share=share)
            facts = {
                "settings": config_to_dict(settings),
                "versions": versions(here.device),
                "teacher": {"name": loaded.name, "license": loaded.license},
                "layers": {str(i): student.config.layers[i] for i in placement},
            }
            folder.log.unlink(missing_ok=True)
            folder.note(**facts)
        else:
            student = rebuild(teacher, {int(i): layer for i, layer in facts["layers"].items()}, share=share)
        fit(
            teacher,
            student,
            sorted(placement),
            stream,
            settings.recipe,
            folder,
            resume=resume,
            habits=here.habits,
            display=here.display,
        )
    here.say(f"evaluating on {len(text.ids_n):,} held-out tokens")
    context = min(settings.seq, len(text.ids_n))
    scores = [
        perplexity(m, text, context, batch=settings.batch, progress=_shown(here.display, name, context))
        for name, m in (("teacher", teacher), ("student", student))
    ]
    folder.note(evaluation=_evaluation(*scores))
    save_pretrained(student, out, loaded.tokenizer, _card(settings, loaded, folder.facts()))
    conversion = Conversion(loaded, student, placement, *scores, seconds=time.monotonic() - began)
    here.report(conversion)
    folder.note(finished=True)
    folder.checkpoint.unlink(missing_ok=True)
    return conversion


def _shown(display: Display | None, name: str, context: int) -> Callable[[int, int], None]:
    """Tokens done and in all, as a `Display` shows them."""
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if display is not None:
            seconds = time.monotonic() - began
            pace = done / max(seconds, 1e-9)
            display(Progress(name, done // context, done, seconds, done / total, float("nan"), pace))

    return show


def describe(placement: Mapping[int, str], n_layers: int) -> str:
    """The placement in words: which layers go where, and which stay."""
    by_slug: dict[str, list[int]] = {}
    for i, slug in placement.items():
        by_slug.setdefault(slug, []).append(i)
    stay = [i for i in range(n_layers) if i not in placement]
    moved = "; ".join(f"{slug} in {', '.join(map(str, layers))}" for slug, layers in by_slug.items())
    return f"{moved}; {len(stay)} of {n_layers} layers stay: {', '.join(map(str, stay)) or 'none'}"


def versions(device: torch.device) -> dict[str, str]:
    """What ran, and on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "subquad": subquad.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
    }


def _open(folder: RunFolder, settings: Settings, resume: bool) -> dict[str, Any] | None:
    """The facts of the run to resume, or None for a new one."""
    facts = folder.facts()
    if not resume:
        if folder.checkpoint.exists() or facts.get("finished"):
            raise ConfigError(f"--out {folder.path}: holds a run already; give --resume to go on, or another folder")
        return None
    if facts.get("finished"):
        raise ConfigError(f"--resume: the run in {folder.path} is finished; look at it with subquad eval {folder.path}")
    folder.load()
    was, now = _flat(facts["settings"]), _flat(config_to_dict(settings))
    changed = [f"{k} {was.get(k)} (now {now.get(k)})" for k in sorted(was | now) if was.get(k) != now.get(k)]
    if changed:
        raise ConfigError(
            f"--resume: expected the settings of the run, got others: {', '.join(changed)}; give the same"
        )
    return facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and plain values; tuples as the lists that JSON made of them."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out


def _stream(settings: Settings, sources: list[Source], loaded: LoadedModel) -> TokenStream:
    return TokenStream(
        sources,
        loaded.tokenizer,
        batch=settings.batch,
        time=settings.seq,
        seed=settings.seed,
        fraction=settings.held_out,
    )


def _sources(settings: Settings, loaded: LoadedModel, out: Path, here: Surroundings) -> list[Source]:
    if not settings.data:
        raise ConfigError(
            "expected --data, got none; give --data FILE, --data pydoc, or --data self for no data at all"
        )
    sources: list[Source] = []
    for spec in settings.data:
        if spec != "self":
            sources.append(parse_source(spec))
            continue
        path = out / "samples.jsonl"
        if not path.exists():
            documents = settings.samples or _documents(settings)
            here.say(f"sampling {documents} documents of up to {settings.seq} tokens from the teacher")
            write_samples(
                loaded.model,
                loaded.tokenizer,
                path,
                documents=documents,
                length=settings.seq,
                seed=settings.seed,
                display=here.display,
            )
        # The name stays the same wherever the folder is moved to before a resume.
        sources.append(dataclasses.replace(parse_source(str(path)), name="self"))
    return sources


def _documents(settings: Settings) -> int:
    recipe = settings.recipe
    budgets = [(recipe.align, recipe.passes), (recipe.distill, 1)]
    tokens = sum(-(-b.tokens // passes) for b, passes in budgets if isinstance(b, Budget) and b.tokens is not None)
    return max(64, -(-tokens // settings.seq)) if tokens else 256


def _evaluation(teacher: Perplexity, student: Perplexity) -> dict[str, Any]:
    def one(scores: Perplexity) -> dict[str, Any]:
        buckets = [[b.start, b.stop, b.nll] for b in scores.by_position()]
        return {"perplexity": dataclasses.asdict(scores.perplexity), "nll_by_position": buckets}

    ratio = dataclasses.asdict(perplexity_ratio(student, teacher))
    shape = {"context": teacher.context, "windows": teacher.windows}
    return shape | {"teacher": one(teacher), "student": one(student), "ratio": ratio}


def _card(settings: Settings, loaded: LoadedModel, facts: Mapping[str, Any]) -> ModelCard:
    evaluation = facts["evaluation"]
    where = f"held-out text, context {evaluation['context']}, {evaluation['windows']} windows"
    figures = {
        f"perplexity of the {who}, {where}": evaluation[who]["perplexity"]["value"] for who in ("teacher", "student")
    }
    recipe = {
        k: v for k, v in _flat(config_to_dict(settings)).items() if v is not None and k not in ("teacher", "data")
    }
    return ModelCard(
        name=f"{loaded.name} with {', '.join(sorted({m.partition(':')[0] for m in settings.mixers}))}",
        teacher=settings.teacher,
        license=loaded.license or "",
        data=", ".join(settings.data),
        recipe=recipe,
        evaluation=figures,
    )
