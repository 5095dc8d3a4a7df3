"""Streamed pieces add up to the whole text, for byte-level and byte-fallback tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import ConfigError
from subquad.engine.detokenize import UNFINISHED, Detokenizer

TEXT = "The café naïve 🌶️ 漢字かな မြန်မာ — done.  Two  spaces\n\nnew 👩‍👩‍👧 end"


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as GPT-2 writes them, so that every character beyond ASCII spans tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Words with a leading space mark and bytes for the rest, as SentencePiece models of the Llama 2 kind have them."""
    words = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁The", "▁done", "▁Two", "▁new", "▁end", "c"]
    words += list("afnevdospwT.hw")
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    merges = [("▁T", "he")] if "▁T" in vocab else []
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [detokenizer.push(t) for t in tokens] + [detokenizer.finish()]


def test_text_streams_whole_characters_wherever_the_prompt_ends(tokenizer: Any) -> None:
    tokens = encode(tokenizer, TEXT * 2)
    assert len(tokens) > 150
    assert decode(tokenizer, tokens) == TEXT * 2
    for cut in range(0, len(tokens), 1):
        got = pieces(Detokenizer(tokenizer, tokens[:cut]), tokens[cut:])
        whole = decode(tokenizer, tokens)
        assert UNFINISHED not in "".join(got)
        # A character that the prompt has begun is given out by the token that completes it.
        begun = decode(tokenizer, tokens[:cut])
        if not begun.endswith(UNFINISHED):
            assert begun + "".join(got) == whole
        assert whole.endswith("".join(got))
        assert sum(len(p) for p in got) >= len(whole) - len(begun)


def test_a_word_keeps_its_leading_space_after_a_prompt_and_loses_it_at_the_start() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    (new,) = tokenizer.convert_tokens_to_ids(["▁new"])
    prompt = encode(tokenizer, "The done")
    assert Detokenizer(tokenizer, prompt).push(new) == " new"
    assert Detokenizer(tokenizer, [tokenizer.bos_token_id]).push(new) == "new"


def test_special_tokens_show_nothing() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    tokens = [*encode(tokenizer, "ab"), tokenizer.eos_token_id, *encode(tokenizer, "é")]
    assert pieces(Detokenizer(tokenizer, encode(tokenizer, "x")), tokens) == ["a", "b", "", "", "é", ""]


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    tokens = encode(tokenizer, "a🌶")[:-1]
    assert pieces(Detokenizer(tokenizer, []), tokens) == ["a", "", "", "", UNFINISHED]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=60), st.integers(0, 40))
def test_any_bytes_add_up_to_what_decoding_them_at_once_gives(tokens: list[int], cut: int) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    prompt, rest = tokens[:cut], tokens[cut:]
    if decode(tokenizer, prompt).endswith(UNFINISHED):
        return
    assert decode(tokenizer, prompt) + "".join(pieces(Detokenizer(tokenizer, prompt), rest)) == decode(
        tokenizer, tokens
    )


@settings(max_examples=100, deadline=None)
@given(
    st.text(alphabet="abé", min_size=1, max_size=12),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
)
def test_the_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, [], stop)
    shown, certain = "", ""
    for token in encode(tokenizer, text):
        shown += detokenizer.push(token)
        certain += "" if detokenizer.stopped else "."
        if detokenizer.stopped:
            break
    shown += detokenizer.finish()
    # The stop string that is complete first ends the text; of those complete at once, the one that begins first.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert shown == expected
    assert detokenizer.stopped == bool(ends)


def test_a_stop_string_over_several_tokens_is_held_back_until_it_is_none() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, [], ["abc"])
    assert [detokenizer.push(t) for t in encode(tokenizer, "xababc")] == ["x", "", "", "ab", "", ""]
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match="^stop: expected"):
        Detokenizer(TOKENIZERS["byte_level"], [], [""])
