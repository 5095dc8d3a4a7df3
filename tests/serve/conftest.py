"""Two tiny models behind one real server: random numbers, and one that writes a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from subquad.decode.copyspec import CopySpec
from subquad.engine.generate import Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.load import LoadedModel
from subquad.models.stack import Stack
from subquad.serve.app import create_app
from subquad.serve.bounds import Bounds
from subquad.serve.guard import Keys
from subquad.serve.served import Room, Served
from subquad.serve.server import Server, make_server
from subquad.serve.site import Site

SCRIPT = ["Let me add. ", "<tool_call>", '{"name": "add", ', '"arguments": {"a": 1, ', '"b": 2}}', "</tool_call>"]
VOCAB = 258 + len(SCRIPT)
TEMPLATE = (
    "<s>{% if tools %}{% for t in tools %}[tool:{{ t | tojson }}]{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a:{% endif %}"
)
ATTENTION = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
RECURRENT = {"mixer": "gla", "n_heads": 2, "key_dim": 8, "value_dim": 8}


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, a start token before plain text, and a token for each part of the script."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens([AddedToken(part, normalized=False) for part in SCRIPT])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template, model_max_length=10**9
    )


def make_model() -> Stack:
    """Random weights, in float64: what is computed together equals what is computed alone."""
    torch.manual_seed(0)
    layers = (ATTENTION, RECURRENT)
    model = Stack(ModelConfig(VOCAB, 16, 32, layers, max_positions=8192, eos_tokens=(257,)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().requires_grad_(False)


def make_scripted() -> Stack:
    """A bigram: a colon begins the script, each part of it is followed by the next, and anything else by itself."""
    model = Stack(ModelConfig(VOCAB, VOCAB, 8, (ATTENTION,), max_positions=8192, eos_tokens=(257,)))
    following = list(range(VOCAB))
    following[make_tokenizer().encode(":")[-1]] = 258
    following[258:] = [*range(259, VOCAB), 257]
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.zero_()
        model.embed.weight.copy_(torch.eye(VOCAB))
        model.lm_head.weight.zero_()
        model.lm_head.weight[following, range(VOCAB)] = 10.0
    return model.double().requires_grad_(False)


@dataclass
class Running:
    """A server in a thread of this process."""

    server: Server
    site: Site
    url: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60, **options)

    def served(self, name: str = "tiny") -> Served:
        return self.site.named(name)

    def single(self, prompt: Sequence[int], n: int, sampling: SamplingConfig | None = None, **limits: Any) -> Any:
        """What the model gives alone, without a server."""
        loaded = self.served().loaded
        (result,) = generate(
            loaded.model,
            [prompt],
            limits=Limits(n, end_tokens=[257], **limits),
            sampling=sampling,
            tokenizer=loaded.tokenizer,
            logprobs=True,
        )
        return result


def build(room: Room, bounds: Bounds, keys: Sequence[str] = ()) -> Running:
    tokenizer = make_tokenizer()
    both = {"tiny": make_model(), "scripted": make_scripted()}
    served = [
        Served.build(LoadedModel(model, tokenizer, name, name), name, room, drafter=CopySpec())
        for name, model in both.items()
    ]
    site = Site(served, bounds)
    server = make_server(create_app(site, Keys(keys)), site, "127.0.0.1", 0)
    for one in served:
        one.start()
    return Running(server, site, "")


def run(running: Running) -> Iterator[Running]:
    thread = threading.Thread(target=running.server.run)
    thread.start()
    wait_for(lambda: running.server.started and all(one.worker.ready for one in running.site.served))
    port = running.server.servers[0].sockets[0].getsockname()[1]
    running.url = f"http://127.0.0.1:{port}"
    yield running
    running.server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def wait_for(holds: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    yield from run(build(Room(rows=4, tokens=2048, prefix_bytes=2**24, queue=64), Bounds(body_bytes=2**16)))


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return running.client()
