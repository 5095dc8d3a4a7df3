"""Which tokens of two tokenizers are the same, what the rest is read as, and which pairs are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import ConfigError
from subquad.engine.translate import (
    MOST_PIECES,
    Foreign,
    TranslatedTranscript,
    Translation,
    cut,
    token_bytes,
    translate,
)
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.models.teachers import LoadedModel


def wrap(core: Tokenizer, special: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    core.add_special_tokens([*special])
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def byte_level(words: Sequence[str] = ("Ġthe", "ing", "Ã©", "ĠĠ")) -> PreTrainedTokenizerFast:
    """As GPT-2 writes: 256 bytes, words, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(tokenizer_models.BPE({word: i for i, word in enumerate([*alphabet, *words])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return wrap(core, ["<|end|>", "<|user|>", "<|tool|>"], eos_token="<|end|>")


def sentencepiece(words: Sequence[str] = ("▁the", "▁", "i", "n", "g", "é", "▁▁")) -> PreTrainedTokenizerFast:
    """As Llama writes: bytes by their names, and a start token before every text."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    core = Tokenizer(tokenizer_models.BPE({w: i for i, w in enumerate(vocab)}, [], unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = wrap(core, ["<unk>", "<s>", "</s>", "<|user|>"], unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<call>"])
    return tokenizer


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT writes."""
    words = ["[UNK]", "[SEP]", "the", "##ing", "##i", "a", "##g", ",", "é"]
    core = Tokenizer(tokenizer_models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrap(core, ["[UNK]", "[SEP]"], unk_token="[UNK]", sep_token="[SEP]")


def loaded(tokenizer: Any, size: int = 0, name: str = "small") -> LoadedModel:
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    config = ModelConfig(vocab_size=size or len(tokenizer), d_model=16, d_mlp=32, layers=(layer,))
    return LoadedModel(Stack(config), tokenizer, name, name)


def ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


def test_tokens_of_every_family_are_their_bytes() -> None:
    cases = {
        byte_level: {"Ġthe": b" the", "Ã©": "é".encode(), "Ã": b"\xc3", "ĠĠ": b"  ", "Ċ": b"\n", "#": b"#"},
        sentencepiece: {"▁the": b" the", "é": "é".encode(), "<0xC3>": b"\xc3", "▁▁": b"  ", "<call>": b"<call>"},
        wordpiece: {"the": b" the", "##ing": b"ing", ",": b",", "é": " é".encode()},
    }
    for make, expected in cases.items():
        tokenizer = make()
        vocab, found = tokenizer.get_vocab(), token_bytes(tokenizer)
        assert {token: found[vocab[token]] for token in expected} == expected
        special = set(tokenizer.all_special_ids) | {vocab[t] for t in ("<|user|>", "<|tool|>") if t in vocab}
        assert found.keys() == set(vocab.values()) - special
    letters = Tokenizer(tokenizer_models.WordLevel({"a": 0, "Ġ": 1, "é": 2}, unk_token="a"))
    # A mark alone is enough, as it is where all tokens are bytes.
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=letters)) == {0: b"a", 1: b" ", 2: b"\xe9"}


def test_a_target_of_bytes_and_a_drafter_of_sentencepiece() -> None:
    target, draft = byte_level(), sentencepiece()
    model = translate(loaded(draft), loaded(target, size=270, name="large"))  # padded, as embeddings are
    assert isinstance(model, Foreign)
    found = model.translation
    theirs = ids(target, "Ġthe", "Ã©", "ĠĠ", "i", "Ġ", "Ã", "ing", "<|end|>", "<|user|>", "<|tool|>")
    mine = [ids(draft, token) for token in ("▁the", "é", "▁▁", "i", "▁", "<0xC3>")]
    mine += [ids(draft, "i", "n", "g"), ids(draft, "</s>"), ids(draft, "<|user|>"), []]
    assert [found.pieces[i] for i in theirs] == mine
    assert len(found.pieces) == 270 and not any(found.pieces[len(target) :])
    assert set(theirs[:6]) | {theirs[7]} <= found.common
    assert found.common.isdisjoint([theirs[6], *theirs[8:], *range(len(target), 270)])
    assert all(len(found.pieces[i]) == 1 for i in found.common)
    assert len({found.pieces[i][0] for i in found.common}) == len(found.common) == 256 + 3 + 1
    # What its tokenizer writes before a text is read once.
    start = ids(draft, "<s>")
    assert found.read([theirs[0], theirs[6]]) == [*start, *mine[0], *mine[6]]
    assert dict(model.state_dict()).keys() == dict(loaded(draft).model.state_dict()).keys()


def test_a_target_of_sentencepiece_and_a_drafter_of_bytes() -> None:
    """The character is guessed and not its byte of the same text; both are read."""
    target, draft = sentencepiece(), byte_level()
    model = translate(loaded(draft), loaded(target))
    assert isinstance(model, Foreign)
    found = model.translation
    (byte, character, call, start) = ids(target, "<0x69>", "i", "<call>", "<s>")
    assert found.pieces[byte] == found.pieces[character] == ids(draft, "i")
    assert character in found.common and byte not in found.common
    assert found.pieces[call] == ids(draft, *"<call>")[-MOST_PIECES:]
    assert found.pieces[start] == found.start == []
    assert found.pieces[ids(target, "</s>")[0]] == ids(draft, "<|end|>")


def test_one_vocabulary_is_not_translated() -> None:
    small, large = loaded(byte_level()), loaded(byte_level(), name="large")
    assert translate(small, large) is small.model
    assert translate(loaded(None, size=9), loaded(byte_level(), size=9)).config.vocab_size == 9
    # Embeddings of one family may be padded to other sizes.
    padded = translate(small, loaded(byte_level(), size=300))
    assert isinstance(padded, Foreign)
    specials = ids(small.tokenizer, "<|user|>", "<|tool|>")
    assert padded.translation.common == set(range(len(small.tokenizer))) - set(specials)
    assert padded.translation.pieces[: len(small.tokenizer)] == [[i] for i in range(len(small.tokenizer))]


def test_pairs_that_can_not_be_translated() -> None:
    small, large = loaded(byte_level()), loaded(sentencepiece(), name="large")
    for pair, name in (
        ((loaded(None, size=9), large), "small"),
        ((small, loaded(None, size=9, name="large")), "large"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: expected a tokenizer beside the weights, .* add its files"):
            translate(*pair)
    strange = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(100)} | {"▁the": 100}, unk_token="w0"))
    few = loaded(PreTrainedTokenizerFast(tokenizer_object=strange), name="few")
    with pytest.raises(
        ConfigError, match="draft model few: expected at least 10 tokens that large has too, got 1; take"
    ):
        translate(few, large)


def test_a_text_is_cut_into_the_longest_tokens() -> None:
    own = {b"a": 0, b"ab": 1, b"abc": 2, b"d": 3}
    assert cut(b"abdabcab!d", own, 3) == [1, 3, 2, 1, 3]
    assert cut(b"", own, 3) == cut(b"abc", {}, 0) == []


def test_a_transcript_notes_pieces_in_order() -> None:
    """Rows of unlike lengths, in several parts, with tokens of no piece and of several."""
    pieces = [[5], [6, 7, 8], [], [9, 1]]
    transcript = TranslatedTranscript(Translation(pieces, frozenset([0]), [4]), 3, 8, torch.device("cpu"))
    texts: list[list[list[int]]] = [[[1, 0], [3, 2, 1], [0]], [[2], [2], []], [[3, 3], [1, 1, 1], [1, 1]]]
    transcript.put(range(3), [row[0] for row in texts])
    for part in (1, 2):
        blocks = [row[part] for row in texts]
        tokens_bt = torch.tensor([[*block, *[3] * (3 - len(block))] for block in blocks])
        transcript.add(tokens_bt, torch.tensor([len(block) for block in blocks]))
    for row, parts in enumerate(texts):
        expected = [4, *(piece for part in parts for token in part for piece in pieces[token])]
        assert int(transcript.length_b[row]) == len(expected)
        assert transcript.tokens_bn[row, : len(expected)].tolist() == expected
    # A row is told its last token too, which is not committed.
    transcript.put([0], [[1] * 9])
    assert int(transcript.length_b[0]) == transcript.room == 1 + 3 * 9
    transcript.put([0], [[1] * 8])
    transcript.add(torch.tensor([[1, 1]]), torch.tensor([1]))
    assert transcript.tokens_bn[0, : transcript.room].tolist() == [4, *[6, 7, 8] * 9]
