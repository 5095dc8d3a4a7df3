import json
import warnings

import pytest

from subquad.bench.results import load_result
from subquad.cli import main
from subquad.evals.perplexity import perplexity, perplexity_ratio
from subquad.evals.text import load_text
from subquad.models.checkpoint import save_pretrained
from subquad.models.load import load_model

LAYERS = [{}, {}, {"window": 8, "sinks": 1}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tokenizer):
    """A teacher, a student, a text and three tasks."""
    folder = tmp_path_factory.mktemp("eval")
    save_pretrained(make_model(len(tokenizer), *LAYERS, max_positions=512).float(), folder / "teacher", tokenizer)
    student = make_model(len(tokenizer), {}, {"window": 4}, {"window": 8, "sinks": 1}, seed=3, max_positions=512)
    save_pretrained(student.float(), folder / "student", tokenizer)
    (folder / "text.txt").write_text("The sky is blue. The grass is green, therefore 4821 is a number.\n" * 150)
    cloze = [{"context": "The sky is", "continuation": w} for w in ("blue", "green", "a")]
    choice = [{"query": "The man", "choices": ["turned", "is blue"], "gold": g} for g in (0, 1, 1)]
    baseline = make_model(len(tokenizer), {}, {"window": 4}, {"window": 4}, seed=4, max_positions=512)
    save_pretrained(baseline.float(), folder / "baseline", tokenizer)
    sums = [{"context": f"What is {i}?", "answer": str(i), "chain_of_thought": "So."} for i in range(4)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    code = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    f(1)\n"}
    (folder / "code.jsonl").write_text(json.dumps(code))
    (folder / "chat.jsonl").write_text(json.dumps({"turns": ["Is <it> blue?", "Why?"]}))
    (folder / "cloze.jsonl").write_text("\n".join(map(json.dumps, cloze)))
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, choice)))
    return folder


def test_eval_measures_both_and_writes_figures_and_page(folder, capsys):
    args = ["eval", f"{folder}/student", "--teacher", f"{folder}/teacher", "--text", f"{folder}/text.txt"]
    args += ["--tasks", f"{folder}/cloze.jsonl", "--tasks", f"{folder}/choice.jsonl", "--delimiter", r"choice=\n"]
    args += ["--needle", "--needle-lengths", "300", "--needle-depths", "2", "--needle-samples", "1", "--agreement", "3"]
    args += ["--context", "64", "--tokens", "1000", "--device", "cpu"]
    assert main([*args, "--json", f"{folder}/out.json", "--report", f"{folder}/report.html"]) == 0
    result = load_result(folder / "out.json")
    rows = {row.id: row for row in result.rows}
    assert rows.keys() == {
        *("eval.ppl.text", "eval.ppl.text.ratio", "eval.bpb.text", "eval.bpb.text.difference"),
        *("eval.task.cloze.acc", "eval.task.cloze.acc.difference"),
        *("eval.task.cloze.ppl", "eval.task.cloze.ppl.ratio"),
        *("eval.task.choice.acc", "eval.task.choice.acc.difference"),
        *("eval.task.choice.acc_norm", "eval.task.choice.acc_norm.difference"),
        *("eval.task.choice.above", "eval.task.choice.above.difference", "eval.task.above"),
        *("eval.needle.generation.300", "eval.agreement.match", "eval.agreement.kl", "eval.agreement.same"),
    }
    student, teacher = load_model(folder / "student"), load_model(folder / "teacher")
    text = load_text(f"{folder}/text.txt", student.tokenizer, 1000)
    want = [perplexity(m.model, text, 64) for m in (student, teacher)]
    row, ratio = rows["eval.ppl.text"], rows["eval.ppl.text.ratio"]
    values = [one.perplexity.value for one in want]
    assert [row.value, row.baseline_value] == pytest.approx(values, rel=1e-4)
    assert ratio.value == pytest.approx(perplexity_ratio(*want).value, rel=1e-4)
    assert ratio.interval[0] < ratio.value < ratio.interval[1]
    assert rows["eval.task.choice.acc"].shape == {"items": 3, "chance": 0.5}
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "perplexity of text, context 64" in line)
    assert all(f"{value:.3f} [" in line or f"{value:.2f} [" in line for value in [*values, ratio.value])
    page = (folder / "report.html").read_text()
    assert "Perplexity by position" in page and "Needles found: teacher" in page


