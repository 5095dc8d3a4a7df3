"""The tokenizer that a GGUF file carries, rebuilt piece by piece as its Hugging Face original has it."""

from __future__ import annotations

from typing import Any

from subquad.core.errors import UnsupportedError, nearest
from subquad.models.gguf import GGUF

_CONTROL, _USER_DEFINED = 3, 4

_GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merging, by the name that llama.cpp gave each scheme; None is GPT-2's own cut.
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _GPT4_STYLE.format(numbers=r"\p{N}{1,3}"),
    "qwen2": _GPT4_STYLE.format(numbers=r"\p{N}"),
}


def tokenizer(file: GGUF) -> Any:
    """A fast ``transformers`` tokenizer with special tokens and chat template.

    Args:
        file: the open GGUF file.

    Raises:
        UnsupportedError: a tokenizer other than byte-level BPE, or a way of cutting text that is not known here.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    fields = file.fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    names = {
        f"{name}_token": tokens[fields[key]]
        for name, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if fields.get(key) is not None
    }
    core = _byte_level(file, tokens)
    for token, kind in zip(tokens, fields.get("tokenizer.ggml.token_type", []), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            core.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    _add_bos(core, fields, names.get("bos_token"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields.get(f"{file.architecture}.context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _byte_level(file: GGUF, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, cut = file.fields.get("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise UnsupportedError(
            f"{file.path.name}: tokenizer {kind!r}; byte-level BPE ('gpt2') is read from GGUF, "
            "others load from the Hugging Face folder of the model"
        )
    if cut not in _SPLITS:
        raise UnsupportedError(f"{file.path.name}: tokenizer.ggml.pre = {cut!r}{nearest(cut, _SPLITS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.fields["tokenizer.ggml.merges"]]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=cut == "llama-bpe",  # whole words of the vocabulary are taken as they are
        )
    )
    pattern = _SPLITS[cut]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    if cut == "qwen2":
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _add_bos(core: Any, fields: dict[str, Any], bos: str | None) -> None:
    from tokenizers import processors

    wanted = fields.get("tokenizer.ggml.add_bos_token", fields.get("tokenizer.ggml.pre") == "llama-bpe")
    if wanted and bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
