"""A whole conversion: teacher in, trained student, log, evaluation and report out."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import subquad
from subquad.convert.transplant import rebuild, transplant
from subquad.convert.transplant.calibrate import calibrate
from subquad.convert.transplant.checks import check_caches, check_positions, check_settings
from subquad.convert.transplant.measure import attention_of, measure
from subquad.convert.transplant.placement import parse_options, place, place_heads
from subquad.convert.transplant.samples import is_own, own_samples
from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError
from subquad.data import Source, TokenStream, held_out_text, parse_source
from subquad.data.overlap import Overlap, check_overlap
from subquad.evals.perplexity import Perplexity, perplexity, perplexity_ratio
from subquad.evals.text import CHARS_A_TOKEN, TextTokens, read_text, tokenize_text
from subquad.mixers.attention import Attention
from subquad.models.card import ModelCard
from subquad.models.checkpoint import check_target, save_pretrained
from subquad.models.load import check_pair, load_model
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Display, Habits, Progress, stopping_at_once
from subquad.train.parallel import Processes
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import PLAIN, Recipe
from subquad.train.stages import Machine

Say = Callable[[str], None]
# Of an evaluation text, looked for in the data.
OVERLAP_CHARS = 10_000_000
# Of the evaluation at the end, at least: fewer give its figures no interval worth the name.
EVAL_WINDOWS = 8


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
        heads_of: how many key/value heads each attention layer of the model has that they were chosen for, where known.
        options: as in `parse_options`; they go before the recipe's own, which are for its own mixers.
        start: the model to convert and train, as `load_model` takes it; None is the teacher.
        samples: how many documents of the teacher's own; None is as many as the budget asks for, or 256.
        held_out: share of the documents kept for evaluation.
        batch, seq: sequences of a batch, tokens of a sequence.
        seed: of shuffles and samples.
        measure_tokens: tokens over which the attention is measured before the start; 0 is data-free.
        eval_tokens: held-out tokens for the evaluation at the end.
        eval_context: tokens of its windows; None is as many as leave 8 windows, `seq` at most.
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
    heads_of: Mapping[str, int] | None = None
    options: tuple[str, ...] = ()
    start: str | None = None
    samples: int | None = None
    held_out: float = 0.05
    batch: int | None = None
    seq: int | None = None
    seed: int = 0
    measure_tokens: int = 8192
    eval_tokens: int = 8192
    eval_context: int | None = None
    eval_texts: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Sequences of a batch."""
        return self.batch or self.recipe.batch

    @property
    def time(self) -> int:
        """Tokens of a sequence."""
        return self.seq or self.recipe.seq

    def rows_of(self, seq: int) -> int:
        """Sequences of `seq` tokens that make as many tokens as a batch."""
        return max(1, self.rows * self.time // seq)

    def lengths(self) -> dict[str, int]:
        """Tokens of a sequence in each phase that has a budget.

        Raises:
            ConfigError: as in `Recipe.budgets`.
        """
        budgets = self.recipe.budgets(self.tokens)
        return {phase.name: phase.seq or self.time for phase in self.recipe.phases if phase.name in budgets}


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
        processes: that convert together, on `device` this one; all of them call `convert`, and all get the result. The
            first one alone writes, samples, evaluates and tells. None is this one alone.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    machine: Machine = field(default_factory=Machine)
    habits: Habits | None = None
    display: Display | None = None
    say: Say = lambda line: None
    report: Callable[[Conversion], None] = lambda conversion: None
    processes: Processes | None = None

    @property
    def together(self) -> Processes:
        """All processes of the run."""
        return self.processes or Processes(self.device)


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
    if not here.together.main:  # one of them tells
        here = dataclasses.replace(here, display=None, say=Surroundings().say)
    with stopping_at_once(out):
        return _convert(settings, out, resume, here)


def _convert(settings: Settings, out: Path, resume: bool, here: Surroundings) -> Conversion:
    began, everyone = time.monotonic(), here.together
    everyone.first(lambda: check_target(out))  # now, and not after hours of training
    folder = everyone.ahead(lambda: RunFolder(out))
    facts = everyone.first(lambda: _open(folder, settings, resume, here))
    resume = facts is not None
    check_settings(settings)  # before anything is loaded
    for seq in settings.lengths().values():
        everyone.parts(settings.rows_of(seq))
    loaded = everyone.ahead(lambda: load_model(settings.teacher, dtype=torch.float32, device=here.device))
    if loaded.tokenizer is None:
        raise ConfigError(f"{settings.teacher}: expected a tokenizer beside the weights, got none; add its files")
    teacher = loaded.model.requires_grad_(False)
    source = everyone.ahead(lambda: _source(settings, loaded, here))
    placement = placed(settings, source)
    check_positions(settings, {"the teacher": teacher, "--start": source})
    here.say(describe(placement, len(source.blocks)))
    for line in settings.recipe.schedule(settings.tokens, settings.time):
        here.say(line)
    sources = everyone.ahead(lambda: _sources(settings, loaded, out, here))
    overlap = [] if resume else everyone.first(lambda: _overlap(settings, sources, loaded, here))
    text = everyone.first(lambda: _held_out(settings, sources, loaded))
    with Streams(settings, sources, loaded) as streams:
        check_caches(settings, loaded, streams)
        streams(settings.time)  # its thread works while the student is made
        share = settings.recipe.layerwise(settings.tokens)
        if facts is None:
            stats = None
            if settings.measure_tokens:
                here.say(f"measuring the attention of {len(placement)} layers on {settings.measure_tokens:,} tokens")
                with Streams(settings, sources, loaded) as sample:
                    tokens_bt = _some(sample(settings.time), -(-settings.measure_tokens // settings.time))
                stats = measure(source, [tokens_bt], sorted(placement))
            student = transplant(source, placement, stats=stats, share=share)
            calibration: dict[str, Any] = {}
            if stats is not None and settings.recipe.calibrate:
                here.say("calibrating each layer on a part of them")
                found = calibrate(student, source, placement, stats)
                calibration = {str(i): dataclasses.asdict(gained) for i, gained in found.items()}
                before, after = (fmean(x) for x in zip(*((g.before, g.after) for g in found.values()), strict=True))
                here.say(f"relative error of a layer, in the mean: {before:.3f} before, {after:.3f} after")
            facts = {
                "settings": config_to_dict(settings),
                "versions": versions(here.device),
                "teacher": {"name": loaded.name, "license": loaded.license},
                "layers": {str(i): student.config.layers[i] for i in placement},
                "calibration": calibration,
                "overlap": [dataclasses.asdict(one) for one in overlap],
            }
            if everyone.main:
                folder.log.unlink(missing_ok=True)
                folder.note(**facts)
        else:
            student = rebuild(source, {int(i): layer for i, layer in facts["layers"].items()}, share=share)
        for i in placement:
            everyone.same_(student.blocks[i].mixer.state_dict().values())
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
            say=here.say,
            processes=everyone,
        )
    here.say(f"evaluating on {len(text.ids_n):,} held-out tokens")
    context = settings.eval_context or max(min(settings.time, len(text.ids_n) // EVAL_WINDOWS), 2)
    scores = everyone.first(
        lambda: [
            perplexity(m, text, context, batch=settings.rows, progress=_shown(here.display, name, context))
            for name, m in (("teacher", teacher), ("student", student))
        ]
    )
    conversion = Conversion(loaded, student, placement, *scores, seconds=time.monotonic() - began)

    def finish() -> None:
        folder.note(training=_spent(folder, here.habits or Habits()), evaluation=_evaluation(*scores))
        save_pretrained(student, out, loaded.tokenizer, _card(settings, loaded, placement, folder.facts()))
        here.report(conversion)
        folder.note(finished=True)
        folder.checkpoint.unlink(missing_ok=True)

    everyone.first(finish)
    return conversion


def placed(settings: Settings, source: Stack) -> dict[int, Mapping[str, Any]]:
    """The new mixer of each converted layer, with its options, as `transplant` takes it.

    Raises:
        ConfigError: as in `place`, `parse_options` and `place_heads`, or heads that were chosen for another model.
        UnsupportedError: a mixer without a mapping from attention, or a layer that is no attention.
    """
    n_layers = len(source.blocks)
    slugs = settings.mixers or settings.recipe.mixers

    def options(used: Collection[str]) -> dict[str, dict[str, Any]]:
        # A recipe's are for its own mixers, whoever named them.
        own = parse_options(settings.recipe.options, settings.recipe.mixers)
        given = parse_options(settings.options, used)
        return {slug: own.get(slug, {}) | given[slug] for slug in used}

    if settings.heads is not None:
        if len(slugs) != 1 or ":" in slugs[0] or settings.layers is not None:
            got = f"{', '.join(slugs) or 'none'} and {settings.layers or 'no layers'}"
            raise ConfigError(
                f"--heads: expected one --mixer for the heads that go, and no --layers, got {got}; leave the others out"
            )
        kept = {int(i): heads for i, heads in settings.heads.items()}
        mixers = [block.mixer for block in source.blocks]
        counts = [mixer.config.n_kv_heads if isinstance(mixer, Attention) else 0 for mixer in mixers]
        there = {i: count for i, count in enumerate(counts) if count}
        if settings.heads_of is not None and there != {int(i): count for i, count in settings.heads_of.items()}:
            raise ConfigError(
                f"--heads: expected a choice for {sum(counts)} key/value heads in {len(there)} attention layers, got "
                f"one for {sum(settings.heads_of.values())} in {len(settings.heads_of)}; use a file made for this model"
            )
        return place_heads(counts, kept, slugs[0], options(slugs)[slugs[0]])
    keep = settings.keep if settings.keep is not None or settings.layers is not None else settings.recipe.keep
    if settings.recipe.place == "chosen" and settings.layers is None and keep:
        raise ConfigError(
            f"--keep {keep:g}: this recipe's heads are chosen, expected --heads FILE, got none; make it with: subquad "
            f"inspect heads {settings.start or settings.teacher} --keep {keep:g} --search greedy --json heads.json; or "
            "name --layers"
        )
    chosen = place(n_layers, slugs, layers=settings.layers, keep=keep)
    for i in chosen:
        attention_of(source, i)  # refuses now what `transplant` would, and not behind hours of samples
    by_slug = options(sorted(set(chosen.values())))
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
                batch=self.settings.rows_of(seq),
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


def _overlap(settings: Settings, sources: list[Source], loaded: LoadedModel, here: Surroundings) -> list[Overlap]:
    """What each source holds of each evaluation text."""
    if not settings.eval_texts:
        return []
    here.say(f"looking for {', '.join(settings.eval_texts)} in the data")
    texts = {spec: read_text(spec, loaded.tokenizer, OVERLAP_CHARS) for spec in settings.eval_texts}
    found = check_overlap(sources, texts)
    for one in found:
        here.say(f"warning: {one}" if one.found else f"{one.text} is not in {one.source}: {one.figure}")
    return found


def _held_out(settings: Settings, sources: list[Source], loaded: LoadedModel) -> TextTokens:
    """What no training sees, for the evaluation at the end."""
    chars = settings.eval_tokens * CHARS_A_TOKEN
    text = held_out_text(sources, loaded.tokenizer, fraction=settings.held_out, chars=chars)
    return tokenize_text(loaded.tokenizer, text, settings.eval_tokens)


def _some(stream: TokenStream, rows: int) -> Tensor:
    """``[rows, t]``: the first sequences of a stream."""
    return torch.cat([batch.tokens_bt for batch in islice(stream, -(-rows // stream.batch))])[:rows]


def _spent(folder: RunFolder, habits: Habits) -> dict[str, float]:
    """Tokens, minutes and, where a price is known, cost of all stages."""
    stages = folder.spent().values()
    seconds = sum(of_stage for _, of_stage in stages)
    spent: dict[str, float] = {"tokens": sum(tokens for tokens, _ in stages), "minutes": seconds / 60}
    return spent if habits.price_per_hour is None else spent | {"cost": habits.price_per_hour * seconds / 3600}


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


def _open(folder: RunFolder, settings: Settings, resume: bool, here: Surroundings) -> dict[str, Any] | None:
    """The facts of the run to resume, or None for a new one, or one that was stopped before its first checkpoint."""
    facts = folder.facts()
    if not resume:
        if folder.checkpoint.exists() or facts.get("finished"):
            raise ConfigError(f"--out {folder.path}: holds a run already; give --resume to go on, or another folder")
        return None
    if facts.get("finished"):
        raise ConfigError(f"--resume: the run in {folder.path} is finished; look at it with subquad eval {folder.path}")
    if not facts and not folder.checkpoint.exists():
        here.say(f"nothing to resume in {folder.path} yet: starting at the beginning")
        return None
    was, now = _flat(facts.get("settings", {})), _flat(config_to_dict(settings))
    changed = [f"{k} {was.get(k)} (now {now.get(k)})" for k in sorted(was | now) if was.get(k) != now.get(k)]
    if changed:
        raise ConfigError(
            f"--resume: expected the settings of the run, got others: {', '.join(changed)}; give the same"
        )
    if not folder.checkpoint.exists():
        here.say(f"no checkpoint in {folder.path} yet: starting at the beginning")
        return None
    folder.load()  # now, and not after the teacher
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
    figures: dict[str, Any] = {
        f"perplexity of the {who}, {where}": evaluation[who]["perplexity"]["value"] for who in ("teacher", "student")
    }
    for one in (Overlap(**found) for found in facts.get("overlap", ())):
        figures[f"of {one.text} in the training data {one.source}"] = one.figure
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
