"""The tokenizer that a GGUF file carries, rebuilt piece by piece as its Hugging Face original has it."""

from __future__ import annotations

from typing import Any

from subquad.core.errors import UnsupportedError, nearest
from subquad.models.gguf import GGUF

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"  # how SentencePiece writes a space

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
        UnsupportedError: neither byte-level nor SentencePiece BPE, or a way of cutting text that is not known here.
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
    kind = fields.get("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise UnsupportedError(
            f"{file.path.name}: tokenizer {kind!r}; {' and '.join(_BUILDERS)} are read from GGUF, "
            "others load from the Hugging Face folder of the model"
        )
    core = _BUILDERS[kind](file, tokens)
    for token, role in zip(tokens, fields.get("tokenizer.ggml.token_type", []), strict=False):
        if role in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            core.add_tokens([AddedToken(token, normalized=False, special=role != _USER_DEFINED)])
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

    cut = file.fields.get("tokenizer.ggml.pre", "default")
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


def _sentencepiece(file: GGUF, tokens: list[str]) -> Any:
    """BPE that merges the pair whose union scores highest; the merges are all splits of a piece into two others."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    fields, vocab = file.fields, {token: i for i, token in enumerate(tokens)}
    scored: list[tuple[float, tuple[str, str]]] = []
    for token, score, role in zip(
        tokens, fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"], strict=True
    ):
        if role == _NORMAL:
            pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
            scored += [(-score, pair) for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    merges = [pair for _, pair in sorted(scored, key=lambda entry: entry[0])]
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = fields.get("tokenizer.ggml.add_space_prefix", True)
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefixed else []), normalizers.Replace(" ", _SPACE)]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )
    return core


# By the name that GGUF gives to each kind: byte-level BPE as GPT-2's, and SentencePiece as Llama's.
_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_bos(core: Any, fields: dict[str, Any], bos: str | None) -> None:
    from tokenizers import processors

    usual = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    if fields.get("tokenizer.ggml.add_bos_token", usual) and bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
