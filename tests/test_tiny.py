"""A tour of the library in ten tests, bottom to top: the file to open first. All of it has its own tests elsewhere."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import subquad.hf  # noqa: F401
from subquad.convert.transplant import transplant
from subquad.core.config import config_from_dict
from subquad.core.layout import Layout
from subquad.core.registry import load, methods
from subquad.core.state import State
from subquad.data import Source, TokenStream
from subquad.engine.generate import Limits, generate
from subquad.evals.perplexity import perplexity, perplexity_ratio
from subquad.evals.text import tokenize_text
from subquad.models.checkpoint import from_pretrained, save_pretrained
from subquad.models.stack import Stack
from subquad.models.teachers import from_transformers
from subquad.ops import ssd
from subquad.train.checkpoint import RunFolder
from subquad.train.optimiser import Rate
from subquad.train.pipeline import Models, fit
from subquad.train.recipe import Phase, Recipe

TEXT = " ".join(f"the {a} {b} saw a {b} {a}" for a, b in itertools.permutations(["red", "old", "cat", "dog", "sea"], 2))
WORDS = sorted({"<end>", *TEXT.split()})
HYBRID = {1: "windowed_linear", 2: "mamba2", 3: "gated_deltanet"}
close = torch.testing.assert_close


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A pretrained model, but for the training: random weights at a tiny size."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": len(WORDS)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double().eval()


@pytest.fixture
def teacher(llama) -> Stack:
    return from_transformers(llama)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(len(WORDS), shape)


def test_1_an_operation_is_its_equation():
    """Fast forms are proved against a loop that any reader can check against the paper."""
    b, t, h, k, v = 2, 130, 2, 8, 4
    q, key, value = torch.randn(b, t, h, k), torch.randn(b, t, h, k), torch.randn(b, t, h, v)
    arguments = [x.double() for x in (q, key, value, -torch.rand(b, t, h), torch.randn(b, h, k, v))]
    y_bthv, state_bhkv = ssd.equation(*arguments)
    close(ssd.scan(*arguments)[0], y_bthv)
    close(ssd.final_state(*arguments[1:]), state_bhkv)


def test_2_methods_are_found_by_their_cards():
    """Nothing registers itself: a file with a card is a method, and its config refuses what it doesn't know."""
    cards = methods("mixers")
    assert {"attention", "windowed_linear", "mamba2", "gated_deltanet"} <= set(cards)
    assert cards["mamba2"].arxiv == "2405.21060"
    mamba2 = load("mixers", "mamba2")
    with pytest.raises(ValueError, match="did you mean 'n_heads'"):
        config_from_dict(mamba2.Config, {"d_model": 32, "n_head": 4})


@pytest.mark.parametrize("slug", [slug for slug, card in methods("mixers").items() if card.causal])
def test_3_read_then_commit(slug):
    """Reading changes nothing, so of a block any part may be kept: here 5 and 0 tokens of a draft of 8."""
    cls = load("mixers", slug)
    for values in methods("mixers")[slug].examples.values():
        mixer = cls(config_from_dict(cls.Config, values)).double()
        x_btd = torch.randn(2, 20, mixer.config.d_model, dtype=torch.float64)
        state = mixer.read(x_btd[:, :12], mixer.init_state(2, capacity=20))[1].commit()
        _, update = mixer.read(x_btd[:, 12:], state, Layout.dense(2, 8, start_b=12))
        kept = update.commit(torch.tensor([5, 0]))
        y_btd, _ = mixer.read(x_btd[:1, 17:], kept.select(torch.tensor([0])), Layout.dense(1, 3, start_b=17))
        close(y_btd, mixer(x_btd)[:1, 17:])
        y_btd, _ = mixer.read(x_btd[1:, 12:], kept.select(torch.tensor([1])), Layout.dense(1, 8, start_b=12))
        close(y_btd, mixer(x_btd)[1:, 12:])


