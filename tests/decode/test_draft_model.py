"""What is particular to a model as drafter: its state holds only what stood, and it is refused where it can't serve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.decode.draft_model import DraftModel
from subquad.engine.draft import parse_drafter
from subquad.engine.generate import Generation, Limits, generate
from subquad.engine.sampler import History, Sampler, SamplingConfig
from subquad.engine.trace import Look
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

Models = Callable[[str], Stack]


@pytest.mark.parametrize("mixer", ["attention", "mamba2", "windowed_linear", "parallel"])
def test_a_model_that_guesses_for_itself_is_always_right(mixer: str, models: Models, prompts: list[list[int]]) -> None:
    """Greedy, in float64: every guess stands, so its state must be the model's own after any round."""
    model, looks = models(mixer), list[Look]()
    limits = Limits(max_new_tokens=15, end_tokens=[])
    expected = generate(model, prompts, limits=limits)
    got = generate(model, prompts, limits=limits, drafter=DraftModel(model), draft_tokens=4, on_look=looks.append)
    assert got == expected
    assert sum(look.kept for look in looks) == sum(look.guessed for look in looks)
    assert sum(look.rounds for look in looks) == 3  # five tokens a round


def test_coupled_draws_are_those_of_plain_decoding(models: Models, prompts: list[list[int]]) -> None:
    """At any temperature, which the exchange of distributions does not give; and most guesses stand."""
    model, small, looks = models("gla"), models("mamba2"), list[Look]()
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, seed=5)
    limits = Limits(max_new_tokens=20, end_tokens=[4])
    expected = generate(model, prompts, limits=limits, sampling=sampling)

    def coupled(drafter: Stack) -> list[Generation]:
        looks.clear()
        return generate(
            model,
            prompts,
            limits=limits,
            sampling=sampling,
            drafter=DraftModel(drafter, coupled=True),
            draft_tokens=3,
            on_look=looks.append,
        )

    assert coupled(small) == expected
    assert coupled(model) == expected
    assert sum(look.kept for look in looks) >= 0.99 * sum(look.guessed for look in looks) - len(prompts)


def test_what_was_missed_is_read_before_the_next_guess(models: Models) -> None:
    model = models("gated_deltanet")
    text = torch.randint(23, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    drafts = []
    for told_at_once in (True, False):
        drafter = DraftModel(model)
        drafter.open(model, 1, 800)
        drafter.put([0], [text if told_at_once else text[:5]])
        if not told_at_once:
            for start in range(5, 700, 5):
                block = torch.tensor([text[start : start + 5]])
                drafter.observe(block, torch.tensor([5]), torch.zeros(1, 5, 32))
        drafter.prepare(1, 3)
        drafts.append(drafter.propose(1, 3, Sampler([SamplingConfig()]), History.start([[0]], 0)).tokens_bk.tolist())
    assert drafts[0] == drafts[1]


def test_a_model_of_another_vocabulary_is_refused(models: Models) -> None:
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    other = Stack(ModelConfig(vocab_size=24, d_model=16, d_mlp=32, layers=(layer,))).double()
    with pytest.raises(ConfigError, match="expected a vocabulary of 23 tokens, got 24; use a smaller"):
        generate(models("attention"), [[1]], drafter=DraftModel(other))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["draft_model"], "expected model=NAME"),
        (["draft_model,model=attention,coupled=maybe"], "coupled=true or false"),
        (["draft_model,model=attention", "copyspec"], "expected no drafter behind one that always guesses"),
    ],
)
def test_specs_that_mean_nothing(specs: list[str], message: str, models: Models) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_drafter(specs, models)
