"""A tiny teacher on disk, with a byte-level tokenizer, and text to train on."""

from pathlib import Path

import pytest
import torch

from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


@pytest.fixture
def drawn() -> None:
    """Asked for by a test whose report has its pictures."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports say their charts in words: pictures take longer than the conversion of a tiny model."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(
            "subquad.evals.report.svg", lambda chart, key: f'<svg id="{key}">{chart.description()}</svg>'
        )


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a teacher of four layers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<end>": 0} | {c: i + 1 for i, c in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    torch.manual_seed(0)
    model = Stack(ModelConfig(300, 32, 48, (LAYER,) * 4, max_positions=256, eos_tokens=(0,)))
    save_pretrained(model, folder, PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of several thousand bytes in paragraphs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"paragraph {i} says " + f"{i * i} lorem ipsum " * 20 for i in range(300)))
    return path
