"""Two tokenizers are one, or the first difference is named."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import ConfigError
from subquad.data import same_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def make(merges=(("t", "h"), ("Ġ", "t")), words=(), eos="<end>", bos=None, normalizer=None):
    pieces = dict.fromkeys([*LETTERS, "th", "Ġt", "he", *words])
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(pieces)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        core.normalizer = normalizer
    fast = PreTrainedTokenizerFast(tokenizer_object=core)
    fast.add_special_tokens({"additional_special_tokens": ["<end>", "<stop>"]})
    fast.eos_token, fast.bos_token = eos, bos
    return fast


def test_one_tokenizer():
    same_tokenizer(make(), make())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"words": ["hx"]}, "the number of tokens is 261 in one and 262 in the other; take two models of one family"),
        ({"eos": "<stop>"}, "the eos_token is '<end>' in one and '<stop>' in the other"),
        ({"bos": "<end>"}, "the bos_token is None in one and '<end>' in the other"),
        ({"merges": [("h", "e"), ("Ġ", "t")]}, "token 1 of .* is 'h' in one and 'he' in the other"),
        ({"normalizer": normalizers.NFC()}, "cafe"),
    ],
)
def test_the_first_difference_is_named(other, message):
    with pytest.raises(ConfigError, match=f"^expected one tokenizer for small and large, got two: .*{message}"):
        same_tokenizer(make(), make(**other), ("small", "large"))


def test_ids_count_and_not_only_tokens():
    swapped = make()
    vocab = swapped.get_vocab()
    a, b = LETTERS[3], LETTERS[4]
    swapped.get_vocab = lambda: vocab | {a: vocab[b], b: vocab[a]}
    with pytest.raises(ConfigError, match="the id of '.*' is 3 in one and 4 in the other"):
        same_tokenizer(make(), swapped)
