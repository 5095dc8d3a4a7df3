"""Hybrids of attention and Mamba-2 as GraniteMoeHybrid, which stock ``transformers`` and the serving engines run.

GraniteMoeHybrid without experts is the one published architecture that has all that such a hybrid needs: any pattern
of layers, RoPE over whole heads in the attention, a head size of its own, a factor on the scores, SwiGLU, tied
embeddings. (Bamba rotates half of every head, Zamba2 shares its attention, Nemotron-H has no SwiGLU.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad.core.errors import UnsupportedError
from subquad.mixers.mamba2 import EXPORTABLE
from subquad.models.card import ModelCard, render
from subquad.models.checkpoint import replace_folder, write_json, write_weights
from subquad.models.stack import Stack

MODEL_TYPE = "granitemoehybrid"

# Before this version the stock class normed all heads of a Mamba-2 layer together, whatever its groups.
TRANSFORMERS = "5.23.0"
_NOTE = (
    f"With `transformers`, use {TRANSFORMERS} or newer: older versions ignore the groups of the gated norm and compute "
    "something else, without saying so."
)

# What the architecture fixes in a layer, as fields of the mixer's Config.
PROFILE: Mapping[str, Mapping[str, Any]] = {"attention": {"qk_norm": False, "window": None}, "mamba2": EXPORTABLE}


def export(model: Stack, folder: str | Path, tokenizer: Any = None, card: ModelCard | None = None) -> None:
    """Write `model` as a GraniteMoeHybrid checkpoint, which needs nothing of ours to be loaded.

    Logits are those of `model`; in ``transformers`` from 5.23 on where a Mamba-2 layer has more than one group, and the
    card says so. Two limits are the stock class's own: in a batch padded on the left it lets the bias of padded columns
    into the convolution of a Mamba-2 layer with ``bias=True``, and without any attention layer it generates with
    ``use_cache=False`` only.

    Args:
        model: layers of ``attention`` and ``mamba2`` in the exportable profile (`PROFILE`).
        folder: where; replaced as `subquad.models.checkpoint.save_pretrained` does.
        tokenizer: saved along.
        card: what the README says.

    Raises:
        UnsupportedError: something the architecture can't express, with the layer and the field.
        CheckpointError: it could not be written.
    """
    config = granite_config(model)
    weights = granite_weights(model)
    if tokenizer is not None:
        config["pad_token_id"] = tokenizer.pad_token_id
        config["bos_token_id"] = tokenizer.bos_token_id

    described = card or ModelCard()
    if config.get("mamba_n_groups", 1) > 1:
        described = replace(described, notes=f"{described.notes}\n\n{_NOTE}".strip())

    def write(fresh: Path) -> None:
        write_weights(weights, fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(fresh))
        (fresh / "README.md").write_text(render(described, model.config, library="transformers"), encoding="utf-8")
        write_json(fresh / "config.json", config)

    replace_folder(folder, MODEL_TYPE, write)


def granite_config(model: Stack) -> dict[str, Any]:
    """The keys of the exported config.json.

    Raises:
        UnsupportedError: something the architecture can't express.
    """
    ours = model.config
    if ours.mlp_bias:
        raise UnsupportedError(f"mlp_bias=True has no place in {MODEL_TYPE}; save it as a subquad checkpoint instead")
    if not ours.d_mlp:
        raise UnsupportedError(f"{MODEL_TYPE} has an MLP in every block; save it as a subquad checkpoint instead")
    layers: dict[str, Any] = {}
    for i, layer in enumerate(ours.layers):
        for key, value in _layer_keys(model, i, layer["mixer"]).items():
            if layers.setdefault(key, value) != value:
                raise UnsupportedError(
                    f"layers[{i}]: {layer['mixer']} {key}={value} differs from {layers[key]} of an earlier layer, "
                    f"and {MODEL_TYPE} has one for all; save it as a subquad checkpoint instead"
                )
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "transformers_version": TRANSFORMERS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.d_model,
        "intermediate_size": ours.d_mlp,
        "shared_intermediate_size": ours.d_mlp,
        "num_hidden_layers": len(ours.layers),
        # Under the names of the published checkpoints, which old and new readers both know.
        "layer_types": ["mamba" if layer["mixer"] == "mamba2" else "attention" for layer in ours.layers],
        "rms_norm_eps": ours.norm_eps,
        "tie_word_embeddings": ours.tied,
        "max_position_embeddings": ours.max_positions,
        "eos_token_id": list(ours.eos_tokens) or None,
        "bos_token_id": None,
        "hidden_act": "silu",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_dropout": 0.0,
        "attention_bias": _attention_bias(model),
        "position_embedding_type": "nope",
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    } | layers


def _layer_keys(model: Stack, i: int, kind: str) -> dict[str, Any]:
    """What layer `i` asks of the architecture's config."""
    if kind not in PROFILE:
        raise UnsupportedError(
            f"layers[{i}]: mixer {kind!r} has no place in {MODEL_TYPE}; {' and '.join(PROFILE)} have"
        )
    mixer: Any = model.blocks[i].mixer
    config, width = mixer.config, model.config.d_model

    def expect(field: str, value: Any, wanted: Any) -> None:
        if value != wanted:
            raise UnsupportedError(f"layers[{i}]: {kind} {field}={value!r}, where {MODEL_TYPE} has only {wanted!r}")

    for field, wanted in PROFILE[kind].items():
        expect(field, getattr(config, field), wanted)
    if kind == "attention":
        keys = {
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "attention_multiplier": mixer.scale,
        }
        if config.rotary is None:
            return keys | {"position_embedding_type": "nope"}
        expect("rotary dim", config.rotary["dim"], config.head_dim)
        return keys | {
            "position_embedding_type": "rope",
            "rope_theta": config.rotary["theta"],
            "rope_scaling": dict(config.rotary.get("scaling", {})) or None,
        }
    inner = config.n_heads * config.value_dim
    expect("norm_eps", config.norm_eps, model.config.norm_eps)
    expect("n_heads x value_dim", inner, max(1, round(inner / width)) * width)
    return {
        "mamba_n_heads": config.n_heads,
        "mamba_d_head": config.value_dim,
        "mamba_d_state": config.key_dim,
        "mamba_n_groups": config.n_groups or config.n_heads,
        "mamba_d_conv": config.conv_width,
        "mamba_expand": inner // width,
        "mamba_conv_bias": True,
        "mamba_proj_bias": True,
    }


