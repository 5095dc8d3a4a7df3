"""Our checkpoints through transformers: loaded by the Auto classes, generating what our own loop generates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from subquad.core.errors import CheckpointError, UnsupportedError
from subquad.hf import SubquadForCausalLM
from subquad.models.checkpoint import from_pretrained, save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
WINDOW = ATTENTION | {"window": 6, "sinks": 2}
MAMBA2 = {"mixer": "mamba2", "n_heads": 2, "key_dim": 8, "value_dim": 8}
DELTA = {"mixer": "gated_deltanet", "n_heads": 2, "key_dim": 8, "value_dim": 8}
CONFIG = ModelConfig(
    vocab_size=50, d_model=16, d_mlp=32, layers=(ATTENTION, MAMBA2, WINDOW, DELTA), tied=True, eos_tokens=(49,)
)
PROMPTS = [[5, 7, 9, 11, 13, 17, 19], [3, 4], [21, 22, 23, 24, 25]]


@pytest.fixture(scope="module")
def stack():
    torch.manual_seed(0)
    stack = Stack(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        stack.embed.weight.normal_(std=0.7)
    return stack


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_pretrained(stack, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_same_logits(got, expected):
    """Equal within 1e-5 of the largest logit, some forty roundings of float32."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def padded(side="left"):
    width = max(map(len, PROMPTS))
    rows = [[0] * (width - len(p)) + p if side == "left" else p + [0] * (width - len(p)) for p in PROMPTS]
    mask = [
        [0] * (width - len(p)) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * (width - len(p))
        for p in PROMPTS
    ]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def greedy(stack, prompt, n):
    """Greedy decoding by the full forward pass at every step; and the smallest gap between the best two."""
    tokens, gap = list(prompt), float("inf")
    for _ in range(n):
        best = stack(torch.tensor([tokens]))[0, -1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
        if tokens[-1] in stack.config.eos_tokens:
            break
    return tokens[len(prompt) :], gap


def test_auto_classes_give_the_same_model(folder, stack, model):
    assert type(model) is SubquadForCausalLM
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers, config.eos_token_id) == (
        "subquad",
        16,
        4,
        [49],
    )
    assert config.model_config() == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), stack.parameters(), strict=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.num_parameters() == sum(p.numel() for p in stack.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_logits_equal_each_row_alone(model, stack, side):
    batch = padded(side)
    logits = model(**batch).logits
    for i, prompt in enumerate(PROMPTS):
        got = logits[i][batch["attention_mask"][i] == 1]
        assert_same_logits(got, stack(torch.tensor([prompt]))[0])
    last = model(**batch, logits_to_keep=1).logits
    torch.testing.assert_close(last, logits[:, -1:])


def test_greedy_equals_our_own_with_a_cache_that_grows(model, stack):
    new = 90  # beyond the first capacity of the cache
    out = model.generate(**padded(), max_new_tokens=new, do_sample=False, pad_token_id=0)
    for i, prompt in enumerate(PROMPTS):
        expected, gap = greedy(stack, prompt, new)
        assert gap > 1e-4, "a near-tie: choose another seed"
        assert out[i, 7 : 7 + len(expected)].tolist() == expected
        assert len(set(expected)) > 5
    uncached = model.generate(**padded(), max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(uncached, out[:, : uncached.shape[1]])


def test_sampling_follows_the_seed_and_the_distribution(model, stack):
    prompt = torch.tensor([PROMPTS[0]])
    draw = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": 4000, "top_k": 0, "pad_token_id": 0}
    torch.manual_seed(3)
    first = model.generate(prompt, **draw)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(prompt, **draw))
    counts = torch.bincount(first[:, -1], minlength=50).double()
    with torch.no_grad():
        p = stack(prompt)[0, -1].softmax(-1).double()
    expected = 4000 * p
    frequent = expected > 5
    chi2 = ((counts - expected)[frequent].square() / expected[frequent]).sum()
    assert chi2 < frequent.sum() + 4 * (2 * frequent.sum()).sqrt()
    assert frequent.sum() > 5


def test_returned_sequences_go_their_own_ways(model, stack):
    torch.manual_seed(0)
    out = model.generate(
        **padded(),
        do_sample=True,
        max_new_tokens=20,
        num_return_sequences=3,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences.shape[0] == 9
    assert len({tuple(row) for row in out.sequences.tolist()}) == 9
    # Every step's logits are those of the row's own past: nothing leaked between the rows of the state.
    for i in range(9):
        prompt = PROMPTS[i // 3]
        new = out.sequences[i, 7:].tolist()
        with torch.no_grad():
            expected = stack(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
        got = torch.stack([step[i] for step in out.logits])
        until = new.index(49) + 1 if 49 in new else len(new)
        assert_same_logits(got[:until], expected[:until])


def test_beam_search_finds_the_best_of_all_short_continuations(model, stack):
    prompt = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        first = stack(prompt)[0, -1].log_softmax(-1)
        rows = torch.cat((prompt.expand(50, -1), torch.arange(50)[:, None]), 1)
        second = stack(rows)[:, -1].log_softmax(-1)
    total = first[:, None] + second
    total[49] = -torch.inf  # the end token ends
    best = divmod(total.argmax().item(), 50)
    out = model.generate(
        prompt, num_beams=50, max_new_tokens=2, do_sample=False, pad_token_id=0, length_penalty=0.0, eos_token_id=None
    )
    assert tuple(out[0, 2:].tolist()) == best
    alone = model.generate(prompt, num_beams=4, max_new_tokens=15, do_sample=False, pad_token_id=0)
    uncached = model.generate(prompt, num_beams=4, max_new_tokens=15, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(alone, uncached)


def test_a_conversation_goes_on_from_its_cache(model):
    torch.manual_seed(0)
    batch = {"input_ids": torch.tensor([PROMPTS[0]]), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**batch, return_dict_in_generate=True)
    longer = torch.cat((out.sequences, torch.tensor([[30, 31]])), 1)
    fresh = model.generate(longer, max_new_tokens=6, do_sample=False, pad_token_id=0)
    continued = model.generate(
        longer, past_key_values=out.past_key_values, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(fresh, continued)


def test_assisted_decoding_is_refused(model):
    prompt = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(prompt, assistant_model=model, max_new_tokens=4)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="can't be cropped"):
        model(prompt, use_cache=True).past_key_values.crop(2)


def test_loss_and_gradients(model, stack):
    batch = padded("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels)
    assert out.past_key_values is None
    logits = torch.cat([stack(torch.tensor([p]))[0, :-1] for p in PROMPTS])
    targets = torch.tensor([t for p in PROMPTS for t in p[1:]])
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, targets))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


@torch.no_grad()
def test_positions_that_restart_are_documents_and_others_are_refused(model, stack):
    row = torch.tensor([PROMPTS[0] + PROMPTS[1] + PROMPTS[2]])
    positions = torch.cat([torch.arange(len(p)) for p in PROMPTS])[None]
    logits = model(row, position_ids=positions).logits[0]
    alone = torch.cat([stack(torch.tensor([p]))[0] for p in PROMPTS])
    assert_same_logits(logits, alone)
    assert_same_logits(model(row, position_ids=torch.arange(14)[None]).logits, stack(row))
    with pytest.raises(UnsupportedError, match="position_ids"):
        model(row, position_ids=torch.arange(3, 17)[None])
    with pytest.raises(UnsupportedError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_again(model, stack, tmp_path, dtype):
    again = AutoModelForCausalLM.from_pretrained(_saved(model, tmp_path / "a"), dtype=dtype)
    assert again.dtype == dtype
    assert again.generation_config.repetition_penalty == 1.3
    again.save_pretrained(tmp_path / "b", state_dict=again.state_dict())
    back = from_pretrained(tmp_path / "b")
    expected = again.model.state_dict()
    assert all(torch.equal(t, expected[k]) and t.dtype == expected[k].dtype for k, t in back.state_dict().items())
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "b"))
    assert new.model.config == CONFIG
    assert new.model.lm_head.weight is new.model.embed.weight


def _saved(model, folder):
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    model.generation_config.repetition_penalty = None
    return folder


def test_what_can_not_be_done_is_said(folder, model, tmp_path):
    with pytest.raises(UnsupportedError, match="quantization_config"):
        SubquadForCausalLM.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(UnsupportedError, match="one device"):
        SubquadForCausalLM.from_pretrained(folder, device_map={"a": 0, "b": 1})
    with pytest.raises(UnsupportedError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(CheckpointError, match="neither a folder nor a model on the hub"):
        SubquadForCausalLM.from_pretrained("nobody/nothing", local_files_only=True)
