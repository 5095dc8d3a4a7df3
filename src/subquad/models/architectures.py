"""Architectures of published models: a Hugging Face config as ours, and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from subquad.core.errors import UnsupportedError
from subquad.core.state import precise
from subquad.models.config import ModelConfig

# Fields that some published models set beside a supported model_type, with the values that leave the numbers alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (None, False),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
}


def _llama(hf: Any) -> ModelConfig:
    return _dense(hf, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias, mlp_bias=hf.mlp_bias)


def _mistral(hf: Any) -> ModelConfig:
    if getattr(hf, "layer_types", None):
        raise UnsupportedError(
            "mistral config: layer_types alternates attentions, which transformers' Mistral ignores; "
            "use a supported architecture"
        )
    return _dense(hf, windows=[hf.sliding_window] * hf.num_hidden_layers)


def _qwen2(hf: Any) -> ModelConfig:
    return _dense(hf, qkv_bias=True, windows=_layer_windows(hf))


def _qwen3(hf: Any) -> ModelConfig:
    return _dense(hf, qkv_bias=hf.attention_bias, o_bias=hf.attention_bias, qk_norm=True, windows=_layer_windows(hf))


def _mamba(hf: Any) -> ModelConfig:
    layer = {
        "mixer": "mamba1",
        "d_inner": hf.intermediate_size,
        "state_dim": hf.state_size,
        "dt_rank": hf.time_step_rank,
        "conv_width": hf.conv_kernel,
        "conv_bias": hf.use_conv_bias,
        "bias": hf.use_bias,
    }
    return ModelConfig(
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        d_mlp=0,
        layers=(layer,) * hf.num_hidden_layers,
        norm_eps=hf.layer_norm_epsilon,
        tied=hf.tie_word_embeddings,
        eos_tokens=_ends(hf),
    )


ADAPTERS: dict[str, Callable[[Any], ModelConfig]] = {
    "llama": _llama,
    "mamba": _mamba,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _layer_windows(hf: Any) -> list[int | None]:
    known = {"full_attention": None, "sliding_attention": hf.sliding_window}
    for kind in hf.layer_types:
        if kind not in known:
            raise UnsupportedError(f"{hf.model_type} config: layer type {kind!r}; supported: {', '.join(known)}")
    return [known[kind] for kind in hf.layer_types]


def _dense(
    hf: Any,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: list[int | None] | None = None,
) -> ModelConfig:
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    attention = {
        "mixer": "attention",
        "n_heads": hf.num_attention_heads,
        "n_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim,
        "rotary": _rotary(hf, head_dim),
        "qkv_bias": qkv_bias,
        "o_bias": o_bias,
        "qk_norm": qk_norm,
        "norm_eps": hf.rms_norm_eps,
    }
    return ModelConfig(
        vocab_size=hf.vocab_size,
        d_model=hf.hidden_size,
        d_mlp=hf.intermediate_size,
        layers=tuple(attention | {"window": window} for window in windows or [None] * hf.num_hidden_layers),
        norm_eps=hf.rms_norm_eps,
        tied=hf.tie_word_embeddings,
        mlp_bias=mlp_bias,
        max_positions=hf.max_position_embeddings,
        eos_tokens=_ends(hf),
    )


def _ends(hf: Any) -> tuple[int, ...]:
    eos = getattr(hf, "eos_token_id", None)
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _rotary(hf: Any, head_dim: int) -> dict[str, Any]:
    given: dict[str, Any] = dict(hf.rope_parameters)
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedError(
            f"{hf.model_type} config: RoPE that differs by layer type; one RoPE for all layers is supported"
        )
    kind = given.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedError(f"{hf.model_type} config: rope_type {kind!r}; supported: default, linear, llama3, yarn")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(
            f"{hf.model_type} config: partial_rotary_factor {given['partial_rotary_factor']}, which transformers "
            "ignores for this architecture"
        )
    scaling = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    if kind == "yarn" and scaling.get("factor") is None:
        scaling["factor"] = hf.max_position_embeddings / scaling["original_max_position_embeddings"]
    return {"theta": given["rope_theta"], "dim": head_dim, "scaling": {} if kind == "default" else scaling}


def model_config(hf: Any) -> ModelConfig:
    """Our config of a Hugging Face config.

    Args:
        hf: a ``transformers`` config.

    Raises:
        UnsupportedError: another architecture, or a field that would change the numbers and is not supported.
    """
    if hf.model_type not in ADAPTERS:
        raise UnsupportedError(
            f"expected one of {', '.join(ADAPTERS)}, got architecture {hf.model_type!r}; choose a model of these"
        )
    for name, neutral in _NEUTRAL.items():
        value = getattr(hf, name, neutral[0])
        if value not in neutral:
            raise UnsupportedError(
                f"{hf.model_type} config: {name} = {value!r} changes the numbers and is not supported"
            )
    return ADAPTERS[hf.model_type](hf)


_RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^(model\.embed_tokens|backbone\.embeddings)\.", "embed."),
        (r"^(model\.norm|backbone\.norm_f)\.", "norm."),
        (r"^(model|backbone)\.layers\.", "blocks."),
        (r"^(blocks\.\d+)\.(input_layernorm|norm)\.", r"\1.norm1."),
        (r"\.post_attention_layernorm\.", ".norm2."),
        (r"\.self_attn\.o_proj\.", ".mixer.o_proj."),
        (r"\.self_attn\.", ".mixer.qkv."),
        (r"\.mixer\.conv1d\.", ".mixer.ssm.conv_"),
        (r"\.mixer\.dt_proj\.bias$", ".mixer.ssm.rates.dt_bias"),
        (r"\.mixer\.(A_log|D)$", r".mixer.ssm.rates.\1"),
        (r"\.mixer\.(x_proj|dt_proj)\.", r".mixer.ssm.\1."),
    )
)


def our_name(theirs: str) -> str:
    """Name in a `Stack` of a published model's tensor."""
    for pattern, ours in _RENAMES:
        theirs = pattern.sub(ours, theirs)
    return theirs


def our_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor that goes by `our_name` as ours: a convolution's taps have no middle axis, rates stay in float32."""
    if name.endswith(".ssm.conv_weight"):
        return tensor.squeeze(1)
    return tensor.to(precise(tensor.dtype)) if ".ssm.rates." in name else tensor
