"""Our models as Hugging Face has them: config, cache and a causal language model that generates."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.core.config import config_to_dict
from subquad.core.errors import CheckpointError, UnsupportedError
from subquad.core.layout import Layout
from subquad.models import checkpoint
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack, StackState
from subquad.models.weights import build

_FIELDS = tuple(f.name for f in fields(ModelConfig))
# Of an output, the field that holds the cache: it has another name since transformers 5.24.
_CACHE = "cache" if any(f.name == "cache" for f in fields(CausalLMOutputWithPast)) else "past_key_values"


class SubquadConfig(PreTrainedConfig):
    """The keys of a checkpoint's config.json under the names that ``transformers`` looks for."""

    model_type = checkpoint.MODEL_TYPE
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    attribute_map = {"hidden_size": "d_model", "intermediate_size": "d_mlp", "max_position_embeddings": "max_positions"}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        own = {name: kwargs.pop(name) for name in _FIELDS if name in kwargs}
        if own:
            kwargs = {"eos_token_id": list(own.get("eos_tokens", ())) or None} | kwargs
            kwargs |= {"tie_word_embeddings": own.get("tied", False)}
            self.num_hidden_layers = len(own["layers"])
        super().__init__(**kwargs)
        for name, value in own.items():
            setattr(self, name, value)

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The same model's config."""
        return cls(**config_to_dict(config))

    def model_config(self) -> ModelConfig:
        """The model that this config describes."""
        values = {name: getattr(self, name) for name in _FIELDS if hasattr(self, name)}
        values |= {"model_type": checkpoint.MODEL_TYPE, "schema": getattr(self, "schema", checkpoint.SCHEMA)}
        return checkpoint.config_of(values, where="SubquadConfig")


class SubquadCache:
    """What ``generate`` carries from step to step: the state of all layers, grown as it fills."""

    is_compileable = False
    is_linear = (False,)  # what a conversation goes on from knows its length

    def __init__(self, model: Stack, batch: int) -> None:
        self._model, self._length, self._capacity = model, 0, 64
        self.state: StackState = model.init_state(batch, self._capacity)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included."""
        return self._length

    def reserve(self, columns: int) -> None:
        """Make room for `columns` more, at least doubling what there is."""
        self._length += columns
        if self._length <= self._capacity:
            return
        self._capacity = max(2 * self._capacity, self._length)
        old, self.state = self.state, self._model.init_state(self.state.batch, self._capacity)
        for (_, new), (_, kept) in zip(self.state.tensors(), old.tensors(), strict=True):
            new[tuple(slice(n) for n in kept.shape)] = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row ``beam_idx[i]``."""
        self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.state = self.state.fork(repeats)

    def crop(self, max_length: int) -> None:
        """Refused: what a recurrent state has read can't be taken back."""
        raise UnsupportedError("a recurrent state can't be cropped; generate without an assistant or prompt lookup")


class SubquadForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Stack` that ``transformers`` can load, generate with and train.

    Args:
        config: of the model.
        stack: the model itself; None makes a new one with random weights.
    """

    config_class = SubquadConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # transformers refuses assisted decoding then, which would crop the state
    _tied_weights_keys = {"model.lm_head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: SubquadConfig, stack: Stack | None = None) -> None:
        super().__init__(config)
        self.model = Stack(config.model_config()) if stack is None else stack
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing: mixers initialise themselves."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.model.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head."""
        return self.model.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes the cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: SubquadCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the loss where `labels` are given (-100 is ignored), and the cache.

        Args:
            input_ids: ``[b, t]``.
            attention_mask: ``[b, t]`` or, with a cache, of all columns so far; padding on either side.
            position_ids: without mask and cache, positions that start again at 0 begin a new document; else they
                must be those that the mask implies.
            past_key_values: the cache of an earlier call; changed in place.
            inputs_embeds: not supported.
            labels: ``[b, t]``.
            use_cache: by default without gradients only.
            logits_to_keep: only the last so many columns, or these columns; 0 is all.
            cache: the name of `past_key_values` since transformers 5.24.
            kwargs: handed to the loss.

        Raises:
            UnsupportedError: embeddings instead of tokens, a mask of another shape, or positions of another kind.
        """
        if input_ids is None or inputs_embeds is not None:
            raise UnsupportedError("expected input_ids, got inputs_embeds; pass token ids")
        use_cache = not torch.is_grad_enabled() if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = SubquadCache(self.model, input_ids.shape[0])
        layout, columns_bt = _layout(input_ids, attention_mask, position_ids, cache)
        tokens_bt = input_ids if columns_bt is None else input_ids.gather(1, columns_bt)
        if cache is None:
            hidden_btd = self.model.hidden(tokens_bt, layout)
        else:
            cache.reserve(input_ids.shape[1])
            hidden_btd, update = self.model.read(tokens_bt, cache.state, layout=layout)
            update.commit_(cache.state)
        if columns_bt is not None:  # back to the caller's columns
            hidden_btd = hidden_btd.gather(1, columns_bt.argsort(1)[..., None].expand_as(hidden_btd))
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden_btd[:, kept])
        loss = None
        if labels is not None:
            loss_of: Any = self.loss_function
            loss = loss_of(logits=logits, labels=labels, vocab_size=self.model.config.vocab_size, **kwargs)
        kept_cache: Any = {_CACHE: cache if use_cache else None}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept_cache)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a checkpoint of ours from a folder or the hub.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            args: none.
            kwargs: ``dtype`` (or ``torch_dtype``), ``device_map`` with one device, and where to look on the hub;
                others that ``transformers`` hands along are of no consequence here.

        Raises:
            CheckpointError, ConfigError: see `subquad.models.checkpoint.from_pretrained`.
            UnsupportedError: quantisation, or a map over several devices.
        """
        if kwargs.get("quantization_config") is not None:
            raise UnsupportedError("quantization_config: not supported for this model; load it in bfloat16")
        folder = _folder(str(pretrained_model_name_or_path), kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto" keeps what was saved
        stack = checkpoint.from_pretrained(folder, device=_device(kwargs.get("device_map")), dtype=dtype)
        config = kwargs.get("config")
        model = cls(config if isinstance(config, SubquadConfig) else SubquadConfig.of(stack.config), stack)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        return model.eval()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the checkpoint as `subquad.models.checkpoint.save_pretrained` does.

        Args:
            save_directory: the folder.
            kwargs: ``state_dict`` with the weights to write instead of the model's own, ``is_main_process``.

        Raises:
            CheckpointError: it could not be written.
            UnsupportedError: asked to push to the hub.
        """
        if kwargs.get("push_to_hub"):
            raise UnsupportedError("push_to_hub: not supported; save to a folder and upload that")
        if not kwargs.get("is_main_process", True):
            return
        stack, state = self.model, kwargs.get("state_dict")
        if state is not None:
            weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
            if stack.config.tied:
                weights.pop("lm_head.weight", None)
            stack = build(stack.config, weights, where="state_dict")
        checkpoint.save_pretrained(stack, save_directory)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)


def _layout(
    input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: SubquadCache | None
) -> tuple[Layout, Tensor | None]:
    """Where the block's tokens stand, and the columns to gather where they don't stand on the left already."""
    b, t = input_ids.shape
    seen_b = 0 if cache is None else cache.state.seen_b
    if mask is not None and (mask.ndim != 2 or mask.shape[1] < t):
        raise UnsupportedError(
            f"attention_mask: expected [batch, columns], got {tuple(mask.shape)}; pass a padding mask"
        )
    block_mask = None if mask is None else mask[:, -t:]
    if block_mask is None or bool(block_mask.all()):
        layout, columns_bt = Layout.dense(b, t, start_b=seen_b, device=input_ids.device), None
    else:
        layout, columns_bt = Layout.from_mask(block_mask, start_b=seen_b)
    if position_ids is None:
        return layout, columns_bt
    given_bt = position_ids.expand(b, t)
    given_bt = given_bt if columns_bt is None else given_bt.gather(1, columns_bt)
    if bool(((given_bt == layout.positions_bt) | ~layout.valid_bt).all()):
        return layout, columns_bt
    starts_bt = given_bt == 0
    steps_bt = given_bt.diff(dim=1) == 1
    packed = bool(starts_bt[:, 0].all()) and bool((starts_bt[:, 1:] | steps_bt).all())
    if packed and columns_bt is None and (cache is None or cache.get_seq_length() == 0):
        return Layout(layout.lengths_b, given_bt, starts_bt.cumsum(1) - 1, padded=False), None
    raise UnsupportedError(
        "position_ids: expected those that follow from the mask, or documents that each count from 0; leave them out"
    )


def _folder(source: str, options: dict[str, Any]) -> Path:
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    known = ("revision", "token", "cache_dir", "local_files_only")
    try:
        return Path(snapshot_download(source, **{k: options[k] for k in known if options.get(k) is not None}))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise CheckpointError(f"{source}: neither a folder nor a model on the hub ({error}); check the name") from error


def _device(device_map: Any) -> torch.device | str:
    if isinstance(device_map, dict) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return "cpu"
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, (str, int, torch.device)):
        return torch.device(device_map)
    raise UnsupportedError(f"device_map: expected one device, got {device_map}; this model stays on one")
