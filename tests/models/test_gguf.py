"""GGUF files: written as llama.cpp's converter lays them out, read back as the model they came from."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from subquad.core.errors import CheckpointError, UnsupportedError
from subquad.models.gguf import GGUF
from subquad.models.gguf_tokenizer import tokenizer
from subquad.models.teachers import load_teacher

VOCABULARY = ["<|end|>", "<|im_start|>", *"abcdefghijklmno123456789,.", "Ġ", "Ċ", "Ġa", "ab", "Ġab", "12", "abc"]
MERGES = ["Ġ a", "a b", "Ġa b", "1 2", "ab c"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|end|>{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config_of(cls, **options):
    return cls(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **options,
    )


def interleaved(weight, heads):
    """Rows of each head from halves to neighbouring pairs, as llama.cpp stores them."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, arch, *, pre="smollm", quantised=None, extra=(), **rope):
    """Write `model` with the header of `arch`; `quantised` names the type of the matrices."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3] + [1] * (len(VOCABULARY) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)
    for key, value in extra:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    if "divisors" in rope:
        writer.add_tensor("rope_freqs.weight", rope["divisors"].astype(np.float32))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            weight = interleaved(weight, heads)
        stem, suffix = name.rsplit(".", 1)
        parts = stem.split(".layers.")
        layer, stem = (
            (f"blk.{parts[1].split('.', 1)[0]}.", parts[1].split(".", 1)[1]) if len(parts) == 2 else ("", stem)
        )
        theirs = f"{layer}{NAMES[stem]}.{suffix}"
        if quantised is not None and weight.ndim == 2:
            writer.add_tensor(theirs, gguf.quantize(weight, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(theirs, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens_of(time):
    return torch.randint(0, len(VOCABULARY), (2, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", config_of(LlamaConfig, tie_word_embeddings=True, rms_norm_eps=1e-5)),
        ("llama", config_of(LlamaConfig, attention_bias=True, mlp_bias=True)),
        ("qwen3", config_of(Qwen3Config, head_dim=32)),
    ],
    ids=["smollm", "llama-biases", "qwen3"],
)
@torch.no_grad()
def test_file_equals_the_model_it_was_written_from(tmp_path, arch, config):
    theirs = random_model(config)
    loaded = load_teacher(write(tmp_path / "tiny.gguf", theirs, arch))
    tokens_bt = tokens_of(50)
    torch.testing.assert_close(loaded.model(tokens_bt), theirs(tokens_bt).logits, rtol=0, atol=2e-5)
    assert (loaded.name, loaded.license) == ("tiny", "apache-2.0")
    assert loaded.model.config.norm_eps == config.rms_norm_eps
    assert loaded.model.config.eos_tokens == (0,)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_quantised_tensors_are_what_the_format_says(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("subquad.models.gguf._RUN", 7)  # so that a tensor takes several runs, the last one short
    theirs = random_model(config_of(LlamaConfig))
    file = GGUF(write(tmp_path / "q.gguf", theirs, "llama", quantised=kind))
    weight = theirs.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
    np.testing.assert_array_equal(file.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy(), expected)
    assert np.abs(expected - weight).max() > 1e-4


@pytest.mark.parametrize("factor", [8.0, 32.0])
@torch.no_grad()
def test_llama3_scaling_is_recognised_from_its_table(tmp_path, factor):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = random_model(config_of(LlamaConfig, head_dim=64, rope_parameters=scaling))
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    divisors = plain / theirs.model.rotary_emb.inv_freq.double().numpy()
    assert divisors.max() == pytest.approx(factor, rel=1e-5)
    assert 1.01 < np.sort(divisors)[np.searchsorted(np.sort(divisors), 1.01)] < factor
    file = GGUF(write(tmp_path / "l3.gguf", theirs, "llama", divisors=divisors))
    assert file.config()["rope_parameters"] == scaling
    other = GGUF(write(tmp_path / "l4.gguf", theirs, "llama", divisors=divisors * 1.1))
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        other.config()


def test_tokenizer_special_tokens_and_chat_template(tmp_path):
    file = GGUF(write(tmp_path / "t.gguf", random_model(config_of(LlamaConfig)), "llama"))
    tok = tokenizer(file)
    assert (tok.bos_token, tok.eos_token, tok.eos_token_id) == ("<|im_start|>", "<|end|>", 0)
    assert tok.tokenize("ab abc 12") == ["ab", "Ġab", "c", "Ġ", "1", "2"]
    assert tok.decode(tok("ab abc, 129.").input_ids) == "ab abc, 129."
    assert tok.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=True, return_dict=False) == [
        1,
        VOCABULARY.index("ab"),
        0,
    ]
    assert tok.model_max_length == 128
    llama3 = tokenizer(GGUF(write(tmp_path / "u.gguf", random_model(config_of(LlamaConfig)), "llama", pre="llama-bpe")))
    assert llama3.tokenize("ab 12") == ["ab", "Ġ", "12"]
    assert llama3("ab").input_ids[0] == 1


def test_sentencepiece_tokenizer_merges_by_score(tmp_path):
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|x|>": 4} | {f"<0x{i:02X}>": 6 for i in range(256)}
    # The best-scored union first: "el" goes before "he", and "ell" can only come from "el" and "l", before "lo".
    pieces |= dict.fromkeys(["el", "he", "ell", "lo", "▁h", "▁", "h", "e", "l", "o", "w"], 1)
    writer = gguf.GGUFWriter(str(tmp_path / "s.gguf"), "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(pieces))
    writer.add_token_scores([float(-i) for i in range(len(pieces))])
    writer.add_token_types(list(pieces.values()))
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tok = tokenizer(GGUF(tmp_path / "s.gguf"))
    assert tok.tokenize("hello how") == ["▁h", "ell", "o", "▁h", "o", "w"]
    assert tok.tokenize("he<|x|>helo") == ["▁", "he", "<|x|>", "▁h", "el", "o"]
    assert tok.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    ids = tok("hello é  w").input_ids
    assert ids[0] == tok.bos_token_id == 1
    assert tok.decode(ids, skip_special_tokens=True) == "hello é  w"


def test_what_is_not_understood_is_refused(tmp_path):
    theirs = random_model(config_of(LlamaConfig))
    path = write(tmp_path / "a.gguf", theirs, "llama", extra=[("llama.attention.clamp_kqv", 8.0)])
    with pytest.raises(UnsupportedError, match=r"llama\.attention\.clamp_kqv"):
        load_teacher(path)
    path = write(tmp_path / "b.gguf", theirs, "llama", extra=[("llama.rope.scaling.type", "longrope")])
    with pytest.raises(UnsupportedError, match="longrope"):
        load_teacher(path)
    path = write(tmp_path / "c.gguf", theirs, "llama", pre="deepseek-llm")
    with pytest.raises(UnsupportedError, match="deepseek-llm"):
        load_teacher(path)
    path = write(tmp_path / "d.gguf", theirs, "gemma2")
    with pytest.raises(UnsupportedError, match="llama, qwen2, qwen3"):
        load_teacher(path)


def test_damaged_files_say_so(tmp_path):
    path = write(tmp_path / "a.gguf", random_model(config_of(LlamaConfig)), "llama")
    content = path.read_bytes()
    for size, words in ((len(content) - 5000, "cut short at tensor"), (600, "cut short"), (0, "expected a GGUF file")):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=words):
            load_teacher(path)
    path.write_bytes(content[:8] + b"\xff" * 100)
    with pytest.raises(CheckpointError, match="damaged in its header"):
        load_teacher(path)
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(CheckpointError, match="expected a GGUF file"):
        load_teacher(path)
