"""Result files: what a figure must carry to be believed."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import subquad
from subquad.core.config import config_from_dict
from subquad.core.errors import ConfigError
from subquad.train.checkpoint import write_atomically

VERSIONED = ("subquad", "torch", "triton", "transformers", "flash-linear-attention")


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        id: dotted and stable; it starts with the bench's name.
        value: the figure.
        unit: of `value` and `baseline_value`.
        better: ``higher`` or ``lower``.
        baseline: what it is compared with, or "".
        baseline_value: the baseline's figure from the same run, or None.
        ratio: above 1 always means that ours is better; None without a baseline.
        limit_share: time the physical limit allows over the time taken, or None where nothing is timed.
        shape: sizes by name.
        dtype: dtype of what was measured.
        reps: every repetition in order, ``[ours, baseline]`` or ``[ours]``, in `unit`.
        interval: 95 % limits of `value` where it is an estimate, else empty.
    """

    id: str
    value: float
    unit: str
    better: str
    baseline: str = ""
    baseline_value: float | None = None
    ratio: float | None = None
    limit_share: float | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    reps: list[list[float]] = field(default_factory=list)
    interval: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """One file: the figures of one run of one bench.

    Attributes:
        bench: dotted name.
        command: what was typed to get it.
        env: ``device``, ``dtype``, ``versions``, ``commit`` and ``date``; also ``limits``, the bandwidth and peak of
            the same run, where a row has a share of them.
        rows: the figures.
        gates: what was proved before anything was timed: ``what``, ``error``, ``limit``, and by which ``measure``.
    """

    bench: str
    command: str
    env: dict[str, Any]
    rows: list[Row]
    gates: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Check, then write as JSON; an old file stays until the new one is whole."""
        self.check(str(path))
        text = json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def check(self, where: str) -> None:
        """Raise `ConfigError` unless everything a reader needs is there and consistent."""

        def expect(ok: bool, expected: str, got: object) -> None:
            if not ok:
                raise ConfigError(f"{where}: expected {expected}, got {got!r}; run the bench again")

        for key in ("device", "dtype", "versions", "commit", "date"):
            expect(bool(self.env.get(key)), f"env.{key}", self.env)
        expect(bool(self.command), "the command", self.command)
        expect(bool(self.rows), "at least one row", self.rows)
        ids = [row.id for row in self.rows]
        expect(len(set(ids)) == len(ids), "ids that differ", ids)
        for row in self.rows:
            expect(row.id.startswith(f"{self.bench}."), f"an id below {self.bench}.", row.id)
            expect(row.better in ("higher", "lower"), f"{row.id}: better higher or lower", row.better)
            expect(bool(row.unit) and math.isfinite(row.value), f"{row.id}: a finite value and a unit", row.value)
            expect(
                bool(row.baseline) == (row.baseline_value is not None), f"{row.id}: a baseline's name and value", row
            )
            right = ratio(row.value, row.baseline_value, row.better)
            same = row.ratio == right or (row.ratio and right and math.isclose(row.ratio, right, rel_tol=1e-6))
            expect(bool(same), f"{row.id}: ratio {right}", row.ratio)
            sizes = {1 if row.baseline_value is None else 2}
            expect({len(r) for r in row.reps} <= sizes, f"{row.id}: repetitions of {sizes} figures", row.reps)


def ratio(value: float, baseline_value: float | None, better: str) -> float | None:
    """How many times better `value` is than `baseline_value`; None where there is none or it is 0 over 0."""
    if baseline_value is None:
        return None
    over, under = (value, baseline_value) if better == "higher" else (baseline_value, value)
    return over / under if under else None


def load_result(path: Path) -> Result:
    """Read and check a result file.

    Raises:
        ConfigError: it is not JSON, has a missing or unknown key, or contradicts itself.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: expected JSON, got {error}; run the bench again") from error
    rows = [config_from_dict(Row, row, where=f"{path}: row {i}") for i, row in enumerate(data.get("rows", []))]
    result = config_from_dict(Result, data | {"rows": rows}, where=str(path))
    result.check(str(path))
    return result


def make_row(
    id: str,
    value: float,
    unit: str,
    better: str,
    *,
    baseline: str = "",
    baseline_value: float | None = None,
    limit_share: float | None = None,
    shape: Mapping[str, Any] | None = None,
    dtype: str = "",
    reps: Sequence[Sequence[float]] = (),
    interval: Sequence[float] = (),
) -> Row:
    """A `Row` with its ratio worked out."""
    return Row(
        id=id,
        value=float(value),
        unit=unit,
        better=better,
        baseline=baseline,
        baseline_value=None if baseline_value is None else float(baseline_value),
        ratio=ratio(value, baseline_value, better),
        limit_share=limit_share,
        shape=dict(shape or {}),
        dtype=dtype,
        reps=[list(r) for r in reps],
        interval=list(interval),
    )


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where a figure was measured: device, threads, dtype, versions, commit, date."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The maker's name of a device, as `NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or device.type


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def device_kind(device: torch.device) -> str:
    """`device` in one word: ``cpu``, ``h100``."""
    model = re.search(r"\b[A-Z]+\d+\w*", device_name(device)) if device.type == "cuda" else None
    return model[0].lower() if model else device.type


def result_path(folder: Path, bench: str, device: torch.device) -> Path:
    """Where the result of `bench` on `device` lies: ``mixers.mamba2.cpu.json``, ``mixers.mamba2.h100.json``."""
    kind = device_kind(device)
    return folder / f"{bench.removesuffix(f'.{kind}')}.{kind}.json"


def _commit() -> str:
    """The checkout's commit, with ``+changes`` where tracked files differ from it.

    A copy without history is told its commit in SUBQUAD_COMMIT; an installed release is its version.
    """

    def git(*args: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    if told := os.environ.get("SUBQUAD_COMMIT"):
        return told
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../../../pyproject.toml")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return f"release {subquad.__version__}"
