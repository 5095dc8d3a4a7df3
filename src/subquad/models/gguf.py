"""GGUF files as Hugging Face has them: config, weights by their names there, tokenizer.

Read here and not through ``transformers``, because its reader needs another package, takes many times as long, and
leaves out the frequency factors by which a GGUF carries Llama 3.1's RoPE scaling.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subquad.core.errors import CheckpointError, UnsupportedError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Names of a GGUF's architecture keys, without their prefix, and the Hugging Face config field each one sets.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
}
_READ_ELSEWHERE = {
    "vocab_size",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_RUN = 1 << 16


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]  # outermost axis first, as torch has it
    kind: int
    offset: int


class GGUF:
    """An open GGUF file: its metadata, and its tensors dequantised on demand.

    Args:
        path: the file.

    Raises:
        CheckpointError: not a little-endian GGUF file of version 2 or 3, or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: expected a GGUF file, got {error}; check the path") from error
        self._buffer, self._at = content, 4
        self._bytes = np.frombuffer(content, dtype=np.uint8)
        if content[:4] != b"GGUF":
            raise CheckpointError(f"{path}: expected a GGUF file, got other content; check the path")
        try:
            version, n_tensors, n_fields = self._scalar("<I"), self._scalar("<Q"), self._scalar("<Q")
            if version not in (2, 3):
                raise CheckpointError(
                    f"{path}: expected GGUF version 2 or 3, little-endian, got {version}; convert it again"
                )
            self.fields: dict[str, Any] = {}
            for _ in range(n_fields):
                name = self._string()
                self.fields[name] = self._value(self._scalar("<I"))
            self.entries: dict[str, _Entry] = {}
            for _ in range(n_tensors):
                name = self._string()
                shape = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))[::-1]
                self.entries[name] = _Entry(shape, self._scalar("<I"), self._scalar("<Q"))
        except (struct.error, OverflowError) as error:
            raise CheckpointError(f"{path}: cut short or damaged in its header; download it again") from error
        alignment = self.fields.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._buffer, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        start, self._at = self._at, self._at + length
        return self._buffer[start : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("<I"), self._scalar("<Q")
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: unknown value type {kind} in its header; download it again")
        return self._scalar(_SCALARS[kind])

    def tensor(self, name: str) -> Tensor:
        """A tensor, dequantised to float32."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.entries[name]
        kind = GGMLQuantizationType(entry.kind)
        values, size = GGML_QUANT_SIZES[kind]
        out = np.empty(entry.shape, dtype=np.float32)
        blocks, start = out.size // values, self._data + entry.offset
        raw = self._bytes[start : start + blocks * size]
        if raw.size < blocks * size:
            raise CheckpointError(f"{self.path}: cut short at tensor {name}; download it again")
        # In long runs of blocks: by rows, as the package would do it itself, costs three times as much.
        flat = out.reshape(-1)
        for i in range(0, blocks, _RUN):
            run = raw[i * size : (i + _RUN) * size]
            flat[i * values : (i + _RUN) * values] = dequantize(run[None], kind)[0]
        return torch.from_numpy(out)

    @property
    def architecture(self) -> str:
        """The architecture it names, refused unless one of `ARCHITECTURES`."""
        name = self.fields.get("general.architecture", "")
        if name not in ARCHITECTURES:
            raise UnsupportedError(
                f"{self.path.name}: architecture {name!r}; GGUF files of {', '.join(ARCHITECTURES)} are read, "
                "others load from their Hugging Face folder"
            )
        return name

    def config(self) -> dict[str, Any]:
        """The fields of the Hugging Face config this file amounts to, ``model_type`` included."""
        prefix = self.architecture + "."
        given = {k.removeprefix(prefix): v for k, v in self.fields.items() if k.startswith(prefix)}
        unknown = sorted(set(given) - set(_FIELDS) - _READ_ELSEWHERE)
        if unknown:
            raise UnsupportedError(
                f"{self.path.name}: {prefix}{unknown[0]} = {given[unknown[0]]} is not understood and might "
                "change the numbers; load the model from its Hugging Face folder"
            )
        config = {_FIELDS[k]: v for k, v in given.items() if k in _FIELDS}
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.7g}")  # stored as float32: 1e-5, not 9.9999997e-6
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        head_dim = config["head_dim"]
        for key in ("attention.value_length", "rope.dimension_count"):
            if given.get(key, head_dim) != head_dim:
                raise UnsupportedError(
                    f"{self.path.name}: {prefix}{key} = {given[key]} differs from the head size {head_dim}"
                )
        names = dict(self.names())
        present = set(names.values())
        theta = config.pop("rope_theta", 10_000.0)
        return (
            config
            | {
                "model_type": self.architecture,
                "vocab_size": self.entries["token_embd.weight"].shape[0],
                "tie_word_embeddings": "lm_head.weight" not in present,
                "attention_bias": "model.layers.0.self_attn.q_proj.bias" in present,
                "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in present,
                "rope_parameters": {"rope_theta": theta} | self._rope_scaling(given, theta, head_dim),
            }
            | {f"{name}_token_id": self.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        )

    def _rope_scaling(self, given: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any]:
        kind = given.get("rope.scaling.type", "none")
        if "rope_freqs.weight" in self.entries:
            return self._llama3_scaling(theta, head_dim)
        if kind == "none":
            return {"rope_type": "default"}
        if kind == "linear":
            return {"rope_type": "linear", "factor": given["rope.scaling.factor"]}
        if kind == "yarn":
            return {
                "rope_type": "yarn",
                "factor": given["rope.scaling.factor"],
                "original_max_position_embeddings": given["rope.scaling.original_context_length"],
            }
        raise UnsupportedError(f"{self.path.name}: RoPE scaling {kind!r}; linear, yarn and llama3 are supported")

    def _llama3_scaling(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The llama3 parameters, recognised from the table of frequency divisors that the file holds in their place."""
        divisors = self.tensor("rope_freqs.weight").double()
        wavelength = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        low, high, original = 1.0, 4.0, 8192
        for factor in (8.0, 32.0):  # Llama 3.1, and 3.2
            smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
            expected = 1 / ((1 - smooth) / factor + smooth)
            if torch.allclose(divisors, expected, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
        raise UnsupportedError(
            f"{self.path.name}: rope_freqs.weight is not the table of Llama 3.1 or 3.2; "
            "load the model from its Hugging Face folder"
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Each tensor's name here and in the Hugging Face model."""
        for name in self.entries:
            if name == "rope_freqs.weight":
                continue
            stem, _, suffix = name.rpartition(".")
            parts = stem.split(".")
            layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
            if parts[-1] not in _TENSORS:
                raise UnsupportedError(
                    f"{self.path.name}: tensor {name} has no place in a dense {self.architecture} model"
                )
            yield name, f"{layer}{_TENSORS[parts[-1]]}.{suffix}"

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All weights under their Hugging Face names, dequantised and cast."""
        n_heads = self.fields[f"{self.architecture}.attention.head_count"]
        n_kv_heads = self.fields.get(f"{self.architecture}.attention.head_count_kv", n_heads)
        state: dict[str, Tensor] = {}
        for name, theirs in self.names():
            tensor = self.tensor(name)
            # llama.cpp rotates neighbouring channels, so its llama files interleave each query and key head's rows.
            if self.architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
                heads = n_heads if ".attn_q." in name else n_kv_heads
                tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            state[theirs] = tensor.to(dtype).contiguous()
        return state
