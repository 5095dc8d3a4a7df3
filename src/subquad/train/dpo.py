"""Direct preference optimisation (arXiv 2305.18290) of a saved model, by ``trl``, behind any conversion."""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from subquad.core.errors import ConfigError, DataError, DivergenceError, UnsupportedError
from subquad.core.layout import Layout
from subquad.models.checkpoint import check_target, save_pretrained
from subquad.models.load import load_model
from subquad.models.stack import Stack

FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Preference:
    """The optimisation; the defaults are those of arXiv 2408.15237's last stage.

    Attributes:
        beta: how strongly the model is held to where it started.
        lr: peak learning rate, cosine after a tenth of warmup.
        epochs: passes over the pairs.
        batch: pairs of a step.
        length: most tokens of a prompt with its answer.
        seed: of the shuffle.
    """

    beta: float = 0.01
    lr: float = 5e-7
    epochs: float = 1.0
    batch: int = 4
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what trains nothing."""
        if self.beta <= 0 or self.lr <= 0 or self.epochs <= 0 or self.batch < 1 or self.length < 2:
            raise ConfigError(
                f"dpo: expected beta, lr, epochs > 0, batch >= 1 and length >= 2, got {self}; change them"
            )


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The preferences of a JSONL file: ``prompt``, ``chosen`` and ``rejected``, each text or a list of messages.

    Raises:
        DataError: no such file, an empty one, or a line without these fields.
    """
    if not path.exists():
        raise DataError(f"{path}: expected a file of preferences, got none; give one with {', '.join(FIELDS)} a line")
    pairs: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: expected one JSON object a line, got {error}; correct it") from error
        if not isinstance(record, dict) or any(name not in record for name in FIELDS):
            got = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path}:{number}: expected the fields {', '.join(FIELDS)}, got {got}; rename them")
        pairs.append({name: record[name] for name in FIELDS})
    if not pairs:
        raise DataError(f"{path}: expected preferences, got an empty file; give at least one")
    return pairs


def hidden_of(model: Stack, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutput:
    """The stream after the final norm, for a batch padded on either side; other arguments are of no consequence."""
    layout, columns_bt = Layout.from_mask(attention_mask)
    hidden_btd = model.hidden(input_ids.gather(1, columns_bt), layout)
    back_btd = columns_bt.argsort(1)[..., None].expand_as(hidden_btd)
    return BaseModelOutput(last_hidden_state=hidden_btd.gather(1, back_btd))  # pyright: ignore[reportArgumentType]


def prefer(
    model: str,
    pairs: Path,
    out: Path,
    preference: Preference | None = None,
    *,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Train a saved model to prefer the chosen answers, and save it in `out`; the figures of the last step.

    ``-log sigmoid(beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected)))`` (equation 7), p0 the model as
    it came.

    Args:
        model: what `load_model` takes.
        pairs: as in `read_pairs`.
        out: folder for the result.
        preference: the settings.
        device: where to train; on a GPU in bfloat16 over float32 weights.
        say: told what happens.

    Raises:
        UnsupportedError: ``trl`` is not installed.
        ConfigError: a model without a tokenizer.
        DataError: as in `read_pairs`.
        DivergenceError: as in `last_step`; nothing is saved.
    """
    if importlib.util.find_spec("trl") is None:
        raise UnsupportedError("dpo needs trl, which is not installed; pip install subquad[dpo]")
    settings, device = preference or Preference(), device or torch.device("cpu")
    records = read_pairs(pairs)
    check_target(out)
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    from subquad.hf import SubquadConfig, SubquadForCausalLM

    class Scored(SubquadForCausalLM):
        """What ``trl`` calls instead of the whole model, to apply the head in chunks itself."""

        @property
        def base_model(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
            return partial(hidden_of, self.model)

    ours, start = (load_model(model, dtype=torch.float32, device=device) for _ in range(2))
    if ours.tokenizer is None:
        raise ConfigError(f"{model}: expected a tokenizer beside the weights, got none; add its files")
    tokenizer = ours.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    say(f"training on {len(records):,} preferences")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DPOConfig(
            output_dir=scratch,
            beta=settings.beta,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch,
            max_length=settings.length,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_steps=1,
            logging_nan_inf_filter=False,  # which would show an earlier loss instead
            report_to=[],
            disable_tqdm=True,
            seed=settings.seed,
        )
        # On by default there, under names that change with the version; our model recomputes nothing.
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if hasattr(arguments, name):
                setattr(arguments, name, False)
        wrapped = [Scored(SubquadConfig.of(m.model.config), m.model) for m in (ours, start)]
        trainer = DPOTrainer(
            model=wrapped[0],
            ref_model=wrapped[1],
            args=arguments,
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
        )
        trainer.train()
        figures = last_step(trainer.state.log_history)
    save_pretrained(ours.model, out, tokenizer)
    return figures


def last_step(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the last of the logged steps.

    Raises:
        DivergenceError: the loss or the gradient of one of them is not finite.
    """
    steps = [{k: float(v) for k, v in line.items() if isinstance(v, (int, float))} for line in log if "loss" in line]
    for number, step in enumerate(steps, 1):
        for name in ("loss", "grad_norm"):
            if not math.isfinite(step.get(name, 0.0)):
                raise DivergenceError(
                    f"dpo: expected a finite {name}, got {step[name]} in step {number} of {len(steps)}; nothing was "
                    "saved; lower --lr"
                )
    return steps[-1]