def test_eval_against_a_baseline_keeps_what_it_measured(folder, capsys, cache):
    args = ["eval", f"{folder}/student", "--teacher", f"{folder}/teacher", "--against", f"{folder}/baseline"]
    args += ["--text", f"{folder}/text.txt", "--context", "64", "--tokens", "640", "--long", f"{folder}/text.txt"]
    args += ["--long-context", "128", "--long-windows", "4", "--long-from", "48", "--tasks", f"{folder}/sums.jsonl"]
    args += ["--shots", "1", "--new-tokens", "8", "--prompts", f"{folder}/chat.jsonl", "--passkey", "--device", "cpu"]
    args += ["--needle-lengths", "200,300", "--needle-depths", "1", "--needle-samples", "1"]
    out = [*("--json", f"{folder}/a.json"), *("--report", f"{folder}/a.html")]
    assert main([*args, *out]) == 0
    rows = {row.id: row for row in load_result(folder / "a.json").rows}
    for id in ("eval.ppl.text", "eval.loss.text.48-127", "eval.loss.text.64-127"):
        how = "ratio" if "ppl" in id else "difference"
        assert {id, f"{id}.{how}", f"{id}.baseline", f"{id}.baseline.{how}", f"{id}.against.{how}"} <= rows.keys()
        assert rows[f"{id}.against.{how}"].shape["how"] == how and 0 < rows[f"{id}.against.{how}"].shape["p"] <= 1
    apart = rows["eval.loss.text.48-127"].value - rows["eval.loss.text.48-127.baseline"].value
    assert rows["eval.loss.text.48-127.against.difference"].value == pytest.approx(apart, abs=1e-9)
    assert rows["eval.loss.text.48-127.against.difference"].unit == "nats/token"
    assert rows["eval.task.sums.exact"].shape["shots"] == 1
    assert rows["eval.task.sums.exact"].shape["note"].endswith("not informative")
    assert {"eval.answers.loops", "eval.passkey.generation.200", "eval.passkey.generation.upto300"} <= rows.keys()
    page = (folder / "a.html").read_text()
    assert "Is &lt;it&gt; blue?" in page and "Side by side" in page and "model against baseline" in page
    assert "Perplexity by position" in page
    _, err = capsys.readouterr()
    assert "text, teacher" in err and "text, baseline" in err
    assert len(list((cache / "figures").iterdir())) == 2 * 5
    assert main([*args, "--json", f"{folder}/b.json"]) == 0
    _, err = capsys.readouterr()
    assert "text, student" not in err and "text, model" in err and ", teacher" not in err and ", baseline" not in err
    assert load_result(folder / "b.json").rows == load_result(folder / "a.json").rows
    assert main([*args[:8], "--context", "64", "--tokens", "640", "--teacher-cache", "none"]) == 0
    assert "text, teacher" in capsys.readouterr().err


