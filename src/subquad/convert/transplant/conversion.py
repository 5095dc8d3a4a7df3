"""A whole conversion: teacher in, trained student, log, evaluation and report out."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import subquad
from subquad.convert.transplant import rebuild, transplant
from subquad.convert.transplant.measure import attention_of, measure
from subquad.convert.transplant.placement import parse_options, place, place_heads
from subquad.convert.transplant.samples import is_own, own_samples
from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError
from subquad.data import Source, TokenStream, held_out_text, parse_source
from subquad.data.overlap import check_overlap
from subquad.evals.perplexity import Perplexity, perplexity, perplexity_ratio
from subquad.evals.text import CHARS_A_TOKEN, read_text, tokenize_text
from subquad.models.card import ModelCard
from subquad.models.checkpoint import check_target, save_pretrained
from subquad.models.load import check_pair, load_model
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Display, Habits, Progress
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import PLAIN, Recipe
from subquad.train.stages import Machine

Say = Callable[[str], None]
# Of an evaluation text, looked for in the data.
OVERLAP_CHARS = 10_000_000


@dataclass(frozen=True)
class Settings:
    """Everything that decides what comes out of a conversion; written to ``run.json``.

    Attributes:
        teacher: what `load_model` takes.
        data: as in `parse_source`, and ``self`` for the teacher's own samples.
        recipe: mixers and training; what is said below goes before what it says.
        tokens: of the whole training, for the phases with a share.
        mixers, layers, keep: as in `place`.
        heads: key/value heads that stay full attention, by layer; all others are converted.
        options: as in `parse_options`; after the recipe's own, where its mixers are used.
        start: the model to convert and train, as `load_model` takes it; None is the teacher.
        samples: how many documents of the teacher's own; None is as many as the budget asks for, or 256.
        held_out: share of the documents kept for evaluation.
        batch, seq: sequences of a batch, tokens of a sequence.
        seed: of shuffles and samples.
        measure_tokens: tokens over which the attention is measured before the start; 0 is data-free.
        eval_tokens: held-out tokens for the evaluation at the end.
        eval_texts: texts that no training should have seen; data that holds parts of them is named in a warning.
    """

    teacher: str
    data: tuple[str, ...]
    recipe: Recipe = PLAIN
    tokens: int | None = None
    mixers: tuple[str, ...] = ()
    layers: str | None = None
    keep: float | None = None
    heads: Mapping[str, list[int]] | None = None
    options: tuple[str, ...] = ()
    start: str | None = None
    samples: int | None = None
    held_out: float = 0.05
    batch: int | None = None
    seq: int | None = None
    seed: int = 0
    measure_tokens: int = 8192
    eval_tokens: int = 8192
    eval_texts: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Sequences of a batch."""
        return self.batch or self.recipe.batch

    @property
    def time(self) -> int:
        """Tokens of a sequence."""
        return self.seq or self.recipe.seq


@dataclass(frozen=True)
class Conversion:
    """What a conversion gave.

    Attributes:
        teacher, student: both models.
        placement: the new mixer by layer, as `transplant` takes it.
        teacher_perplexity, student_perplexity: on the same held-out windows.
        seconds: wall time of this call.
    """

    teacher: LoadedModel
    student: Stack
    placement: Mapping[int, Mapping[str, Any]]
    teacher_perplexity: Perplexity
    student_perplexity: Perplexity
    seconds: float


