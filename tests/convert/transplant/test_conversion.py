"""What a whole conversion refuses before it costs anything, and what it writes down."""

import pytest

from subquad.cli import main
from subquad.convert.transplant import inputs, transplant
from subquad.convert.transplant.conversion import convert
from subquad.convert.transplant.settings import Settings, Surroundings
from subquad.core.errors import ConfigError, DataError, UnsupportedError
from subquad.models.checkpoint import save_pretrained
from subquad.models.load import load_model
from subquad.train.checkpoint import RunFolder
from subquad.train.optimiser import Rate
from subquad.train.recipe import Phase, Recipe

SMALL = {"batch": 2, "seq": 32, "measure_tokens": 256, "eval_tokens": 256, "held_out": 0.2, "keep": 0.5}
ALIGN = Phase("align", Rate(1e-3), tokens=64)


def settings(teacher, data, **changes):
    known = {"data": (str(data),), "recipe": Recipe((ALIGN,)), "mixers": ("mamba2",)}
    return Settings(teacher, **(known | SMALL | changes))


@pytest.fixture
def hybrid(tiny_teacher, tmp_path):
    """The tiny teacher with Mamba-2 in layers 0 and 2."""
    loaded = load_model(tiny_teacher)
    save_pretrained(transplant(loaded.model, dict.fromkeys((0, 2), "mamba2")), tmp_path / "hybrid", loaded.tokenizer)
    return str(tmp_path / "hybrid")


def test_calibration_where_the_recipe_asks(tiny_teacher, tiny_text, tmp_path):
    told = []
    for asked in (False, True):
        recipe = Recipe((ALIGN,), calibrate=asked)
        given = settings(tiny_teacher, tiny_text, recipe=recipe, tokens=0, keep=0.5)
        convert(given, tmp_path / str(asked), surroundings=Surroundings(say=told.append))
    plain, fitted = (RunFolder(tmp_path / str(asked)).facts() for asked in (False, True))
    assert plain["calibration"] == {} and sorted(fitted["calibration"]) == ["0", "2"]
    assert all(0 < layer["after"] < layer["before"] for layer in fitted["calibration"].values())
    first = [next(x["layers"] for x in RunFolder(tmp_path / str(asked)).lines()) for asked in (False, True)]
    # The first batch of align, before it has learned anything.
    assert all(after < before for before, after in zip(*first, strict=True))
    mean = sum(layer["before"] for layer in fitted["calibration"].values()) / 2
    assert sum(f"in the mean: {mean:.3f} before" in line for line in told) == 1
    with pytest.raises(ConfigError, match="--calibrate: expected tokens to measure on, got --measure-tokens 0"):
        convert(settings(tiny_teacher, tiny_text, recipe=recipe, measure_tokens=0), tmp_path / "none")


def test_no_training_and_a_calibration_from_the_command_line(tiny_teacher, tiny_text, tmp_path, capfd):
    command = ["convert", tiny_teacher, "--data", str(tiny_text), "--mixer", "mamba2", "--keep", "0.5", "--seq", "32"]
    command += ["--measure-tokens", "256", "--eval-tokens", "256", "--tokens", "0", "--held-out", "0.2"]
    assert main([*command, "--out", str(tmp_path / "a"), "--calibrate"]) == 0
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    said = capfd.readouterr().err
    assert "align: left out" in said and "distill: left out" in said
    kl = [RunFolder(tmp_path / name).facts()["evaluation"]["student"]["perplexity"]["value"] for name in "ab"]
    assert RunFolder(tmp_path / "a").facts()["settings"]["recipe"]["calibrate"] is True
    assert RunFolder(tmp_path / "a").lines() == [] and kl[0] != kl[1]


def test_the_schedule_is_said_at_the_start(tiny_teacher, tiny_text, tmp_path):
    told = []
    convert(settings(tiny_teacher, tiny_text), tmp_path, surroundings=Surroundings(say=told.append))
    assert told[1] == "align: 64 tokens in sequences of 32, rate 0.001"


