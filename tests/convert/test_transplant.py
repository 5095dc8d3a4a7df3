"""Placing, measuring and transplanting mixers, and a whole conversion from the command line."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from subquad.cli import main
from subquad.convert.transplant import rebuild, transplant
from subquad.convert.transplant.conversion import convert
from subquad.convert.transplant.measure import measure
from subquad.convert.transplant.placement import parse_layers, parse_options, place, spread
from subquad.convert.transplant.settings import Settings, Surroundings
from subquad.core.attention import AttentionStats
from subquad.core.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from subquad.core.layout import Layout
from subquad.core.registry import methods
from subquad.models.checkpoint import from_pretrained, save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.load import load_model
from subquad.models.stack import Stack
from subquad.train.checkpoint import RunFolder
from subquad.train.display import Line
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe, count

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
MIXERS = [slug for slug, card in methods("mixers").items() if card.from_attention]


def stack(n_layers=4, vocab=300, **layer):
    config = ModelConfig(vocab, 32, 48, (LAYER | layer,) * n_layers, max_positions=256, eos_tokens=(0,))
    return Stack(config).requires_grad_(False)


# -- where mixers go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1,3,5-7", [1, 3, 5, 6, 7]), ("odd", [1, 3, 5, 7]), ("even", [0, 2, 4, 6]), ("0", [0]), ("all", list(range(8)))],
)
def test_layers(text, layers):
    assert parse_layers(text, 8) == layers


def test_keep_spreads_evenly():
    assert spread(8, 0.5) == [0, 2, 4, 6]
    assert spread(32, 0.25) == [i for i in range(32) if i % 4 != 2]
    assert spread(30, 0.1) == [i for i in range(30) if i not in (5, 15, 25)]
    assert spread(4, 0.0) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="--keep 0.9: expected a share"):
        spread(4, 0.9)


def test_place():
    assert place(6, ["mamba2"], keep=0.5) == {0: "mamba2", 2: "mamba2", 4: "mamba2"}
    assert place(6, ["mamba2:1,3", "attention:5"]) == {1: "mamba2", 3: "mamba2", 5: "attention"}
    two = place(6, ["mamba2", "gated_deltanet"], layers="0-3")
    assert two == {0: "mamba2", 1: "gated_deltanet", 2: "mamba2", 3: "gated_deltanet"}
    assert place(4, ["attention:1", "mamba2"], layers="0-2") == {0: "mamba2", 1: "attention", 2: "mamba2"}


@pytest.mark.parametrize(
    ("mixers", "arguments", "message"),
    [
        (["mamba"], {"keep": 0.5}, "unknown mixer 'mamba'; did you mean 'mamba2'?"),
        (["mamba2"], {}, "expected --layers or --keep for --mixer mamba2, got neither"),
        (["mamba2"], {"keep": 0.5, "layers": "1"}, "got both"),
        (["mamba2:1"], {"keep": 0.5}, "every --mixer names its layers"),
        (["mamba2:1", "attention:1"], {}, "layer 1 already goes to mamba2"),
        (["mamba2:9"], {}, "expected 0 to 5, got 9"),
        (["mamba2:1,x"], {}, "expected numbers like 1,3,5-9"),
        (["mamba2:3-1"], {}, "at least one layer, got none"),
        ([], {"keep": 0.5}, "expected --mixer SLUG, got none; known: "),
    ],
)
def test_place_refuses(mixers, arguments, message):
    with pytest.raises(ConfigError) as error:
        place(6, mixers, **arguments)
    assert message in str(error.value)


def test_options_are_checked_against_the_mixer():
    both = ["attention", "windowed_linear"]
    assert parse_options(["window=32", "windowed_linear.features=8"], both) == {
        "attention": {"window": 32},
        "windowed_linear": {"window": 32, "features": 8},
    }
    assert parse_options(["scale=1", "rotary=null", "qk_norm=true"], ["attention"]) == {
        "attention": {"scale": 1.0, "rotary": None, "qk_norm": True}
    }
    for setting, message in [
        ("windw=3", "unknown option 'windw'; did you mean 'window'?"),
        ("window=wide", "expected int or None, got 'wide'"),
        ("window=true", "expected int or None, got 'true'"),
        ("window", "got no '='"),
        ("mamba2.window=3", "mixer 'mamba2' is not in use"),
        ("d_model=3", "unknown option 'd_model'"),
    ]:
        with pytest.raises(ConfigError) as error:
            parse_options([setting], ["attention"])
        assert message in str(error.value)


# -- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "qk_norm": True}, {"window": 5}], ids=str)
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_measure_equals_the_definition(monkeypatch, options, at_once):
    monkeypatch.setattr("subquad.convert.transplant.measure.SCORES_AT_ONCE", at_once)
    teacher = stack(3, **options)
    for p in teacher.parameters():
        p.add_(0.3 * torch.randn_like(p))
    batches = [torch.randint(300, (2, 11)) for _ in range(2)]
    got = measure(teacher, batches, [0, 2], sample_tokens=11)
    x = teacher.embed(torch.cat(batches))
    layout = Layout.dense(4, 11)
    for i, block in enumerate(teacher.blocks):
        normed = block.norm1(x)
        q, k, v = (y.double() for y in block.mixer.qkv(normed, layout))
        if i in got:
            lookback, square = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
            for b in range(4):
                for h in range(4):
                    for t in range(11):
                        seen = range(max(0, t + 1 - (options.get("window") or 11)), t + 1)
                        p = torch.stack([(q[b, t, h] @ k[b, j, h // 2]) * 8**-0.5 for j in seen]).softmax(0)
                        lookback[h] += sum(float(p[n]) * (t - j) for n, j in enumerate(seen)) / 44
                        y = sum(p[n] * v[b, j, h // 2] for n, j in enumerate(seen))
                        square[h] += y.square().mean() / 44
            # float32 sums of some hundred terms against float64: about 100 roundings of 6e-8.
            torch.testing.assert_close(got[i].lookback_h.double(), lookback, rtol=1e-5, atol=0)
            torch.testing.assert_close(got[i].output_rms_h.double(), square.sqrt(), rtol=1e-5, atol=0)
            # The same float32 norm of one batch or of both at once: a few roundings of 6e-8.
            torch.testing.assert_close(got[i].inputs_btd, normed[:1], rtol=1e-6, atol=1e-6)
        x = block(x, layout)


# -- the student --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
def test_student_keeps_the_rest_and_the_teacher(share):
    teacher = stack()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = transplant(teacher, {1: {"mixer": "attention", "window": 4}, 2: "mamba2"}, share=share)
    for name, x in student.state_dict().items():
        if not name.startswith(("blocks.1.mixer", "blocks.2.mixer")):
            assert torch.equal(x, before[name])
            assert (x.data_ptr() == teacher.state_dict()[name].data_ptr()) == share
    theirs = {x.data_ptr() for x in teacher.parameters()}
    assert not theirs & {p.data_ptr() for i in (1, 2) for p in student.blocks[i].mixer.parameters()}
    assert all(torch.equal(x, before[k]) for k, x in teacher.state_dict().items())
    assert [layer["mixer"] for layer in student.config.layers] == ["attention", "attention", "mamba2", "attention"]
    assert student.config.layers[1]["window"] == 4
    assert teacher.config.layers[1] == LAYER
    assert (student.lm_head.weight is student.embed.weight) == teacher.config.tied


def test_tied_weights_stay_tied():
    teacher = Stack(dataclasses.replace(stack().config, tied=True))
    student = transplant(teacher, {0: "mamba2"})
    assert student.lm_head.weight is student.embed.weight
    assert student.embed.weight is not teacher.embed.weight


def test_window_over_all_is_the_teacher():
    teacher, tokens = stack(), torch.randint(300, (2, 50))
    student = transplant(
        teacher, {0: {"mixer": "attention", "window": 64}, 2: {"mixer": "windowed_linear", "window": 64}}
    )
    # Another order of the same float32 sums in two layers, carried through the rest: hundreds of roundings of 6e-8.
    torch.testing.assert_close(student(tokens), teacher(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slug", MIXERS)
def test_every_mixer_survives_saving_and_rebuilding(tmp_path, slug):
    teacher, tokens = stack(), torch.randint(300, (2, 20))
    stats = measure(teacher, [torch.randint(300, (2, 100))], [1, 3])
    student = transplant(teacher, dict.fromkeys((1, 3), slug), stats=stats)
    logits = student(tokens)
    assert torch.isfinite(logits).all()
    save_pretrained(student, tmp_path / "m")
    assert torch.equal(from_pretrained(tmp_path / "m")(tokens), logits)
    again = rebuild(
        teacher,
        json.loads(
            json.dumps({i: student.config.layers[i] for i in (1, 3)}),
            object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()},
        ),
    )
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(tokens), logits)
    assert again.config == student.config


def test_transplant_refuses():
    teacher = stack()
    with pytest.raises(ConfigError, match="layer 9: expected 0 to 3"):
        transplant(teacher, {9: "mamba2"})
    with pytest.raises(ConfigError, match="unknown method 'mamba3'.*did you mean 'mamba2'"):
        transplant(teacher, {0: "mamba3"})
    hybrid = transplant(teacher, {0: "mamba2"})
    with pytest.raises(
        UnsupportedError, match="layer 0: expected attention to convert, got Mamba2; choose other layers"
    ):
        transplant(hybrid, {0: "attention"})
    more = transplant(hybrid, {1: "mamba2"}, stats={1: AttentionStats(torch.full((4,), 9.0), torch.ones(4))})
    assert [layer["mixer"] for layer in more.config.layers] == ["mamba2", "mamba2", "attention", "attention"]


# -- the whole conversion -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A tiny teacher with a byte-level tokenizer, saved."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<end>": 0} | {c: i + 1 for i, c in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    torch.manual_seed(0)
    save_pretrained(stack(), folder, PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"))
    return str(folder)


SMALL = ["--batch", "2", "--seq", "32", "--measure-tokens", "64", "--eval-tokens", "256", "--held-out", "0.2"]
BUDGET = ["--stage", "align.tokens=320", "--stage", "align.passes=2"]
BOTH = ["--mixer", "windowed_linear", "--keep", "0.5", "--set", "window=8", *BUDGET]


def test_command_line_end_to_end(tmp_path, teacher_folder, capfd, drawn):
    out = tmp_path / "out"
    command = [
        "convert",
        teacher_folder,
        "--out",
        str(out),
        *BOTH,
        "--data",
        "pydoc",
        "--stage",
        "distill.tokens=256",
        *SMALL,
    ]
    assert main(command) == 0
    shown = capfd.readouterr()
    assert "perplexity, context 32, held out:" in shown.out
    assert "windowed_linear in 0, 2; 2 of 4 layers stay: 1, 3" in " ".join(shown.err.split())
    for stage in ("align", "distill", "teacher", "student"):
        assert re.search(rf"{stage} +100% step", shown.err), stage
    lines = RunFolder(out).lines()
    assert [line["stage"] for line in lines] == ["align"] * 5 + ["distill"] * 4
    facts = RunFolder(out).facts()
    assert facts["finished"] and facts["versions"]["torch"] == torch.__version__
    assert [phase["tokens"] for phase in facts["settings"]["recipe"]["phases"]] == [320, 256]
    assert facts["layers"]["2"]["window"] == 8
    loaded = load_model(out)
    assert [layer["mixer"] for layer in loaded.model.config.layers] == ["windowed_linear", "attention"] * 2
    ratio = (
        facts["evaluation"]["student"]["perplexity"]["value"] / facts["evaluation"]["teacher"]["perplexity"]["value"]
    )
    assert facts["evaluation"]["ratio"]["value"] == pytest.approx(ratio, rel=1e-6)
    card = (out / "README.md").read_text()
    assert "| recipe.align.tokens | 320 |" in card and teacher_folder in card
    assert "<path" in (out / "report.html").read_text()
    assert not (out / "checkpoint.pt").exists()
    assert main(command) == 2
    assert "holds a run already" in capfd.readouterr().err
    assert main([*command, "--resume"]) == 2
    assert "is finished" in capfd.readouterr().err


# Ends the process at the sixth step as a power cut would.
DIES = """
import os, sys, torch
from subquad.cli import main
from subquad.train import display
torch.set_num_threads(1)
plain = display.Line.__call__
display.Line.__call__ = lambda self, p: os._exit(9) if p.stage == "distill" else plain(self, p)
main(sys.argv[1:])
"""


def test_broken_runs_resume_to_the_same_losses(tmp_path, teacher_folder, monkeypatch, capfd):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} " + "lorem ipsum " * 30 for i in range(400)))
    arguments = [*BOTH, "--data", str(text), "--stage", "distill.tokens=256", *SMALL]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start = ["convert", teacher_folder, "--out"]
    assert main([*start, str(whole), *arguments]) == 0

    with monkeypatch.context() as patch:
        plain = Line.__call__
        patch.setattr(
            Line, "__call__", lambda self, p: os.kill(os.getpid(), signal.SIGINT) if p.step == 2 else plain(self, p)
        )
        assert main([*start, str(broken), *arguments]) == 75
    assert re.search("error: stopped after step [23] .*--resume to go on", capfd.readouterr().err)
    resume = [*start, str(broken), *arguments, "--resume"]
    assert subprocess.run([sys.executable, "-c", DIES, *resume], stderr=subprocess.DEVNULL).returncode == 9
    assert RunFolder(broken).load()["stage"] == "distill"
    assert main(resume) == 0
    want, got = ([(x["stage"], x["step"], x["loss"]) for x in RunFolder(f).lines()] for f in (whole, broken))
    assert got == want
    tokens = torch.randint(300, (1, 40))
    assert torch.equal(load_model(whole).model(tokens), load_model(broken).model(tokens))


def settings(teacher, **changes):
    recipe = Recipe((Phase("align", Rate(1e-3), tokens=128),))
    small = {"batch": 2, "seq": 32, "measure_tokens": 64, "eval_tokens": 128, "held_out": 0.2, "keep": 0.5}
    return Settings(teacher, **({"data": ("pydoc",), "recipe": recipe, "mixers": ("mamba2",)} | small | changes))


def test_a_folder_with_another_model_is_refused_before_the_training(tmp_path, teacher_folder):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="holds a model of type 'gpt2', which saving would destroy"):
        convert(settings(teacher_folder), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_resume_with_other_settings_names_them(tmp_path, teacher_folder, monkeypatch):
    monkeypatch.setattr("subquad.convert.transplant.conversion.perplexity", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(settings(teacher_folder), tmp_path)
    changed = settings(teacher_folder, seed=1, recipe=Recipe((Phase("align", Rate(1e-3), tokens=256),)))
    with pytest.raises(ConfigError, match=r"recipe.align.tokens 128 \(now 256\), seed 0 \(now 1\); give the same"):
        convert(changed, tmp_path, resume=True)


def test_a_run_that_dies_in_its_report_is_not_finished(tmp_path, teacher_folder):
    with pytest.raises(ZeroDivisionError):
        convert(settings(teacher_folder), tmp_path, surroundings=Surroundings(report=lambda _: 1 / 0))
    before = RunFolder(tmp_path).facts()["evaluation"]
    told = []
    convert(settings(teacher_folder), tmp_path, resume=True, surroundings=Surroundings(report=told.append))
    assert len(told) == 1 and RunFolder(tmp_path).facts()["finished"]
    assert RunFolder(tmp_path).facts()["evaluation"] == before


def test_own_samples_need_no_data(tmp_path, teacher_folder):
    result = convert(settings(teacher_folder, data=("self",), samples=40, seq=16), tmp_path)
    samples = [json.loads(line)["text"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 40 and len(set(samples)) == 40
    assert all(text.startswith("<end>") for text in samples)
    assert result.student_perplexity.tokens == result.teacher_perplexity.tokens > 0


def test_bad_input(tmp_path, teacher_folder, capfd):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    base = ["convert", teacher_folder, "--out", str(tmp_path / "out"), "--mixer", "mamba2", "--keep", "0.5", *SMALL]
    budget = ["--stage", "align.tokens=64"]
    for arguments, message in [
        ([*base, "--data", "pydoc"], "expected a budget, got none"),
        ([*base, *budget], "expected --data, got none"),
        ([*base, *budget, "--data", "pidoc"], "no such file; did you mean 'pydoc'?"),
        ([*base, *budget, "--data", str(text)], "expected held-out documents at --held-out 0.2, got none"),
        (
            [*base, *budget, "--data", "pydoc", "--seq", "512"],
            "--seq 512: expected at most the teacher's 256 positions",
        ),
        (
            [*base, *budget, "--data", "pydoc", "--set", "key_dmi=3"],
            "unknown option 'key_dmi'; did you mean 'key_dim'?",
        ),
        (
            [*base, "--data", "pydoc", "--stage", "align.tokens=many"],
            "--stage align.tokens many: expected a number of tokens",
        ),
        ([*base, *budget, "--data", "pydoc", "--stage", "align.train=nothing"], "train nothing: no such parameter"),
        (
            [*base, *budget, "--data", "pydoc", "--resume"],  # of the run above, stopped before its first step
            "--resume: expected the settings of the run, got others: recipe.align.train ['nothing'] (now ['*'])",
        ),
    ]:
        assert main(arguments) == 2, arguments
        shown = capfd.readouterr().err.strip().splitlines()[-1]
        assert shown.startswith("error: ") and message in shown, shown


def test_count():
    assert [count("--x", t) for t in ("30000", "30k", "5M", "1.5b", "1_000")] == [
        30_000,
        30_000,
        5 * 10**6,
        15 * 10**8,
        1000,
    ]
    for text in ("-1", "k", "inf", "3x"):
        with pytest.raises(ConfigError, match="expected a number of tokens"):
            count("--x", text)


def test_data_error_is_reached_through_the_background(tmp_path, teacher_folder):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*(json.dumps({"text": f"{i} " * 50}) for i in range(40)), "{broken"]))
    with pytest.raises(DataError, match="a.jsonl:41: expected one JSON object a line"):
        convert(settings(teacher_folder, data=(str(path),)), tmp_path / "out")
