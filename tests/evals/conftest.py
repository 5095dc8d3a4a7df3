import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

CORPUS = (
    "The special magic number for cedar is 4821. What is the number? The grass is green, the sky is blue. "
    "The man turned on the faucet, therefore water flowed from the spout. 0 1 2 3 4 5 6 7 8 9 user assistant "
) * 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([CORPUS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|im_start|>", chat_template=TEMPLATE
    )


def attention_layer(**options):
    rotary = {"theta": 10000.0, "dim": 8}
    return {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": rotary} | options


@pytest.fixture(scope="session")
def make_model():
    """Build a tiny float64 stack with one attention layer for each dictionary of options."""

    def make(vocab_size, *layers, seed=0, **options):
        torch.manual_seed(seed)
        layers = tuple(attention_layer(**layer) for layer in layers)
        config = ModelConfig(vocab_size=vocab_size, d_model=32, d_mlp=48, layers=layers, tied=True, **options)
        stack = Stack(config).double().eval()
        with torch.no_grad():
            # A sharper head, so that likelihoods differ by more than rounding.
            stack.embed.weight.mul_(20)
        return stack

    return make


@pytest.fixture(scope="session")
def model(make_model, tokenizer):
    return make_model(len(tokenizer), {}, {"window": 8, "sinks": 1}, max_positions=256)


@pytest.fixture(scope="session")
def other(make_model, tokenizer):
    return make_model(len(tokenizer), {}, seed=1, max_positions=256)
