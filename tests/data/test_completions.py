"""Labels on what the assistant says, to the token, for templates of several families."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.core.errors import DataError
from subquad.data import Source, TokenStream, parse_source
from subquad.data.completions import completions, encode, inside
from subquad.data.documents import Rendered
from subquad.data.sources import render
from subquad.data.stream import tokenise

SPECIALS = ["<end>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|assistant|>", "<|user|>"]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# No generation prompt; trims; a space before the answer, as Mistral's and Llama 2's.
INST = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)
# Ends the whole with a token of its own, unless an answer is asked for.
LAST = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<end>' }}{% endif %}"
)
# Nothing closes a turn, and the next one's header is a special token.
OPEN = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
OPEN_WITH_END = f"{OPEN}<end>"


def tokenizer(template=None):
    """Bytes with a few merges, one of them of a space and a letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("a", "n"), ("Ċ", "Ċ"), ("t", "Ċ")]
    words = [*letters, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template=template)
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    return fast


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def labels(document, tokenizer):
    """The text of every run of labels, and the whole: what `tokenise` makes of a document."""
    tokens = tokenise([Rendered(*completions(document, tokenizer))], tokenizer)
    ids = np.where(tokens < 0, ~tokens, tokens)
    assert tokenizer.decode(ids) == render(document, tokenizer) + "<end>"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens >= 0, [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


TALK = turns("an a?", "an apple", "a\nb", " a pear \n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["an apple<|im_end|>", " a pear \n<|im_end|>"]),
        (INST, [" an apple</s>", " a pear</s>"]),
        (LAST, ["an apple</s>", " a pear \n</s>"]),
        (OPEN, ["an apple", " a pear \n<end>"]),
        (OPEN_WITH_END, ["an apple", " a pear \n<end>"]),
        # Nothing closes a turn there but the end of the document.
        (None, ["an apple", " a pear \n<end>"]),
    ],
)
def test_labels_are_the_answers_and_what_closes_them(template, expected):
    assert labels(TALK, tokenizer(template)) == expected


def test_an_answer_is_found_whatever_else_reads_the_same():
    for said in ("a", "assistant", "user\nan", "<b>", "", "You help."):
        talk = [{"role": "system", "content": said}, *turns(said, said)]
        assert labels(talk, tokenizer(CHATML)) == [f"{said}<|im_end|>"]
    # A turn of the user's at the end is nobody's label, and neither is the end token behind it.
    assert labels(turns("a", "b", "c"), tokenizer(CHATML)) == ["b<|im_end|>"]
    for open_turns in (OPEN, OPEN_WITH_END, None):
        assert labels(turns("a", "b", "c"), tokenizer(open_turns)) == ["b"]


def test_a_token_counts_if_a_character_of_it_does():
    """The second line break is the answer's, and one token holds both; a character of several tokens is one."""
    said = "\nané"
    assert labels(turns("q", said), tokenizer(CHATML)) == [f"\n{said}<|im_end|>"]
    spans = [(2, 4)]
    # Two tokens inside one character, one without a character, and white space that no token claims.
    offsets = np.array([[0, 2], [2, 3], [2, 3], [3, 3], [4, 6]])
    assert inside(offsets, spans).tolist() == [False, True, True, True, True]
    assert inside(np.zeros((0, 2), dtype=np.int64), spans).tolist() == []


def test_what_has_no_labels_is_refused():
    with pytest.raises(DataError, match=r"expected conversations, got text \('once'\); name the fields"):
        completions("once", tokenizer())
    with pytest.raises(DataError, match="expected a turn with the role assistant, got user; drop"):
        completions(turns("a"), tokenizer())
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match="writes answers as they are, got one that changes 'b'"):
        completions(turns("a", "b"), tokenizer(shouting))

    class Slow:
        def __call__(self, text, **options):
            raise NotImplementedError

    with pytest.raises(DataError, match="expected a fast tokenizer"):
        encode([("a", [(0, 1)])], Slow())


def test_a_stream_carries_the_mask_across_sequences_and_resumes(tmp_path, monkeypatch):
    """Packed with plain text: each token is the label that it is in its document, wherever sequences are cut."""
    monkeypatch.setattr("subquad.data.stream.TOKENISE_CHARS", 500)
    chats = [turns(f"an {i}?", f"a {i} " * (i % 5)) for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"q": c[0]["content"], "a": c[1]["content"]}) for c in chats))
    plain = Source("plain", lambda: iter(f"text {i}" for i in range(30)), weight=1)
    fast = tokenizer(CHATML)

    def make():
        sources = [parse_source(f"{path}#q+a,completions,weight=3"), plain]
        return TokenStream(sources, fast, batch=2, time=13, seed=1, fraction=0.1, chunk_tokens=300)

    whole = make()
    batches = [next(whole) for _ in range(60)]
    joined = torch.cat([torch.where(b.wanted_bt, b.tokens_bt, ~b.tokens_bt) for b in batches]).tolist()
    documents = [Rendered(*completions(c, fast)) for c in chats] + [Rendered(f"text {i}") for i in range(30)]
    pairs = {tuple(map(int, tokenise([d], fast))) for d in documents}
    inner = {pair for tokens in pairs for pair in pairwise(tokens)}
    ends = {tokens[-1] for tokens in pairs}
    assert all(pair in inner or pair[0] in ends for row in joined for pair in pairwise(row))
    assert 0.2 < torch.stack([b.wanted_bt for b in batches]).double().mean() < 0.8
    for stop in (0, 1, 7, 29, 50):
        first, fresh = make(), make()
        for _ in range(stop):
            next(first)
        fresh.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for batch in batches[stop:]:
            got = next(fresh)
            assert torch.equal(got.tokens_bt, batch.tokens_bt)
            assert torch.equal(got.wanted_bt, batch.wanted_bt)


def test_an_error_in_a_document_names_its_source():
    source = Source("talk.jsonl", lambda: iter(["text"]), completions=True)
    stream = TokenStream([source], tokenizer(), batch=1, time=8, fraction=0.0)
    with pytest.raises(DataError, match="talk.jsonl: completions: expected conversations"):
        next(stream)
