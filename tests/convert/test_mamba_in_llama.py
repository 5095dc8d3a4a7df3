"""The published layers, losses and order; in a run only new mixers move."""

import pytest
import torch

from subquad.convert.mamba_in_llama import RECIPE
from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import parse_options, place
from subquad.core.layout import Layout
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.losses import token_cross_entropy, token_kl
from subquad.train.stages.stepwise import first

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


def test_layers_are_the_published_ones():
    layers = sorted(place(32, RECIPE.mixers, keep=RECIPE.keep))
    assert layers == list(range(0, 32, 2))
    assert first(layers, RECIPE.phases[0].options["converted"]) == list(range(0, 32, 4))
    assert RECIPE.phases[1].options["converted"] == 1.0


def test_settings_are_the_published_ones():
    half, whole, last = RECIPE.phases
    assert (half.rate.lr, half.rate.betas, half.rate.clip, half.rate.schedule) == (8e-5, (0.9, 0.98), 0.1, "cosine")
    assert whole.rate == half.rate and last.rate.lr == 2e-5
    assert (RECIPE.batch, RECIPE.seq) == (64, 2048)
    assert set(RECIPE.budgets(1000)) == {"half", "all"}, "supervised training waits for tokens of its own"


def test_the_weight_of_the_labels_is_that_of_the_published_sum():
    """0.1 x (KL summed over a sequence of 2,048) + 1 x (mean cross-entropy), up to a common factor."""
    torch.manual_seed(0)
    t, d, v = 2048, 8, 11
    student, teacher, head = torch.randn(1, t, d), torch.randn(1, t, d), torch.randn(v, d)
    tokens, layout = torch.randint(v, (1, t)), Layout.dense(1, t)
    logits, targets = (x[0, :-1] @ head.T for x in (student, teacher))
    summed = torch.nn.functional.kl_div(logits.log_softmax(-1), targets.softmax(-1), reduction="sum")
    cross = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    published = 0.1 * summed + cross
    kl = token_kl(student, head, teacher, head, layout)
    ours = kl + RECIPE.phases[0].options["labels"] * token_cross_entropy(student, head, tokens, layout)
    # A sequence has 2,047 labels, not 2,048.
    assert float(published / ours) == pytest.approx(204.8, rel=1e-3)


def test_the_mixer_has_what_the_published_one_has():
    teacher = Stack(ModelConfig(64, 32, 48, (LAYER,) * 2)).requires_grad_(False)
    options = parse_options(RECIPE.options, ["mamba2"])["mamba2"]
    mixer = transplant(teacher, {0: {"mixer": "mamba2", **options}}).blocks[0].mixer
    config = mixer.config
    assert (config.activation, config.write, config.conv_width, config.rotary) == ("silu", "dt", 4, None)
    assert (config.n_heads, config.n_kv_heads, config.key_dim, config.value_dim) == (4, 2, 8, 8)
    source = teacher.blocks[0].mixer.weights()
    torch.testing.assert_close(mixer.qkv.v_proj.weight, source.v_weight)
    torch.testing.assert_close(mixer.qkv.k_proj.weight, source.k_weight)
    torch.testing.assert_close(mixer.qkv.q_proj.weight, source.q_weight * source.scale)
    torch.testing.assert_close(mixer.out_proj.weight, source.o_weight)