def _attention_bias(model: Stack) -> bool:
    """Whether any attention has a bias; the architecture then has one in all four projections of every layer."""
    return any(layer.get("qkv_bias") or layer.get("o_bias") for layer in model.config.layers)


def granite_weights(model: Stack) -> dict[str, Tensor]:
    """The model's tensors under the architecture's names."""
    out = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if not model.config.tied:
        out["lm_head.weight"] = model.lm_head.weight
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        layer: dict[str, Tensor] = {
            "input_layernorm.weight": block.norm1.weight,
            "post_attention_layernorm.weight": block.norm2.weight,
            "shared_mlp.input_linear.weight": torch.cat((block.mlp.gate_proj.weight, block.mlp.up_proj.weight)),
            "shared_mlp.output_linear.weight": block.mlp.down_proj.weight,
        }
        is_mamba = model.config.layers[i]["mixer"] == "mamba2"
        layer |= _mamba(block.mixer) if is_mamba else _attention(block.mixer, _attention_bias(model))
        out |= {f"model.layers.{i}.{name}": tensor.detach() for name, tensor in layer.items()}
    return out


def _attention(mixer: Any, with_bias: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = mixer.o_proj if name == "o_proj" else getattr(mixer.qkv, name)
        out[f"self_attn.{name}.weight"] = linear.weight
        if with_bias:
            out[f"self_attn.{name}.bias"] = _bias(linear)
    return out


def _mamba(mixer: Any) -> dict[str, Tensor]:
    qkv = mixer.qkv
    projections = (mixer.z_proj, qkv.v_proj, qkv.k_proj, qkv.q_proj, mixer.dt_proj)  # their z, x, B, C, dt
    return {
        "mamba.in_proj.weight": torch.cat([p.weight for p in projections]),
        "mamba.in_proj.bias": torch.cat([_bias(p) for p in projections]),
        "mamba.conv1d.weight": qkv.conv_weight[:, None],
        "mamba.conv1d.bias": qkv.conv_bias,
        "mamba.A_log": mixer.decay.A_log,
        "mamba.dt_bias": mixer.decay.dt_bias,
        "mamba.D": mixer.D,
        "mamba.norm.weight": mixer.norm_weight,
        "mamba.out_proj.weight": mixer.out_proj.weight,
        "mamba.out_proj.bias": _bias(mixer.out_proj),
    }


def _bias(linear: Any) -> Tensor:
    return linear.weight.new_zeros(linear.weight.shape[0]) if linear.bias is None else linear.bias