def test_sequences_beyond_the_batch_or_a_model_are_refused(tiny_teacher, tiny_text, tmp_path):
    def refused(message, seq, **changes):
        recipe = Recipe((ALIGN, Phase("distill", Rate(1e-3), tokens=64, seq=seq)))
        with pytest.raises(ConfigError, match=message):
            convert(settings(tiny_teacher, tiny_text, recipe=recipe, **changes), tmp_path / "out")

    refused(r"phase distill: expected sequences of at most the 64 tokens of a batch \(2 x 32\), got 65", 65)
    refused("--stage distill.seq 257: expected at most the teacher's 256 positions; lower it", 257, batch=9)
    short = load_model(tiny_teacher)
    object.__setattr__(short.model.config, "max_positions", 40)
    save_pretrained(short.model, tmp_path / "short", short.tokenizer)
    start = str(tmp_path / "short")
    refused("--stage distill.seq 48: expected at most --start's 40 positions; lower it", 48, start=start)
    with pytest.raises(ConfigError, match="--seq 48: expected at most --start's 40 positions; lower it"):
        convert(settings(tiny_teacher, tiny_text, start=start, seq=48), tmp_path / "out")
    left_out = Recipe((ALIGN, Phase("distill", Rate(1e-3), tokens=0, seq=4096)))
    convert(settings(tiny_teacher, tiny_text, recipe=left_out), tmp_path / "out")


def test_what_can_not_be_converted_is_refused_before_anything_is_sampled(hybrid, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "own_samples", lambda *_, **__: 1 / 0)
    with pytest.raises(
        UnsupportedError, match="layer 0: expected attention to convert, got Mamba2; choose other layers"
    ):
        convert(settings(hybrid, "self"), tmp_path / "out")
    # Every mixer that is registered has a mapping.
    known = {"mamba2": type("Card", (), {"from_attention": False}), "gla": type("Card", (), {"from_attention": True})}
    monkeypatch.setattr("subquad.convert.transplant.placement.methods", lambda _: known)
    with pytest.raises(
        UnsupportedError, match="--mixer mamba2: expected one with a mapping from attention, .* take gla"
    ):
        convert(settings(hybrid, "self"), tmp_path / "out")


def test_heads_of_a_hybrid(hybrid, tiny_text, tmp_path):
    kept = {"heads": {"1": [0]}, "heads_of": {"1": 2, "3": 2}, "keep": None, "mixers": ("gla",)}
    student = convert(settings(hybrid, tiny_text, **kept), tmp_path / "out").student
    assert [layer["mixer"] for layer in student.config.layers] == ["mamba2", "parallel", "mamba2", "gla"]
    with pytest.raises(
        ConfigError, match="expected a choice for 4 key/value heads in 2 attention layers, got one for 8"
    ):
        convert(settings(hybrid, tiny_text, **kept | {"heads_of": dict.fromkeys("0123", 2)}), tmp_path / "more")


def test_overlap_is_written_down(tiny_teacher, tiny_text, tmp_path):
    seen, unseen = tmp_path / "seen.txt", tmp_path / "unseen.txt"
    seen.write_text("\n\n".join(tiny_text.read_text().split("\n\n")[:2]))
    unseen.write_text(" ".join(f"word{i}" for i in range(20)))
    told, texts = [], (str(seen), str(unseen))
    out = tmp_path / "out"
    convert(settings(tiny_teacher, tiny_text, eval_texts=texts), out, surroundings=Surroundings(say=told.append))
    found = {one["text"]: one for one in RunFolder(out).facts()["overlap"]}
    assert found[str(seen)]["found"] == found[str(seen)]["grams"] > 0 == found[str(unseen)]["found"]
    chars = len(tiny_text.read_text())
    assert all((one["chars"], one["whole"]) == (chars, True) for one in found.values())
    assert sum(line.startswith("warning: ") for line in told) == 1
    card = (out / "README.md").read_text()
    assert (
        f"| of {unseen} in the training data {tiny_text} | 0 of 8 13-grams (0.00%) in all {chars:,} characters |"
        in card
    )


def test_the_evaluation_has_windows_enough_for_an_interval(tiny_teacher, tiny_text, tmp_path):
    result = convert(settings(tiny_teacher, tiny_text, seq=128, eval_tokens=256), tmp_path / "a")
    assert (result.student_perplexity.context, result.student_perplexity.windows) == (32, 8)
    assert result.student_perplexity.perplexity.low < result.student_perplexity.perplexity.high
    asked = settings(tiny_teacher, tiny_text, seq=128, eval_tokens=256, eval_context=64)
    assert convert(asked, tmp_path / "b").student_perplexity.context == 64


