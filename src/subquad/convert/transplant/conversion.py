"""A whole conversion: teacher in, trained student, log, evaluation and report out."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import subquad
from subquad.convert.transplant import rebuild, transplant
from subquad.convert.transplant.calibrate import calibrate
from subquad.convert.transplant.checks import check_caches, check_positions, check_settings
from subquad.convert.transplant.inputs import Streams, first_rows, held_out, open_sources, overlap_with, source_model
from subquad.convert.transplant.measure import measure
from subquad.convert.transplant.placement import placed
from subquad.convert.transplant.settings import Conversion, Settings, Surroundings
from subquad.core.config import config_to_dict
from subquad.core.errors import ConfigError
from subquad.data.overlap import Overlap
from subquad.evals.perplexity import Perplexity, perplexity, perplexity_ratio
from subquad.models.card import ModelCard
from subquad.models.checkpoint import check_target, save_pretrained
from subquad.models.load import load_model
from subquad.models.teachers import LoadedModel
from subquad.train.checkpoint import RunFolder
from subquad.train.loop import Display, Habits, Progress, stopping_at_once
from subquad.train.pipeline import Models, fit

# Of the evaluation at the end, at least: fewer give its figures no interval worth the name.
EVAL_WINDOWS = 8


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
    source = everyone.ahead(lambda: source_model(settings, loaded, here))
    placement = placed(settings, source)
    check_positions(settings, {"the teacher": teacher, "--start": source})
    here.say(describe(placement, len(source.blocks)))
    for line in settings.recipe.schedule(settings.tokens, settings.time):
        here.say(line)
    sources = everyone.ahead(lambda: open_sources(settings, loaded, out, here))
    overlap = [] if resume else everyone.first(lambda: overlap_with(settings, sources, loaded, here))
    text = everyone.first(lambda: held_out(settings, sources, loaded))
    with Streams(settings, sources, loaded) as streams:
        check_caches(settings, loaded, streams)
        streams(settings.time)  # its thread works while the student is made
        share = settings.recipe.layerwise(settings.tokens)
        if facts is None:
            stats = None
            if settings.measure_tokens:
                here.say(f"measuring the attention of {len(placement)} layers on {settings.measure_tokens:,} tokens")
                with Streams(settings, sources, loaded) as sample:
                    tokens_bt = first_rows(sample(settings.time), -(-settings.measure_tokens // settings.time))
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
