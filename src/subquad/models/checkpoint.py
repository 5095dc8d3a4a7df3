"""Checkpoints: a folder with config.json, safetensors, tokenizer and card, replaced whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.core.config import config_from_dict, config_to_dict
from subquad.core.errors import CheckpointError
from subquad.models.card import ModelCard, render
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.models.weights import build

MODEL_TYPE = "subquad"
SCHEMA = 1
# From a schema to the next: takes and returns the keys of config.json.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
# What config.json holds besides the fields of `ModelConfig`: ours, and what transformers adds.
_ENVELOPE = ("model_type", "schema", "architectures", "dtype", "transformers_version", "auto_map")


def save_pretrained(
    model: Stack,
    folder: str | Path,
    tokenizer: Any = None,
    card: ModelCard | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model into `folder`, which afterwards is either complete or as it was before.

    A checkpoint that stood there is replaced; files of other origin beside it are kept.

    Args:
        model: what to save, in the dtypes it has.
        folder: where; its parent is made if needed.
        tokenizer: saved along.
        card: what the README says.
        shard_bytes: weights above this size are split into several files.

    Raises:
        CheckpointError: it could not be written, or the folder holds a model of another kind.
    """

    def write(fresh: Path) -> None:
        weights = dict(model.state_dict())
        if model.config.tied:
            del weights["lm_head.weight"]
        write_weights(weights, fresh, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(fresh))
        (fresh / "README.md").write_text(render(card or ModelCard(), model.config), encoding="utf-8")
        write_json(fresh / "config.json", config_json(model.config))

    replace_folder(folder, MODEL_TYPE, write)


def replace_folder(folder: str | Path, model_type: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a fresh folder, then put it in the place of `folder` in one move.

    Args:
        folder: where it will stand; files there that `write` does not make, and no save has made, are kept.
        model_type: what a config.json already there must name, so that nobody's other model is destroyed.
        write: makes the new content in the folder it is given.

    Raises:
        CheckpointError: it could not be written, or the folder holds another model; it is as it was before.
    """
    target = Path(folder).expanduser().resolve()
    check_target(target, model_type)
    fresh, previous = target.with_name(f".{target.name}.saving"), _previous(target)
    try:
        for leftover in (fresh, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        if target.exists():
            _keep_others(target, fresh)
        for path in (*fresh.rglob("*"), fresh):
            _sync(path)
        if target.exists():
            target.rename(previous)
        fresh.rename(target)
        _sync(target.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        recover(target)
        kept = "the checkpoint that was there is intact" if target.exists() else "nothing was left behind"
        raise CheckpointError(
            f"{target}: could not be written ({error}); {kept}; free some space or choose another folder"
        ) from error
    finally:  # an interrupt, too, leaves nothing half done
        recover(target)
        shutil.rmtree(fresh, ignore_errors=True)


def check_target(folder: str | Path, model_type: str = MODEL_TYPE) -> None:
    """Refuse a folder that saving could not replace, or would destroy.

    Raises:
        CheckpointError: it holds another kind of model, or this process stands in it.
    """
    target = Path(folder).expanduser().resolve()
    recover(target)
    if Path.cwd().is_relative_to(target):
        raise CheckpointError(
            f"{target}: expected a folder of its own, which saving replaces whole, got the one you are in; "
            "choose another, or a new one below it"
        )
    if (target / "config.json").exists() and (found := read_config(target).get("model_type")) != model_type:
        raise CheckpointError(
            f"{target}: holds a model of type {found!r}, which saving would destroy; choose another folder"
        )


def from_pretrained(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Stack:
    """Read a model that `save_pretrained` wrote.

    Args:
        folder: the checkpoint.
        device: where the weights go.
        dtype: cast to it; None keeps each tensor as it was saved.

    Raises:
        CheckpointError: nothing there, damaged, of an unknown schema, or with missing, unknown or misshapen tensors.
        ConfigError: an unknown or missing key in config.json.
    """
    path = Path(folder).expanduser().resolve()
    recover(path)
    config = config_of(read_config(path), where=f"{path}/config.json")
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            weights |= load_file(str(file), device=str(device))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: could not be read ({error}); fetch or save the checkpoint again") from error
    model = build(config, weights, where=str(path))
    return model if dtype is None else model.to(dtype)


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds a model that `save_pretrained` wrote, rather than another kind or nothing."""
    path = Path(folder).expanduser().resolve()
    recover(path)
    return (path / "config.json").exists() and read_config(path).get("model_type") == MODEL_TYPE


def read_config(folder: Path) -> dict[str, Any]:
    """The keys of a folder's config.json.

    Raises:
        CheckpointError: none there, or no JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: expected a folder with config.json, got none; check the path") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: could not be read ({error}); fetch or save the checkpoint again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(values).__name__}; fetch or save it again")
    return values


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model."""
    envelope = {"model_type": MODEL_TYPE, "schema": SCHEMA, "architectures": ["SubquadForCausalLM"]}
    return envelope | config_to_dict(config)


def config_of(values: dict[str, Any], *, where: str) -> ModelConfig:
    """The model that the keys of a config.json describe, brought from older schemas to this one.

    Args:
        values: the keys.
        where: their source, for the message.

    Raises:
        CheckpointError: another kind of model, or a schema that this version does not know.
        ConfigError: an unknown or missing key.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{where}: expected model_type {MODEL_TYPE!r}, got {values.get('model_type')!r}; load it as a teacher"
        )
    schema = values.get("schema")
    while schema != SCHEMA:
        if schema not in MIGRATIONS:
            raise CheckpointError(
                f"{where}: expected schema {SCHEMA}, got {schema!r}; install the version of subquad that wrote it"
            )
        values = MIGRATIONS[schema](values)
        schema += 1
    return config_from_dict(ModelConfig, {k: v for k, v in values.items() if k not in _ENVELOPE}, where=where)


def write_weights(weights: Mapping[str, Tensor], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as safetensors, in several files with an index when they are larger than `shard_bytes`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    plain = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    plan = split_torch_state_dict_into_shards(plain, max_shard_size=shard_bytes)
    for name, tensors in plan.filename_to_tensors.items():
        path = folder / name
        path.touch()
        mode = path.stat().st_mode
        save_file({t: plain[t] for t in tensors}, str(path), metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets nobody but the owner read; others may read as far as they may any file
    if plan.is_sharded:
        write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / INDEX}: could not be read ({error}); fetch or save it again") from error
        return [folder / name for name in names]
    return [folder / "model.safetensors"]


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def recover(folder: str | Path) -> None:
    """Put the previous content of `folder` back where a save was killed between its two renames.

    To be called before anything else looks at a folder that may hold a checkpoint, or makes it.
    """
    target = Path(folder).expanduser().resolve()
    if not target.exists() and _previous(target).exists():
        _previous(target).rename(target)


def _keep_others(old: Path, new: Path) -> None:
    """Link into `new` what stands in `old` and was not written by a save."""
    for entry in old.iterdir():
        ours = entry.name.startswith("model") and ".safetensors" in entry.name
        if ours or (new / entry.name).exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, copy_function=_link, symlinks=True)
        else:
            _link(entry, new / entry.name)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # some file systems have no hard links
        shutil.copy2(old, new, follow_symlinks=False)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