def test_eval_alone_and_beyond_the_context(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["eval", f"{folder}/teacher", "--text", f"{folder}/text.txt", "--context", "600"]) == 0
    out, err = capsys.readouterr()
    assert "against teacher" not in out
    assert "warning: context 600 is beyond the 512 positions" in " ".join(err.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --text, --long, --tasks, --needle, --passkey, --agreement or --prompts"),
        (["--tasks", "{}/code.jsonl"], "give --run-code where that does no harm"),
        (["--tasks", "{}/sums.jsonl"], "expected more than the 4 problems of the examples"),
        (["--tasks", "{}/sums.jsonl", "--tasks", "{}/sums.jsonl"], "expected different names"),
        (["--prompts", "{}/sums.jsonl"], "expected turns, a list of texts, or a prompt"),
        (["--needle", "--needle-distractors", "many"], "--needle-distractors: expected a number or auto, got 'many'"),
        (["--long", "{}/text.txt", "--long-context", "64"], "expected less than --long-context 64, got 2048"),
        (["--text", "none.txt"], "no such file"),
        (["--tasks", "none.jsonl"], "No such file"),
        (["--needle", "--needle-lengths", "9x"], "numbers like 512,900"),
        (["--tasks", "{}/choice.jsonl", "--delimiter", "choise=:"], "did you mean 'choice'?"),
        (["--text", "{}/text.txt", "--agreement", "2"], "give --teacher"),
        (["--text", "{}/text.txt", "--kl"], "--kl: expected --teacher and --text"),
        (["--text", "{}/text.txt", "--context", "100000"], "give more text or a smaller --context"),
        (["--text", "{}/text.txt", "--text", "{}/text.txt"], "expected texts of different names"),
        (["--text", "{}/text.txt", "--json", "{}"], "expected a file, got a folder"),
        (["--text", "{}/text.txt", "--report", "{}/text.txt/a.html"], "expected a place to write to"),
        (["--needle", "--needle-score", "luck"], "known: generation, likelihood"),
    ],
)
def test_eval_errors_are_one_line(folder, capsys, args, message):
    assert main(["eval", f"{folder}/student", *(arg.format(folder) for arg in args)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_an_error_keeps_what_was_measured_before_it(folder, capsys):
    args = ["--text", f"{folder}/text.txt", "--context", "64", "--tokens", "640", "--needle", "--needle-lengths", "10"]
    args += ["--json", f"{folder}/broken.json"]
    assert main(["eval", f"{folder}/student", *args]) == 2
    assert not (folder / "broken.json").exists()
    kept = {row.id for row in load_result(folder / "partial.broken.json").rows}
    assert {"eval.ppl.text", "eval.bpb.text"} <= kept
    out, err = capsys.readouterr()
    assert "perplexity of text, context 64" in out
    assert "error: needle length 10: expected room" in err


def test_inspect_layers_ranks_chooses_and_names_the_command(folder, capsys):
    args = ["inspect", "layers", f"{folder}/teacher", "--text", f"{folder}/text.txt", "--window", "16", "--sinks", "2"]
    args += ["--choose", "1", "--context", "128", "--tokens", "512", "--needles", "2", "--needle-length", "300"]
    args += ["--refine", "1", "--json", f"{folder}/layers.json", "--report", f"{folder}/layers.html"]
    assert main(args) == 0
    found = json.loads((folder / "layers.json").read_text())
    assert [row["layer"] for row in found["alone"]] == [0, 1]
    assert found["settings"]["windows of text"] == 4
    printed = " ".join(capsys.readouterr().out.split())
    assert f"keep 0.5: {','.join(found['kept']['0.5'])}" in printed
    assert f"convert: subquad convert {folder}/teacher" in printed
    (goes,) = {"0", "1"} - set(found["kept"]["0.5"])
    assert f"--layers {goes} --set window=16 --set sinks=2" in printed
    cut = found["alone"][int(goes)]
    assert found["joint"]["0.5"]["chosen"]["loss"]["value"] == pytest.approx(cut["loss"]["value"], rel=1e-5)
    assert "evenly spread" in (folder / "layers.html").read_text()


def test_inspect_refuses_before_it_measures(folder, capsys):
    args = [
        "inspect",
        "layers",
        f"{folder}/teacher",
        "--text",
        f"{folder}/text.txt",
        "--window",
        "16",
        "--needles",
        "0",
    ]
    args += ["--context", "128", "--tokens", "512"]
    for more, message in (
        (["--choose", "9"], "--choose: expected at most 2 layers that see beyond the window, got 9"),
        (["--json", str(folder)], "expected a file, got a folder"),
    ):
        assert main([*args, *more]) == 2
        err = capsys.readouterr().err
        assert message in err and "one at a time" not in err


def test_inspect_knows_its_subjects(folder, capsys):
    assert main(["inspect", "layer", f"{folder}/teacher"]) == 2
    assert "did you mean 'layers'?" in capsys.readouterr().err