# -- a teacher on disk ------------------------------------------------------------------------------------------------


def test_a_cached_teacher_from_the_command_line(tiny_teacher, tiny_text, tmp_path, capfd):
    common = [tiny_teacher, "--data", str(tiny_text), "--seq", "32", "--held-out", "0.2", "--seed", "5"]
    cache = ["cache", *common, "--out", str(tmp_path / "cache"), "--top", "300", "--batch", "4"]
    budget = ["--stage", "align.tokens=128", "--stage", "distill.tokens=256", "--stage", "distill.labels=0.5"]
    command = ["convert", *common, "--mixer", "mamba2", "--keep", "0.5", "--batch", "2", *budget, "--no-compile"]
    command += ["--measure-tokens", "64", "--eval-tokens", "256"]
    learnt = ["--teacher-logits", str(tmp_path / "cache")]
    assert main([*cache, "--tokens", "256"]) == 0
    assert "256 tokens of tiny in " in capfd.readouterr().out
    assert main([*command, "--out", str(tmp_path / "short"), *learnt]) == 2
    message = "expected the first 384 tokens, for phase distill and those before it, got 256; go on with subquad cache"
    assert message in capfd.readouterr().err
    assert not RunFolder(tmp_path / "short").lines()
    # The same command goes on, and the whole vocabulary on disk is the teacher itself but for storage in float16.
    assert main([*cache, "--tokens", "384"]) == 0
    assert main([*command, "--out", str(tmp_path / "cached"), *learnt]) == 0, capfd.readouterr().err
    assert main([*command, "--out", str(tmp_path / "live")]) == 0
    lines = [RunFolder(tmp_path / name).lines() for name in ("cached", "live")]
    assert [x["stage"] for x in lines[0]] == [x["stage"] for x in lines[1]] == ["align"] * 2 + ["distill"] * 4
    for ours, theirs in zip(*lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert ours["lr"] == theirs["lr"]
    phase = RunFolder(tmp_path / "cached").facts()["settings"]["recipe"]["phases"][1]
    assert (phase["stage"], phase["name"], phase["options"]["labels"]) == ("distill_cached", "distill", 0.5)


def test_a_cache_of_something_else_is_refused_at_the_start(tiny_teacher, tiny_text, tmp_path, capfd):
    cache = ["cache", tiny_teacher, "--data", str(tiny_text), "--seq", "32", "--held-out", "0.2", "--tokens", "256"]
    assert main([*cache, "--out", str(tmp_path / "cache"), "--top", "8"]) == 0
    phases = Phase("distill_cached", Rate(1e-3), tokens=64, options={"cache": str(tmp_path / "cache")})
    recipe = Recipe((ALIGN, phases))
    other = load_model(tiny_teacher)
    other.model.norm.weight.data[0] += 1e-3
    save_pretrained(other.model, tmp_path / "tiny", other.tokenizer)
    for teacher, changes, message in [
        (tiny_teacher, {"seed": 1}, "expected seed 0 as cached, got 1"),
        (tiny_teacher, {"seq": 16}, "expected time 32 as cached, got 16"),
        (tiny_teacher, {"held_out": 0.3}, "expected held_out 0.2 as cached, got 0.3"),
        (str(tmp_path / "tiny"), {}, r"expected teacher tiny \([0-9a-f]{12}\) as cached, got tiny \("),
    ]:
        with pytest.raises(DataError, match=message):
            convert(settings(teacher, tiny_text, recipe=recipe, **changes), tmp_path / "out")
    assert not RunFolder(tmp_path / "out").facts()
    assert main([*cache, "--out", str(tmp_path / "cache"), "--top", "9"]) == 2
    assert "expected k 8 as cached, got 9" in capfd.readouterr().err
    assert main([*cache, "--out", str(tmp_path / "more"), "--seq", "512"]) == 2
    assert "--seq 512: expected at most the teacher's 256 positions" in capfd.readouterr().err