def test_4_a_teacher_is_a_stack_with_the_same_logits(llama, teacher):
    tokens_bt = tokens(2, 40)
    close(teacher(tokens_bt), llama(tokens_bt).logits)


def test_5_a_hybrid_starts_from_its_teacher(teacher):
    """Any layer takes any mixer; one that can be exact is: here the text fits into the window."""
    tokens_bt = tokens(2, 40)
    exact = transplant(teacher, {i: {"mixer": "windowed_linear", "window": 64} for i in (1, 3)})
    close(exact(tokens_bt), teacher(tokens_bt))
    hybrid = transplant(teacher, HYBRID)
    assert [layer["mixer"] for layer in hybrid.config.layers] == ["attention", *HYBRID.values()]


def test_6_state_is_explicit(teacher, tmp_path):
    """It can be forked, saved and resumed anywhere; only attention's part grows with the context."""
    hybrid, tokens_bt = transplant(teacher, HYBRID), tokens(1, 40)
    _, update = hybrid.read(tokens_bt[:, :30], hybrid.init_state(1, capacity=40))
    update.commit().fork(2).save(tmp_path / "conversation.safetensors")
    resumed = State.load(tmp_path / "conversation.safetensors")
    hidden_btd, _ = hybrid.read(tokens_bt[:, 30:].repeat(2, 1), resumed)
    close(hybrid.head(hidden_btd), hybrid(tokens_bt)[:, 30:].repeat(2, 1, 1))

    def growth(model: Stack) -> int:
        return model.init_state(1, 2000, device="meta").nbytes - model.init_state(1, 1000, device="meta").nbytes

    assert growth(hybrid) * 4 == growth(teacher)


def test_7_alignment_learns_the_attention(teacher, tokenizer, tmp_path):
    """Every new mixer learns its own layer's output from the teacher's stream, all layers in parallel."""
    hybrid = transplant(teacher, HYBRID)
    stream = TokenStream([Source("tiny", lambda: iter([TEXT] * 20))], tokenizer, batch=4, time=32, fraction=0.0)
    recipe = Recipe((Phase("align", Rate(lr=1e-2), tokens=40 * 4 * 32),))
    fit(Models(teacher, hybrid, sorted(HYBRID)), lambda _: stream, recipe, RunFolder(tmp_path))
    first, *_, last = RunFolder(tmp_path).lines()
    assert last["loss"] < 0.5 * first["loss"]


def test_8_a_ratio_comes_with_its_interval(teacher, tokenizer):
    """Teacher and student are scored on the same windows, so the interval is of the difference."""
    text = tokenize_text(tokenizer, TEXT)
    ours, theirs = perplexity(transplant(teacher, HYBRID), text, 32), perplexity(teacher, text, 32)
    ratio = perplexity_ratio(ours, theirs)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(ours.perplexity.value / theirs.perplexity.value)


def test_9_a_batch_gives_what_each_prompt_would_get_alone(teacher, tokenizer):
    hybrid = transplant(teacher, HYBRID)
    prompts, limits = [tokens(n).tolist() for n in (3, 17, 9)], Limits(max_new_tokens=20)
    together = generate(hybrid, prompts, limits=limits, tokenizer=tokenizer)
    alone = [generate(hybrid, [prompt], limits=limits, tokenizer=tokenizer)[0] for prompt in prompts]
    assert [result.tokens for result in together] == [result.tokens for result in alone]


def test_10_a_checkpoint_is_the_model_bit_for_bit(teacher, tokenizer, tmp_path):
    """Ours to load, and after `import subquad.hf` the Auto classes' too."""
    hybrid, tokens_bt = transplant(teacher, HYBRID), tokens(1, 24)
    save_pretrained(hybrid, tmp_path / "hybrid", tokenizer)
    loaded = from_pretrained(tmp_path / "hybrid")
    assert loaded.config == hybrid.config
    assert torch.equal(loaded(tokens_bt), hybrid(tokens_bt))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype=torch.float64)
    close(theirs(tokens_bt).logits, hybrid(tokens_bt))
