"""Charts hold the figures of their result file, and the committed ones are up to date."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import torch

from subquad.bench.plots import plots, refresh_plots
from subquad.bench.results import Result, environment, make_row

RESULTS = Path(__file__).resolve().parents[2] / "bench/results"


def result(lengths: tuple[int, ...]) -> Result:
    rows = [make_row("ops.some.step.b64", 0.1, "ms", "lower", baseline="copy", baseline_value=0.09)]
    for t in lengths:
        rows += [
            make_row(
                f"ops.some.fwd.t{t}", t / 100, "ms", "lower", baseline="fla", baseline_value=t / 50, limit_share=0.5
            ),
            make_row(f"ops.some.fwd_sdpa.t{t}", t / 100, "ms", "lower", baseline="SDPA", baseline_value=t / 10),
        ]
    rows.append(make_row("ops.some.fwd_torch.t100", 1.0, "ms", "lower", baseline="PyTorch", baseline_value=7.0))
    return Result("ops.some", "subquad bench ops/some", environment(torch.device("cpu"), torch.float32), rows)


def test_ours_every_baseline_and_the_limit_over_length() -> None:
    (chart,) = plots(result((100, 400))).values()
    assert chart.series == {
        "limit": [(100, 0.5), (400, 2)],
        "subquad": [(100, 1), (400, 4)],
        "fla": [(100, 2), (400, 8)],
        "SDPA": [(100, 10), (400, 40)],
    }
    assert chart.log_x and chart.log_y and [name for _, name in chart.ticks] == ["100", "400"]


def test_speed_over_the_context_for_each_batch_of_several() -> None:
    rows = [
        make_row(f"decode.some.context.b{b}.t{t}", b * t, "tokens/s", "higher", baseline="attention", baseline_value=b)
        for b, contexts in ((1, (1024,)), (12, (4096, 1024)))
        for t in contexts
    ]
    env = environment(torch.device("cpu"), torch.float32)
    charts = plots(Result("decode.some", "subquad bench engine", env, rows))
    assert charts.keys() == {"context_b12"}
    chart = charts["context_b12"]
    assert chart.series == {"subquad": [(1024, 12288), (4096, 49152)], "attention": [(1024, 12), (4096, 12)]}
    assert chart.log_x and [name for _, name in chart.ticks] == ["1k", "4k"]


def test_speed_and_acceptance_over_the_rows_of_a_drafter() -> None:
    rows = [make_row("spec.some.hybrid.t1.b1", 2.0, "tokens/s", "higher", baseline="plain", baseline_value=2.0)]
    for b, ratio in ((8, 3.0), (1, 1.5)):
        id = f"spec.some.attention.greedy.b{b}"
        rows.append(make_row(id, b * ratio, "tokens/s", "higher", baseline="plain", baseline_value=b))
        rows.append(make_row(f"{id}.chat", b, "tokens/s", "higher", baseline="plain", baseline_value=b))
        rows.append(make_row(f"{id}.accepted", 1 / b, "1", "higher"))
    charts = plots(Result("spec.some", "subquad bench decode", environment(torch.device("cpu"), torch.float32), rows))
    assert {what: chart.series for what, chart in charts.items()} == {
        "speedup": {"attention, greedy": [(1, 1.5), (8, 3.0)]},
        "accepted": {"attention, greedy": [(1, 1.0), (8, 0.125)]},
    }


def test_quality_over_bytes_of_kinds_with_several_sizes() -> None:
    rows = [make_row("convert.some.uniform.ppl_ratio", 2.0, "1", "lower")]
    for kind, better in (("keep", 0.0), ("windows", 0.1)):
        for share in (25, 50):
            rows.append(make_row(f"convert.some.{kind}{share}.ppl_ratio", 1.3 + better - share / 100, "1", "lower"))
            rows.append(make_row(f"convert.some.{kind}{share}.state_bytes", share * 2**20, "bytes", "lower"))
    env = environment(torch.device("cpu"), torch.float32)
    (chart,) = plots(Result("convert.some", "subquad study", env, rows)).values()
    assert {kind: [x / 2**20 for x, _ in points] for kind, points in chart.series.items()} == {
        "keep": [25, 50],
        "windows": [25, 50],
    }
    assert chart.series["windows"][0][1] == 1.3 + 0.1 - 0.25
    alone = Result("convert.some", "subquad study", env, [row for row in rows if "windows" not in row.id])
    assert plots(alone) == {}


def saved(made: Result, folder: Path) -> Path:
    path = folder / "ops.some.cpu.json"
    made.save(path)
    return path


def test_one_length_is_no_chart(tmp_path: Path) -> None:
    assert plots(result((100,))) == {} and refresh_plots(saved(result((100,)), tmp_path)) == []


def test_a_picture_stands_alone(tmp_path: Path) -> None:
    (path,) = refresh_plots(saved(result((100, 400)), tmp_path))
    assert path == tmp_path / "ops.some.cpu.fwd.svg"
    text = path.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    used = {part.split(")")[0] for part in text.split("var(")[1:]}
    assert used and all(f"{name}:" in text for name in used)


def test_a_picture_is_drawn_again_when_the_figures_change(tmp_path: Path) -> None:
    (path,) = refresh_plots(saved(result((100, 400)), tmp_path))
    before = path.read_text()
    assert refresh_plots(tmp_path / "ops.some.cpu.json") == []
    saved(result((100, 800)), tmp_path)
    assert refresh_plots(tmp_path / "ops.some.cpu.json", write=False) == [path] and path.read_text() == before
    assert refresh_plots(tmp_path / "ops.some.cpu.json") == [path] and path.read_text() != before


def test_committed_pictures_show_the_committed_figures() -> None:
    stale = [made.name for path in sorted(RESULTS.glob("*.json")) for made in refresh_plots(path, write=False)]
    assert stale == [], "run `subquad bench --tables`"
