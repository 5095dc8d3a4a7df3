"""One door for every model: a checkpoint of ours, a difference to a teacher, or a teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from subquad.core.errors import CheckpointError, ConfigError, SubquadError
from subquad.data.tokenizers import same_tokenizer
from subquad.models.checkpoint import from_pretrained, is_checkpoint
from subquad.models.difference import apply_difference, read_manifest
from subquad.models.teachers import LoadedModel, license_of, load_teacher, load_tokenizer


def load_model(
    spec: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a checkpoint of ours from a folder, a difference with the teacher that it names, or else a teacher.

    Args:
        spec: a folder that `save_pretrained` wrote, a file that `write_difference` wrote, or what `load_teacher` takes.
        dtype: of the weights; None keeps a checkpoint's own, and is float32 for a teacher.
        device: where they go.

    Raises:
        CheckpointError, ConfigError, UnsupportedError: see `from_pretrained`, `apply_difference` and `load_teacher`.
    """
    folder = Path(spec).expanduser()
    if folder.suffix == ".safetensors":
        origin = read_manifest(folder).teacher
        try:
            teacher = load_model(origin.spec)  # in the dtype that its digest was taken in
        except SubquadError as error:
            raise CheckpointError(
                f"{spec}: its teacher {origin.name} could not be loaded ({error}); "
                "fetch it and make a folder with `subquad apply TEACHER DIFFERENCE --out FOLDER`"
            ) from error
        loaded = apply_difference(folder, teacher)
        loaded.model.to(device, dtype)
        return loaded
    if is_checkpoint(folder):
        from transformers import PreTrainedConfig

        model = from_pretrained(folder, device=device, dtype=dtype)
        # Its model type means nothing to transformers, and tokenizer_config.json says all that a tokenizer needs.
        tokenizer = load_tokenizer(folder, PreTrainedConfig())
        return LoadedModel(model, tokenizer, folder.resolve().name, str(spec), license_of(str(folder)))
    return load_teacher(spec, dtype=dtype or torch.float32, device=device)


def check_pair(teacher: LoadedModel, start: LoadedModel) -> None:
    """Refuse a teacher whose next-token distribution can't be compared with that of the model a student starts from.

    The two may differ in width, depth and mixers, but they must cut a text into the same tokens of the same ids.

    Args:
        teacher: gives the distribution.
        start: its layers are converted.

    Raises:
        ConfigError: one has no tokenizer, the tokenizers differ, or the embeddings have another number of rows.
    """
    for one in (teacher, start):
        if one.tokenizer is None:
            raise ConfigError(f"{one.spec}: expected a tokenizer beside the weights, got none; add its files")
    same_tokenizer(teacher.tokenizer, start.tokenizer, (f"the teacher {teacher.name}", start.name))
    rows = (teacher.model.config.vocab_size, start.model.config.vocab_size)
    if rows[0] != rows[1]:
        raise ConfigError(
            f"{start.name}: expected an embedding of {rows[0]} rows as the teacher {teacher.name} has, got {rows[1]}; "
            "some families pad it by size: choose another pair"
        )
