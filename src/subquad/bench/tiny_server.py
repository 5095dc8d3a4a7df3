"""A checkpoint small enough that a server of it shows the server's own behaviour."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

ATTENTION: dict[str, Any] = {
    "mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8},
}  # fmt: skip
RECURRENT: dict[str, Any] = {"mixer": "gla", "n_heads": 2, "key_dim": 8, "value_dim": 8}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a:{% endif %}"
)
END = 256


def save_tiny(folder: Path) -> None:
    """Save a hybrid of two layers with random weights and one token a byte.

    It is in float64: what is computed together equals what is computed alone.
    """
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", chat_template=TEMPLATE, model_max_length=10**9
    )
    generator = torch.Generator().manual_seed(0)
    model = Stack(ModelConfig(END + 1, 16, 32, (ATTENTION, RECURRENT), max_positions=8192, eos_tokens=(END,))).double()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.1 * torch.randn(weights.shape, generator=generator, dtype=weights.dtype))
    save_pretrained(model, folder, tokenizer)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return line.getsockname()[1]


@dataclass
class Process:
    """``subquad serve`` as a process.

    Attributes:
        id: of the process.
        host, port: where it listens.
    """

    id: int
    host: str
    port: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"

    @property
    def memory(self) -> int:
        """Bytes of the process that are in memory."""
        return self._status("VmRSS")

    @property
    def peak(self) -> int:
        """Most bytes in memory since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """Measure the peak from now on."""
        Path(f"/proc/{self.id}/clear_refs").write_text("5")

    def _status(self, field: str) -> int:
        lines = Path(f"/proc/{self.id}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def started(folder: Path, *options: str) -> Generator[Process]:
    """A server of a checkpoint on this machine's CPU, ready; it must be there at the end as well.

    Raises:
        RuntimeError: it has not started, or has ended before it was told to.
    """
    command = [sys.executable, "-m", "subquad.cli", "serve", str(folder), "--name", "tiny", "--port", "0"]
    with subprocess.Popen([*command, "--device", "cpu", *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told: list[str] = []
        try:
            for line in process.stderr:
                told.append(line)
                if found := re.search(r"running on http://([\d.]+):(\d+)", line):
                    break
            else:
                raise RuntimeError("the server has not started: " + "".join(told[-20:]))
            # Nobody reads the log from here on, but its pipe must not fill.
            threading.Thread(target=lambda: deque(process.stderr or (), maxlen=0), daemon=True).start()
            server = Process(process.pid, found[1], int(found[2]))
            while httpx.get(f"{server.url}/ready").status_code != 200:
                time.sleep(0.05)
            yield server
            if process.poll() is not None:
                raise RuntimeError(f"the server has ended with {process.returncode}")
        finally:
            process.kill()
