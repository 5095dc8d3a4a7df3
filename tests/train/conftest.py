"""A tiny teacher, a student with mapped mixers in some of its layers, and a stream for both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from subquad.core.registry import load
from subquad.data import Source, TokenStream
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train.stages import Work

FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}


class Bytes:
    """A tokenizer of 61 tokens."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text, *, add_special_tokens, verbose):
        return {"input_ids": [[c % 61 + 1 for c in t.encode()] for t in text]}


def stream(batch: int = 2, time: int = 12) -> TokenStream:
    texts = [f"document {i} says " + " ".join(str(i * j % 97) for j in range(30)) for i in range(60)]
    return TokenStream([Source("m", lambda: iter(texts))], Bytes(), batch=batch, time=time, chunk_tokens=600)


@pytest.fixture
def make_stream() -> Callable[..., TokenStream]:
    """``make_stream(batch, time)``."""
    return stream


@pytest.fixture
def make_work() -> Callable[..., Work]:
    """``make_work(slug, layers, train=..., n_layers=..., **options)``: the same every time."""

    def make(slug="mamba2", layers=(0, 2), *, n_layers=3, train=("*",), **options) -> Work:
        torch.manual_seed(0)
        teacher = Stack(ModelConfig(vocab_size=64, d_model=16, d_mlp=32, layers=(FULL,) * n_layers))
        student = Stack(teacher.config)
        student.load_state_dict(teacher.state_dict())
        described = list(teacher.config.layers)
        with torch.no_grad():
            for i in layers:
                mixer = load("mixers", slug).from_attention(teacher.blocks[i].mixer.weights(), **options)
                student.blocks[i].mixer = mixer
                described[i] = {"mixer": slug} | {
                    k: v for k, v in dataclasses.asdict(mixer.config).items() if k != "d_model"
                }
        student.config = dataclasses.replace(teacher.config, layers=tuple(described))
        return Work(teacher, teacher, student, layers, stream(), train)

    return make
