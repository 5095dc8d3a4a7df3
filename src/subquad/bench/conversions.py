"""What a step of each phase of a recipe costs, against a plain training step of the teacher."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch

from subquad.bench.harness import Bench
from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import parse_options, place
from subquad.data import Batch, TokenStream
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.precision import autocast
from subquad.train.recipe import Recipe
from subquad.train.stages import StudentStage, Work, make_stage
from subquad.train.stages.stepwise import halfway


class Tokens:
    """The same random batch over and over."""

    seed = 0

    def __init__(self, batch: int, time: int, vocab_size: int) -> None:
        self.batch, self.time = batch, time
        self.tokens_bt = torch.randint(vocab_size, (batch, time))

    def __next__(self) -> Batch:
        """The batch."""
        return Batch(self.tokens_bt)

    def state_dict(self) -> dict[str, int]:
        """There is no position."""
        return {}


def measure(bench: Bench, recipe: Recipe) -> None:
    """Steps of the recipe's phases on layers of SmolLM2-135M's shape.

    Args:
        bench: takes a row for each phase, named after it.
        recipe: its phases run at the sequence length of the bench.
    """
    n, d, mlp, vocab = bench.size((4, 576, 1536, 49_152), smoke=(2, 32, 64, 128))
    h, g, k = bench.size((9, 3, 64), smoke=(4, 2, 8))
    b, t = bench.size((2, 1024), smoke=(2, 80))
    shape = {"b": b, "t": t, "layers": n, "d": d, "h": h, "g": g, "k": k, "vocab": vocab}
    layer = {"mixer": "attention", "n_heads": h, "n_kv_heads": g, "head_dim": k, "rotary": {"theta": 1e5, "dim": k}}
    teacher = Stack(ModelConfig(vocab, d, mlp, (layer,) * n, tied=True)).to(bench.device).requires_grad_(False)
    keep = 0.5 if recipe.keep is None else recipe.keep
    layers = place(n, recipe.mixers, keep=keep)
    options = parse_options(recipe.options, recipe.mixers)
    student = transplant(teacher, {i: {"mixer": slug, **options[slug]} for i, slug in layers.items()})
    stream = cast("TokenStream", Tokens(b, t, vocab))
    tokens_bt, back = next(stream).tokens_bt.to(bench.device), halfway(student, teacher, list(layers))
    bench.gate("what is not converted is the teacher's", back.hidden(tokens_bt), teacher.hidden(tokens_bt), rtol=0.0)

    def work(of: Stack) -> Work:
        return Work(teacher, teacher, of, tuple(layers), stream)

    plain = make_stage("supervise", work(transplant(teacher, {})), {})
    for phase in recipe.phases:
        stage = make_stage(phase.stage, work(student), phase.options)
        bench.compare(
            f"{phase.name}.step",
            partial(step, bench, stage),
            partial(step, bench, plain),
            baseline_name="a plain training step of the teacher",
            tokens=b * t,
            shape=shape | {"mixer": ", ".join(recipe.mixers), "stage": phase.stage},
        )
        stage.finish()
        student.zero_grad(set_to_none=True)


def step(bench: Bench, stage: StudentStage) -> None:
    """Gradients of one batch."""
    with autocast(bench.device):
        stage.step()
