"""Low-rank adapters on linear layers: attach, train, merge; in and out in peft's files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from subquad.core.state import precise
from subquad.train.checkpoint import write_atomically

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Of peft's own model around ours.
_ROOT = "base_model.model."
# In peft's config: what changes an adapter's arithmetic, and the value at which it is what is here.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


class LowRank(nn.Module):
    """``W + (alpha / rank) up down`` in the place of a weight W (arXiv 2106.09685, equation 3), from ``up = 0``.

    Args:
        weight: W, ``[out, in]``.
        rank: of what is added.
        alpha: over `rank`, the factor on it.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        out, in_ = weight.shape
        # A step of training is far below a bfloat16 weight's spacing.
        factory: dict[str, Any] = {"dtype": precise(weight.dtype), "device": weight.device}
        self.down = nn.Parameter(torch.empty(rank, in_, **factory))
        self.up = nn.Parameter(torch.zeros(out, rank, **factory))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum, in the dtype of `weight`."""
        added = (self.alpha / self.rank) * (self.up @ self.down)
        return (weight + added).to(weight.dtype)


def attach(module: nn.Module, patterns: Sequence[str], rank: int, alpha: float) -> list[nn.Parameter]:
    """Put a `LowRank` on the weight of every linear layer of `module` that matches, and freeze that weight.

    At first nothing changes, for the adapters begin at 0. ``linear.weight`` is the sum wherever it is read. Compile
    afterwards; a state dict taken afterwards holds ``<linear>.parametrizations.weight.original`` for the weight, and
    ``...weight.0.down`` and ``up``, and goes back into a model that was attached alike.

    Args:
        module: the model; only adapted weights are frozen.
        patterns: of names of linear layers in it (``*`` is anything), as ``blocks.*.mixer.*q_proj``.
        rank: of the adapters.
        alpha: over `rank`, the factor on them.

    Returns:
        The new parameters, to train.

    Raises:
        ConfigError: a pattern that matches nothing, a rank above a layer's sides, or a layer that has an adapter.
        UnsupportedError: a weight that another module shares, as a tied head's.
    """
    linears = _linears(module)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(f"lora {pattern}: no such linear layer{nearest(pattern, linears)}")
    chosen = {name: m for name, m in linears.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    holders = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    for name, linear in chosen.items():
        if parametrize.is_parametrized(linear, "weight"):
            raise ConfigError(f"lora: expected plain weights, got one that is adapted in {name}; merge it first")
        if holders.count(id(linear.weight)) > 1:
            raise UnsupportedError(f"lora: {name} shares its weight with another module; leave it out")
        if not 1 <= rank <= min(linear.weight.shape) or not 0 < alpha < math.inf:
            raise ConfigError(
                f"lora: expected rank 1 to {min(linear.weight.shape)} for {name} and alpha > 0, got {rank} and {alpha}"
                "; change them or the patterns"
            )
    new: list[nn.Parameter] = []
    for linear in chosen.values():
        adapter = LowRank(linear.weight, rank, alpha)
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", adapter)
        new += [adapter.down, adapter.up]
    return new


def adapters(module: nn.Module) -> dict[str, LowRank]:
    """The adapter of every adapted linear layer in `module`, by the layer's name."""
    found: dict[str, LowRank] = {}
    for name, linear in _linears(module).items():
        if parametrize.is_parametrized(linear, "weight"):
            first = cast("Any", linear.parametrizations)["weight"][0]
            if isinstance(first, LowRank):
                found[name] = first
    return found


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Make every adapted weight of `module` the sum that it stands for, rounded once, and drop the adapters."""
    linears = _linears(module)
    for name, adapter in adapters(module).items():
        linear = linears[name]
        with torch.autocast(linear.weight.device.type, enabled=False):
            weight = adapter(cast("Any", linear.parametrizations)["weight"].original)
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        linear.weight.copy_(weight)


def save_peft(module: nn.Module, folder: Path, *, base: str = "", prefix: str = "model.") -> None:
    """Write the adapters of `module` as peft has them.

    Args:
        module: the model.
        folder: takes ``adapter_model.safetensors`` and ``adapter_config.json``.
        base: name or folder of the model without adapters, for the config.
        prefix: of a layer's name in the model that peft will wrap; ``model.`` is `SubquadForCausalLM`.

    Raises:
        ConfigError: no adapters, or adapters of several ranks.
        CheckpointError: it could not be written.
    """
    found = adapters(module)
    kinds = {(a.rank, a.alpha) for a in found.values()}
    if len(kinds) != 1:
        raise ConfigError(f"lora: expected adapters of one rank and alpha, got {sorted(kinds)}; attach them alike")
    ((rank, alpha),) = kinds
    tensors: dict[str, Tensor] = {}
    for name, adapter in found.items():
        tensors[f"{_ROOT}{prefix}{name}.lora_A.weight"] = adapter.down.detach().cpu().contiguous()
        tensors[f"{_ROOT}{prefix}{name}.lora_B.weight"] = adapter.up.detach().cpu().contiguous()
    config = _PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [prefix + name for name in found],
        "inference_mode": True,
    }
    content, text = save(tensors, metadata={"format": "pt"}), json.dumps(config, indent=2) + "\n"
    write_atomically(folder / WEIGHTS, lambda file: file.write(content))
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))


def load_peft(module: nn.Module, folder: Path, *, prefix: str = "model.") -> list[nn.Parameter]:
    """Attach the adapters that `save_peft`, or peft itself, wrote.

    Args:
        module: the model without them.
        folder: of both files.
        prefix: as for `save_peft`.

    Returns:
        The new parameters, as `attach` does.

    Raises:
        CheckpointError: a file is missing or damaged, or an adapter has no layer here, or another shape.
        UnsupportedError: an adapter of another kind, as DoRA.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: expected {CONFIG} and {WEIGHTS}, got {error}; save them again") from error
    for key, plain in _PLAIN.items():
        if (config.get(key, plain) or plain) != plain:
            raise UnsupportedError(f"{folder}: expected {key} {plain}, got {config[key]}; merge it with peft instead")
    rank = int(config["r"])
    # Rank-stabilised adapters divide by the root of the rank (arXiv 2312.03732).
    alpha = float(config["lora_alpha"]) * (math.sqrt(rank) if config.get("use_rslora") else 1)
    ends = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    start = _ROOT + prefix
    names = sorted(
        {
            key.removeprefix(start).removesuffix(end)
            for key in tensors
            for end in ends.values()
            if key.startswith(start) and key.endswith(end)
        }
    )
    linears = _linears(module)
    known = {start + name + end for name in names for end in ends.values()}
    odd = sorted(set(tensors) ^ known) or [name for name in names if name not in linears]
    if odd or not names:
        raise CheckpointError(
            f"{folder}: expected both halves of adapters of this model's linear layers, got "
            f"{odd[0] if odd else 'none'}; check model and prefix {prefix!r}"
        )
    for name in names:
        out, in_ = linears[name].weight.shape
        for half, shape in (("down", (rank, in_)), ("up", (out, rank))):
            got = tuple(tensors[start + name + ends[half]].shape)
            if got != shape:
                raise CheckpointError(f"{folder}: {name}: expected shape {shape}, got {got}; check that they belong")
    new = attach(module, names, rank, alpha)
    for name, adapter in adapters(module).items():
        if name in names:
            adapter.down.data.copy_(tensors[start + name + ends["down"]])
            adapter.up.data.copy_(tensors[start + name + ends["up"]])
    return new


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
