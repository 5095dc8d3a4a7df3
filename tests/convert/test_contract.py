"""The contract of a recipe, run over every registered one: it converts, its phases learn, and a stopped run goes on."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from subquad.cli import main
from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import parse_options, place
from subquad.core.errors import ConfigError
from subquad.core.registry import load, methods
from subquad.data import TokenStream, parse_source
from subquad.models.load import load_model
from subquad.train.checkpoint import RunFolder
from subquad.train.display import Line
from subquad.train.optimiser import Rate
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import Phase, Recipe

RECIPES = [slug for slug, card in methods("convert").items() if card.entry == "RECIPE"]
SEQ, BATCH, STEPS = 144, 2, 3


def arguments(slug, teacher, text, out):
    """A command that runs every phase for a few steps."""
    recipe = load("convert", slug)
    command = ["convert", teacher, "--out", str(out), "--recipe", slug, "--data", str(text), "--no-compile"]
    command += ["--batch", str(BATCH), "--seq", str(SEQ), "--measure-tokens", "384", "--eval-tokens", "192"]
    command += ["--held-out", "0.2"]
    if any(option.startswith("window=") for option in recipe.options):  # shorter than the text
        command += ["--set", "window=32"]
    # Where heads are chosen, somebody has to choose.
    kept = ["--layers", "0"] if recipe.place == "chosen" else ["--keep", str(recipe.keep)]
    command += ["--keep", "0.5"] if recipe.keep is None else kept
    for phase in recipe.phases:
        command += ["--stage", f"{phase.name}.tokens={STEPS * BATCH * SEQ}"]
        if phase.seq is not None:
            command += ["--stage", f"{phase.name}.seq={SEQ}"]
    return command


def test_there_are_recipes():
    assert {"best", "lolcats", "mamba_in_llama", "mohawk", "radlads"} <= set(RECIPES)


@pytest.mark.parametrize("slug", RECIPES)
def test_it_is_data(slug):
    recipe = load("convert", slug)
    assert isinstance(recipe, Recipe) and recipe.phases
    shares = [phase.share for phase in recipe.phases if phase.share is not None]
    assert math.isclose(sum(shares), 1.0)
    known = methods("mixers")
    assert all(known[mixer].from_attention for mixer in recipe.mixers)
    if recipe.mixers:
        parse_options(recipe.options, recipe.mixers)


@pytest.mark.parametrize("slug", RECIPES)
def test_its_command_runs_every_phase_and_a_stopped_run_ends_as_a_whole_one(
    slug, tiny_teacher, tiny_text, tmp_path, monkeypatch, capfd
):
    recipe = load("convert", slug)
    whole, broken = (arguments(slug, tiny_teacher, tiny_text, tmp_path / name) for name in ("whole", "broken"))
    assert main(whole) == 0, capfd.readouterr().err
    lines = RunFolder(tmp_path / "whole").lines()
    assert [line["stage"] for line in lines] == [p.name for p in recipe.phases for _ in range(STEPS)]
    assert all(math.isfinite(line["loss"]) for line in lines)
    student, teacher = load_model(tmp_path / "whole").model, load_model(tiny_teacher).model
    kinds = [layer["mixer"] for layer in student.config.layers]
    assert len([kind for kind in kinds if kind not in ("attention", "parallel")]) or "parallel" in kinds
    assert student.config.layers != teacher.config.layers

    last = recipe.phases[-1].name
    plain = Line.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            Line,
            "__call__",
            lambda self, p: os.kill(os.getpid(), signal.SIGINT) if (p.stage, p.step) == (last, 2) else plain(self, p),
        )
        assert main(broken) != 0
    assert "--resume" in capfd.readouterr().err
    assert main([*broken, "--resume"]) == 0, capfd.readouterr().err
    again = RunFolder(tmp_path / "broken").lines()
    assert [(x["stage"], x["step"], x["loss"]) for x in again] == [(x["stage"], x["step"], x["loss"]) for x in lines]
    tokens = torch.randint(300, (1, 40))
    assert torch.equal(load_model(tmp_path / "broken").model(tokens), student(tokens))


@pytest.mark.parametrize("slug", RECIPES)
def test_every_phase_learns(slug, tiny_teacher, tiny_text, tmp_path):
    """At a rate for a tiny model and from a disturbed start, the loss of the phases falls."""
    recipe = load("convert", slug)
    loaded = load_model(tiny_teacher, dtype=torch.float32)
    teacher = loaded.model.requires_grad_(False)
    keep = recipe.keep if recipe.keep is not None else 0.5
    chosen = place(4, recipe.mixers, keep=keep)
    options = parse_options(recipe.options, recipe.mixers)
    student = transplant(teacher, {i: {"mixer": slug, **options[slug]} for i, slug in chosen.items()})
    torch.manual_seed(1)
    with torch.no_grad():
        # A window about as long as the text is its teacher from the start, and would have nothing to learn.
        for i in chosen:
            for parameter in student.blocks[i].mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    phases = tuple(
        dataclasses.replace(
            p, rate=dataclasses.replace(p.rate, lr=1e-2, warmup=0.1), share=None, tokens=25 * BATCH * SEQ
        )
        for p in recipe.phases
    )
    streams = {}

    def stream(seq):
        if seq not in streams:
            streams[seq] = TokenStream([parse_source(str(tiny_text))], loaded.tokenizer, batch=BATCH, time=SEQ)
        return streams[seq]

    folder = RunFolder(tmp_path)
    fit(Models(teacher, student, sorted(chosen)), stream, dataclasses.replace(recipe, phases=phases), folder)
    for phase in phases:
        losses = [line["loss"] for line in folder.lines() if line["stage"] == phase.name]
        assert len(losses) == 25
        # One that may touch a few parameters only can't mend what the noise broke elsewhere, but breaks nothing either.
        assert sum(losses[-5:]) < (1.0 if phase.train == ("*",) or phase is phases[-1] else 1.1) * sum(losses[:5])
    for one in streams.values():
        one.close()


def test_a_phase_out_of_order_is_refused():
    for kind in ("matrix", "align"):
        with pytest.raises(ConfigError, match=f"recipe: expected phase {kind} before distill, got it after"):
            Recipe((Phase("distill", Rate(1e-3)), Phase(kind, Rate(1e-3))))


def test_a_run_is_not_resumed_with_another_recipe(tiny_teacher, tiny_text, tmp_path, monkeypatch, capfd):
    command = arguments("mohawk", tiny_teacher, tiny_text, tmp_path)
    plain = Line.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            Line, "__call__", lambda self, p: os.kill(os.getpid(), signal.SIGINT) if p.step == 2 else plain(self, p)
        )
        assert main(command) != 0
    capfd.readouterr()
    other = arguments("radlads", tiny_teacher, tiny_text, tmp_path)
    assert main([*other, "--resume"]) == 2
    assert "--resume: expected the settings of the run, got others: " in capfd.readouterr().err
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["recipe"]["mixer"] == "mamba2"


def test_an_unknown_recipe_names_the_nearest(tiny_teacher, tmp_path, capfd):
    assert main(["convert", tiny_teacher, "--out", str(tmp_path / "o"), "--recipe", "mamba-in-lama"]) == 2
    assert "did you mean 'mamba_in_llama'?" in capfd.readouterr().err
