"""Which mixer goes into which layer, and with which options: the grammar of ``--mixer``, ``--layers``, ``--keep``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from subquad.convert.transplant.measure import attention_of
from subquad.convert.transplant.settings import Settings
from subquad.core.config import parse_field
from subquad.core.errors import ConfigError, UnsupportedError, nearest
from subquad.core.registry import load, methods
from subquad.mixers.attention import Attention
from subquad.models.stack import Stack


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


def place(
    n_layers: int, mixers: Sequence[str], *, layers: str | None = None, keep: float | None = None
) -> dict[int, str]:
    """Slug of the new mixer of each converted layer.

    Args:
        n_layers: of the teacher.
        mixers: ``SLUG`` or ``SLUG:LAYERS``. Those with layers of their own take these; the others share, in turn, the
            layers that `layers` names or that `keep` leaves.
        layers: the layers to convert, as in `parse_layers`.
        keep: share of all layers that stay attention, spread evenly.

    Raises:
        ConfigError: an unknown mixer or layer, a layer given twice, or layers named in two ways or in none.
        UnsupportedError: a mixer without a mapping from attention.
    """
    known = methods("mixers")
    placed: dict[int, str] = {}
    sharing: list[str] = []
    for spec in mixers:
        slug, colon, own = spec.partition(":")
        _check_mixer(spec, slug)
        if not colon:
            sharing.append(slug)
            continue
        for i in parse_layers(own, n_layers):
            if i in placed:
                raise ConfigError(f"--mixer {spec}: layer {i} already goes to {placed[i]}; name it once")
            placed[i] = slug
    if not mixers:
        raise ConfigError(f"expected --mixer SLUG, got none; known: {', '.join(known)}")
    if not sharing:
        if layers is not None or keep is not None:
            raise ConfigError("--layers, --keep: every --mixer names its layers; leave these out, or the layers there")
        return dict(sorted(placed.items()))
    if (layers is None) == (keep is None):
        got = "neither" if layers is None else "both"
        raise ConfigError(f"expected --layers or --keep for --mixer {sharing[0]}, got {got}; give one of them")
    chosen = spread(n_layers, keep) if keep is not None else parse_layers(layers or "", n_layers)
    free = [i for i in chosen if i not in placed]
    return dict(sorted((placed | {i: sharing[at % len(sharing)] for at, i in enumerate(free)}).items()))


def _check_mixer(spec: str, slug: str) -> None:
    known = methods("mixers")
    if slug not in known:
        raise ConfigError(f"--mixer {spec}: unknown mixer {slug!r}{nearest(slug, known)}")
    if not known[slug].from_attention:
        can = ", ".join(name for name, card in known.items() if card.from_attention)
        raise UnsupportedError(f"--mixer {spec}: expected one with a mapping from attention, got {slug}; take {can}")


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Layers of ``1,3,5-9``, ``odd``, ``even`` or ``all``, counted from 0.

    Raises:
        ConfigError: something else, or a layer that is not there.
    """
    words = {"all": range(n_layers), "odd": range(1, n_layers, 2), "even": range(0, n_layers, 2)}
    if text in words:
        return list(words[text])
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.strip().isdigit() or (dash and not last.strip().isdigit()):
            raise ConfigError(f"layers {text!r}: expected numbers like 1,3,5-9 or odd, even, all, got {part!r}")
        found += range(int(first), int(last if dash else first) + 1)
    for i in found:
        if i >= n_layers:
            raise ConfigError(
                f"layers {text!r}: expected 0 to {n_layers - 1}, got {i}; the model has {n_layers} layers"
            )
    if not found:
        raise ConfigError(f"layers {text!r}: expected at least one layer, got none; write 5-9, not 9-5")
    return sorted(set(found))


def spread(n_layers: int, keep: float) -> list[int]:
    """The layers to convert when a share `keep` of all, spread evenly, stays attention.

    Raises:
        ConfigError: a share that is none, or one that leaves nothing to convert.
    """
    kept = round(keep * n_layers)
    if not 0 <= keep < 1 or kept == n_layers:
        raise ConfigError(f"--keep {keep}: expected a share from 0 to below 1 that leaves a layer to convert; lower it")
    stay = {int((i + 0.5) * n_layers / kept) for i in range(kept)}
    return [i for i in range(n_layers) if i not in stay]


def place_heads(
    n_kv_heads: Sequence[int], kept: Mapping[int, Collection[int]], slug: str, options: Mapping[str, Any]
) -> dict[int, Mapping[str, Any]]:
    """The new mixer of each layer that gives up key/value heads, as `transplant` takes it.

    A layer that keeps all its heads is left out, one that keeps none becomes `slug`, and one that keeps some becomes
    ``parallel`` of attention in these and `slug` in the others.

    Args:
        n_kv_heads: of each layer of the teacher; 0 of one that is no attention, and stays as it is.
        kept: the heads that stay attention, by layer; of a layer that is not named none stays.
        slug: the mixer of the other heads.
        options: fields of its config.

    Raises:
        ConfigError: an unknown mixer, a layer or a head that is not there or named twice, or nothing to convert.
        UnsupportedError: a mixer without a mapping from attention.
    """
    _check_mixer(slug, slug)
    for i, heads in kept.items():
        there = range(n_kv_heads[i]) if 0 <= i < len(n_kv_heads) else range(0)
        if len(set(heads)) < len(heads) or not set(heads) <= set(there):
            raise ConfigError(
                f"heads to keep: expected layers below {len(n_kv_heads)} and their key/value heads, each once, "
                f"got {sorted(heads)} in layer {i}; use a file that was made for this model"
            )
    placed: dict[int, Mapping[str, Any]] = {}
    for i, n in enumerate(n_kv_heads):
        stay = sorted(kept.get(i, ()))
        go = [g for g in range(n) if g not in stay]
        if go and stay:
            parts = [{"mixer": "attention", "kv_heads": stay}, {"mixer": slug, "kv_heads": go, **options}]
            placed[i] = {"mixer": "parallel", "parts": parts}
        elif go:
            placed[i] = {"mixer": slug, **options}
    if not placed:
        raise ConfigError("heads to keep: expected a head that goes, got none; keep fewer")
    return placed


def parse_options(settings: Sequence[str], slugs: Collection[str]) -> dict[str, dict[str, Any]]:
    """Options by mixer of ``KEY=VALUE`` (for every mixer) and ``SLUG.KEY=VALUE``, checked against the configs.

    Args:
        settings: values are JSON, or else words.
        slugs: the mixers in use.

    Raises:
        ConfigError: a key that a mixer does not have, with the nearest one, or a value of another type.
    """
    out: dict[str, dict[str, Any]] = {slug: {} for slug in slugs}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE or MIXER.KEY=VALUE, got no '='; add the value")
        slug, dot, key = name.rpartition(".")
        if dot and slug not in out:
            raise ConfigError(f"--set {setting}: mixer {slug!r} is not in use{nearest(slug, out)}")
        for target in [slug] if dot else out:
            config = load("mixers", target).Config
            out[target][key] = parse_field(config, key, text, where=f"--set {setting}", but=("d_model",))
    return out
