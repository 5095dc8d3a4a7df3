"""Feature maps alone, then low-rank changes of four projections; everything else stays the teacher's."""

import dataclasses
from contextlib import closing

import torch

from subquad.convert.lolcats import RECIPE
from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import parse_options, place, place_heads
from subquad.data import TokenStream, parse_source
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.checkpoint import RunFolder
from subquad.train.pipeline import Models, fit
from subquad.train.stages import matching

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}

MAPS = ("k_map_weight", "k_map_bias", "q_map_weight", "q_map_bias", "q_map_fade")
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")


def test_settings_are_the_published_ones():
    transfer, adapt = RECIPE.phases
    assert sorted(place(32, RECIPE.mixers, keep=RECIPE.keep)) == list(range(32))
    options = parse_options(RECIPE.options, RECIPE.mixers)["windowed_linear"]
    assert options == {"window": 64, "sinks": 0, "features": 128}
    assert (transfer.rate.lr, adapt.rate.lr, transfer.share, adapt.share) == (1e-2, 1e-4, 0.5, 0.5)
    assert adapt.options == {"rank": 8, "alpha": 16.0}
    assert RECIPE.batch * RECIPE.seq == 8 * 1024


def test_adapters_are_found_where_some_heads_stay():
    """A layer that keeps some heads is `parallel`, and its parts have projections of their own."""
    teacher = Stack(ModelConfig(64, 32, 48, (LAYER,) * 2)).requires_grad_(False)
    student = transplant(teacher, place_heads([2, 2], {1: [0]}, "windowed_linear", {"window": 8, "features": 8}))
    found = matching((name for name, _ in student.named_parameters()), RECIPE.phases[1].train)
    parts = ("blocks.0.mixer.", "blocks.1.mixer.parts.0.", "blocks.1.mixer.parts.1.")
    assert sorted(found) == sorted(
        n for n, _ in student.named_parameters() if n.startswith(parts) and n.endswith(PROJECTIONS)
    )
    assert len(found) == 12


def test_what_each_phase_changes(tiny_teacher, tiny_text, tmp_path):
    loaded = load_model(tiny_teacher, dtype=torch.float32)
    teacher = loaded.model.requires_grad_(False)
    options = parse_options((*RECIPE.options, "window=8"), RECIPE.mixers)["windowed_linear"]
    student = transplant(teacher, {i: {"mixer": "windowed_linear", **options} for i in range(4)})
    start = {k: x.clone() for k, x in student.state_dict().items()}

    def run(phase):
        only = dataclasses.replace(phase, share=None, tokens=4 * 2 * 32)
        with closing(TokenStream([parse_source(str(tiny_text))], loaded.tokenizer, batch=2, time=32)) as stream:
            recipe = dataclasses.replace(RECIPE, phases=(only,))
            fit(Models(teacher, student, range(4)), lambda _: stream, recipe, RunFolder(tmp_path / phase.name))
        return {k: x.clone() for k, x in student.state_dict().items()}

    mapped = run(RECIPE.phases[0])
    assert {k for k in start if not torch.equal(start[k], mapped[k])} == {
        f"blocks.{i}.mixer.{name}" for i in range(4) for name in MAPS
    }
    adapted = run(RECIPE.phases[1])
    changed = {k for k in start if not torch.equal(mapped[k], adapted[k])}
    assert changed == {k for k in start if ".mixer." in k and k.endswith(PROJECTIONS)} and len(changed) == 16
    for k in changed:
        singular = torch.linalg.svdvals((adapted[k] - mapped[k]).double())
        # Four steps of a rank of 8: what is beyond is float32's rounding of the merged weight.
        assert singular[8:].max() < 1e-4 * singular[0] + 1e-6