@dataclass(frozen=True)
class Surroundings:
    """What decides nothing of the result: where, how often, and who is told.

    Attributes:
        device: where to train; on a GPU in bfloat16 over float32 weights.
        machine: how the work is laid out there.
        habits: how often to log and save.
        display: told about the progress of each stage.
        say: told one line about each thing that is settled.
        report: given the conversion before the run counts as finished, so that a resumed run reports too.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine: Machine = field(default_factory=Machine)
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
    settings.recipe.budgets(settings.tokens)  # refuses before anything is loaded
    loaded = load_model(settings.teacher, dtype=torch.float32, device=here.device)
    if loaded.tokenizer is None:
        raise ConfigError(f"{settings.teacher}: expected a tokenizer beside the weights, got none; add its files")
    teacher = loaded.model.requires_grad_(False)
    source = _source(settings, loaded, here)
    placement = placed(settings, source)
    if settings.time > teacher.config.max_positions:
        raise ConfigError(
            f"--seq {settings.time}: expected at most the teacher's {teacher.config.max_positions} positions; lower it"
        )
    here.say(describe(placement, len(source.blocks)))
    sources = _sources(settings, loaded, out, here)
    _warn_of_overlap(settings, sources, loaded, here)
    held_out = held_out_text(
        sources, loaded.tokenizer, fraction=settings.held_out, chars=settings.eval_tokens * CHARS_A_TOKEN
    )
    text = tokenize_text(loaded.tokenizer, held_out, settings.eval_tokens)
    with Streams(settings, sources, loaded) as streams:
        streams(settings.time)  # its thread works while the student is made
        share = settings.recipe.layerwise(settings.tokens)
        if facts is None:
            stats = None
            if settings.measure_tokens:
                here.say(f"measuring the attention of {len(placement)} layers on {settings.measure_tokens:,} tokens")
                batches = -(-settings.measure_tokens // (settings.rows * settings.time))
                with Streams(settings, sources, loaded) as sample:
                    tokens = [batch.tokens_bt for batch in islice(sample(settings.time), batches)]
                stats = measure(source, tokens, sorted(placement))
            student = transplant(source, placement, stats=stats, share=share)
            facts = {
                "settings": config_to_dict(settings),
                "versions": versions(here.device),
                "teacher": {"name": loaded.name, "license": loaded.license},
                "layers": {str(i): student.config.layers[i] for i in placement},
            }
            folder.log.unlink(missing_ok=True)
            folder.note(**facts)
        else:
            student = rebuild(source, {int(i): layer for i, layer in facts["layers"].items()}, share=share)
        fit(
            Models(teacher, student, sorted(placement), source),
            streams,
            settings.recipe,
            folder,
            tokens=settings.tokens,
            seq=settings.time,
            resume=resume,
            machine=here.machine,
            habits=here.habits,
            display=here.display,
        )
    here.say(f"evaluating on {len(text.ids_n):,} held-out tokens")
    context = min(settings.time, len(text.ids_n))
    scores = [
        perplexity(m, text, context, batch=settings.rows, progress=_shown(here.display, name, context))
        for name, m in (("teacher", teacher), ("student", student))
    ]
    folder.note(evaluation=_evaluation(*scores))
    save_pretrained(student, out, loaded.tokenizer, _card(settings, loaded, placement, folder.facts()))
    conversion = Conversion(loaded, student, placement, *scores, seconds=time.monotonic() - began)
    here.report(conversion)
    folder.note(finished=True)
    folder.checkpoint.unlink(missing_ok=True)
    return conversion


def placed(settings: Settings, source: Stack) -> dict[int, Mapping[str, Any]]:
    """The new mixer of each converted layer, with its options, as `transplant` takes it.

    Raises:
        ConfigError: as in `place`, `parse_options` and `place_heads`.
    """
    n_layers = len(source.blocks)
    slugs = settings.mixers or settings.recipe.mixers
    # A recipe's options are for its own mixers.
    options = settings.options if settings.mixers else (*settings.recipe.options, *settings.options)
    if settings.heads is not None:
        if len(slugs) != 1 or ":" in slugs[0] or settings.layers is not None:
            got = f"{', '.join(slugs) or 'none'} and {settings.layers or 'no layers'}"
            raise ConfigError(
                f"--heads: expected one --mixer for the heads that go, and no --layers, got {got}; leave the others out"
            )
        kept = {int(i): heads for i, heads in settings.heads.items()}
        counts = [attention_of(source, i).config.n_kv_heads for i in range(n_layers)]
        return place_heads(counts, kept, slugs[0], parse_options(options, slugs)[slugs[0]])
    keep = settings.keep if settings.keep is not None or settings.layers is not None else settings.recipe.keep
    if settings.recipe.place == "chosen" and settings.layers is None and keep:
        raise ConfigError(
            f"--keep {keep:g}: this recipe's heads are chosen, expected --heads FILE, got none; make it with: subquad "
            f"inspect heads {settings.start or settings.teacher} --keep {keep:g} --search greedy --json heads.json; or "
            "name --layers"
        )
    chosen = place(n_layers, slugs, layers=settings.layers, keep=keep)
    by_slug = parse_options(options, sorted(set(chosen.values())))
    return {i: {"mixer": slug, **by_slug[slug]} for i, slug in chosen.items()}


class Streams:
    """The run's streams by length of their sequences, each as many tokens a batch; closed together."""

    def __init__(self, settings: Settings, sources: list[Source], loaded: LoadedModel) -> None:
        self.settings, self.sources, self.loaded = settings, sources, loaded
        self._open: dict[int, TokenStream] = {}

    def __call__(self, seq: int) -> TokenStream:
        """The stream of sequences of `seq` tokens."""
        if seq not in self._open:
            self._open[seq] = TokenStream(
                self.sources,
                self.loaded.tokenizer,
                batch=max(1, self.settings.rows * self.settings.time // seq),
                time=seq,
                seed=self.settings.seed,
                fraction=self.settings.held_out,
            )
        return self._open[seq]

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._open.values():
            stream.close()


def _source(settings: Settings, loaded: LoadedModel, here: Surroundings) -> Stack:
    """The model to convert: the teacher, or a smaller one that speaks its tokens."""
    if settings.start is None:
        return loaded.model
    start = load_model(settings.start, dtype=torch.float32, device=here.device)
    check_pair(loaded, start)
    return start.model.requires_grad_(False)


def _warn_of_overlap(settings: Settings, sources: list[Source], loaded: LoadedModel, here: Surroundings) -> None:
    if settings.eval_texts:
        here.say(f"looking for {', '.join(settings.eval_texts)} in the data")
        texts = {spec: read_text(spec, loaded.tokenizer, OVERLAP_CHARS) for spec in settings.eval_texts}
        for found in check_overlap(sources, texts):
            here.say(f"warning: {found}")


def _shown(display: Display | None, name: str, context: int) -> Callable[[int, int], None]:
    """Tokens done and in all, as a `Display` shows them."""
    began = time.monotonic()

    def show(done: int, total: int) -> None:
        if display is not None:
            seconds = time.monotonic() - began
            pace = done / max(seconds, 1e-9)
            display(Progress(name, done // context, done, seconds, done / total, float("nan"), pace))

    return show


def describe(placement: Mapping[int, Mapping[str, Any]], n_layers: int) -> str:
    """The placement in words: which layers go where, and which stay."""
    by_slug: dict[str, list[int]] = {}
    for i, options in placement.items():
        by_slug.setdefault(options["mixer"], []).append(i)
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
    """Dotted names and plain values; what stands in a list and has a name is called by it."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            for item in value:
                out |= _flat(item, f"{prefix}{item['name']}.")
        elif isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _sources(settings: Settings, loaded: LoadedModel, out: Path, here: Surroundings) -> list[Source]:
    if not settings.data:
        raise ConfigError(
            "expected --data, got none; give --data FILE, --data pydoc, or --data self for no data at all"
        )
    sources: list[Source] = []
    for spec in settings.data:
        if not is_own(spec):
            sources.append(parse_source(spec))
            continue
        documents = settings.samples or _documents(settings)
        here.say(f"{spec}: up to {documents} documents of at most {settings.time} tokens from the teacher")
        sources.append(
            own_samples(
                spec,
                loaded.model,
                loaded.tokenizer,
                out,
                documents=documents,
                length=settings.time,
                seed=settings.seed,
                display=here.display,
            )
        )
    return sources


def _documents(settings: Settings) -> int:
    budgets = settings.recipe.budgets(settings.tokens).values()
    tokens = sum(budget.tokens for budget in budgets if budget.tokens is not None)
    return max(64, -(-tokens // settings.time)) if tokens else 256


def _evaluation(teacher: Perplexity, student: Perplexity) -> dict[str, Any]:
    def one(scores: Perplexity) -> dict[str, Any]:
        buckets = [[b.start, b.stop, b.nll] for b in scores.by_position()]
        return {"perplexity": dataclasses.asdict(scores.perplexity), "nll_by_position": buckets}

    ratio = dataclasses.asdict(perplexity_ratio(student, teacher))
    shape = {"context": teacher.context, "windows": teacher.windows}
    return shape | {"teacher": one(teacher), "student": one(student), "ratio": ratio}


def _card(
    settings: Settings, loaded: LoadedModel, placement: Mapping[int, Mapping[str, Any]], facts: Mapping[str, Any]
) -> ModelCard:
    evaluation = facts["evaluation"]
    where = f"held-out text, context {evaluation['context']}, {evaluation['windows']} windows"
    figures = {
        f"perplexity of the {who}, {where}": evaluation[who]["perplexity"]["value"] for who in ("teacher", "student")
    }
    recipe = {
        k: v for k, v in _flat(config_to_dict(settings)).items() if v is not None and k not in ("teacher", "data")
    }
    return ModelCard(
        name=f"{loaded.name} with {', '.join(sorted({options['mixer'] for options in placement.values()}))}",
        teacher=settings.teacher,
        license=loaded.license or "",
        data=", ".join(settings.data),
        recipe=recipe,
        evaluation=figures,
    )
