"""One door for every model: a checkpoint of ours, or a teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from subquad.models.checkpoint import from_pretrained, is_checkpoint
from subquad.models.teachers import LoadedModel, license_of, load_teacher, load_tokenizer


def load_model(
    spec: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a checkpoint of ours from a folder, or else a teacher.

    Args:
        spec: a folder that `save_pretrained` wrote, or what `load_teacher` takes.
        dtype: of the weights; None keeps a checkpoint's own, and is float32 for a teacher.
        device: where they go.

    Raises:
        CheckpointError, ConfigError, UnsupportedError: see `from_pretrained` and `load_teacher`.
    """
    folder = Path(spec).expanduser()
    if is_checkpoint(folder):
        from transformers import PreTrainedConfig

        model = from_pretrained(folder, device=device, dtype=dtype)
        # Its model type means nothing to transformers, and tokenizer_config.json says all that a tokenizer needs.
        tokenizer = load_tokenizer(folder, PreTrainedConfig())
        return LoadedModel(model, tokenizer, folder.resolve().name, str(spec), license_of(str(folder)))
    return load_teacher(spec, dtype=dtype or torch.float32, device=device)
