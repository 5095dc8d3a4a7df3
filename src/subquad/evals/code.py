"""Judge code that a model wrote, in processes of their own.

Each program runs in an empty folder that is deleted afterwards, without site packages, environment or input, with
limits on processor time, memory, files and processes, and an audit hook that refuses sockets, other programs and
changes to files; on Linux without a network where the kernel allows to leave it. These are fences against mistakes of a
model. They are no prison for an enemy: run models that you don't trust in a container.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUNNER = Path(__file__).parent / "code_runner.py"


def passes(
    programs: Sequence[tuple[str, str]], *, seconds: float = 5.0, memory: int = 2**30, workers: int | None = None
) -> list[bool]:
    """Whether each program's ``check(candidate)`` comes back without an error.

    Args:
        programs: source that defines ``check`` and the candidate, and the candidate's name.
        seconds: of wall time.
        memory: bytes of address space.
        workers: programs run at once; None is one a core.
    """
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        running = [pool.submit(_passes, source, entry, seconds, memory) for source, entry in programs]
        return [one.result() for one in running]


def _passes(source: str, entry: str, seconds: float, memory: int) -> bool:
    # What comes last must be this token: a program that merely exits early has passed nothing.
    token = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", str(RUNNER), token, entry, str(int(seconds * 1.5) + 1), str(memory)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(source.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return process.returncode == 0 and out == token.encode()
