"""A smaller model guesses, the model verifies: recurrent, hybrid or attention, whatever the model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

from subquad.core.card import Card
from subquad.core.errors import ConfigError
from subquad.engine.draft import read_vocab, take_options
from subquad.engine.model_draft import ModelDrafter
from subquad.models.stack import Stack

CARD = Card(
    title="Fast Inference from Transformers via Speculative Decoding",
    entry="DraftModel",
    arxiv="2211.17192",
    needs="a smaller model, best of the same vocabulary",
    gives="several tokens a read of the model, of the same distribution, for any mixers and any batch",
    status="incubating",
    claim="2 to 3 times faster on T5-XXL, with identical outputs",
    measured="not reproduced",
    examples={
        "attention": {"model": "attention"},
        "recurrent": {"model": "mamba2"},
        "hybrid": {"model": "parallel"},
        "coupled": {"model": "gated_deltanet", "coupled": "true"},
        "foreign": {"model": "foreign"},
    },
)


class DraftModel(ModelDrafter):
    """A model of any mixers as drafter; see `ModelDrafter`.

    Example:
        >>> from subquad.engine.generate import generate
        >>> generate(model, prompts, drafter=DraftModel(small))  # doctest: +SKIP
    """

    @classmethod
    def build(cls, options: Mapping[str, str], models: Callable[[str], Stack]) -> Self:
        """Options: ``model``, ``coupled=true``, and ``vocab=FILE``; see `Drafter.build`."""
        take_options("draft_model", options, ("model", "coupled", "vocab"))
        coupled = options.get("coupled", "false")
        if "model" not in options or coupled not in ("true", "false"):
            raise ConfigError(
                f"draft_model: expected model=NAME, and coupled=true or false, got {dict(options)}; "
                "write draft_model,model=NAME"
            )
        return cls(models(options["model"]), coupled=coupled == "true", vocab=read_vocab(options.get("vocab")))
