import math

import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.evals.agreement import evaluate_divergence
from subquad.evals.answers import Answered
from subquad.evals.generation import Problem, Problems
from subquad.evals.measures import likelihood, retrieval, writing
from subquad.evals.memo import Memo
from subquad.evals.needle import NeedleGrid, NeedleResult
from subquad.evals.perplexity import perplexity
from subquad.evals.stats import Interval, mcnemar, sign_flip
from subquad.evals.suite import Suite
from subquad.evals.tasks import ChoiceResult, ClozeResult, Item, Task
from subquad.evals.text import tokenize_text
from subquad.models.teachers import LoadedModel

TEXT = "The sky is blue. The grass is green, therefore 4821 is a number. Water flowed from the spout.\n" * 12


def silent(_, __):
    return lambda done, total: None


@pytest.fixture
def make_suite(make_model, tokenizer):
    def make(roles=("model", "baseline", "teacher"), **options):
        models = {
            role: LoadedModel(make_model(len(tokenizer), {}, seed=i, max_positions=512), tokenizer, role, role)
            for i, role in enumerate(roles)
        }
        return Suite(models, silent, **options)

    return make


def lines(suite):
    return {line.id: line for line in suite.lines}


def test_each_line_compares_model_baseline_and_teacher(make_suite, tokenizer):
    suite, text = make_suite(), tokenize_text(tokenizer, TEXT)
    likelihood.text(suite, "t", text, 32)
    found = {role: perplexity(m.model, text, 32) for role, m in suite.models.items()}
    line = lines(suite)["ppl.t"]
    assert list(line.figures) == ["model", "baseline", "teacher"]
    assert set(line.paired) == {("model", "teacher"), ("baseline", "teacher"), ("model", "baseline")}
    for (first, second), pair in line.paired.items():
        apart = found[first].nll_wt - found[second].nll_wt
        assert pair.how == "ratio" and pair.interval.value == pytest.approx(math.exp(apart.mean()), rel=1e-9)
        assert pair.interval.low < pair.interval.value < pair.interval.high
        assert pair.p_value == sign_flip(apart.mean(1))
    likelihood.divergence(suite, "t", text, 32)
    near = lines(suite)["kl.t"]
    teacher = suite.models["teacher"].model
    kl = {role: evaluate_divergence(suite.models[role].model, teacher, text, 32).kl_w for role in ("model", "baseline")}
    assert set(near.paired) == {("model", "baseline")}
    assert near.figures["baseline"].value == pytest.approx(float(kl["baseline"].mean()), rel=1e-9)
    assert near.paired["model", "baseline"].p_value == sign_flip(kl["model"] - kl["baseline"])
    bits = lines(suite)["bpb.t"]
    apart = bits.figures["model"].value - bits.figures["teacher"].value
    assert bits.paired["model", "teacher"].interval.value == pytest.approx(apart, rel=1e-9)


def test_loss_by_position_has_a_line_a_bucket_and_one_from_the_start(make_suite, tokenizer):
    suite, text = make_suite(("model", "teacher")), tokenize_text(tokenizer, TEXT)
    likelihood.loss(suite, "t", text, 64, windows=3, start=20)
    assert list(lines(suite)) == ["loss.t.16-31", "loss.t.32-63", "loss.t.20-63"]
    spread = text.ids_n[: len(text.ids_n) // 64 * 64].view(-1, 64)
    spread = spread[[0, len(spread) // 3, 2 * len(spread) // 3]]
    for who, m in suite.models.items():
        logits = m.model(spread).detach()[:, :-1].log_softmax(-1)
        nll = -logits.gather(2, spread[:, 1:, None])[..., 0]
        assert lines(suite)["loss.t.20-63"].figures[who].value == pytest.approx(float(nll[:, 19:].mean()), rel=1e-9)
    line = lines(suite)["loss.t.20-63"]
    apart = line.figures["model"].value - line.figures["teacher"].value
    assert line.paired["model", "teacher"].interval.value == pytest.approx(apart, rel=1e-9)
    assert line.shape == {"context": 64, "windows": 3} and line.better == "lower"


def cloze(right):
    n = len(right)
    return ClozeResult("c", torch.tensor(right), torch.full((n,), -1.0), torch.ones(n))


def choice(right, chance=0.25):
    return ChoiceResult("d", torch.tensor(right), torch.tensor(right), chance)


def test_retention_is_of_the_mean_above_chance(make_suite):
    suite = make_suite()
    t, f = True, False
    suite.tasks = {
        "c": {"model": cloze([t, f] * 20), "baseline": cloze([f, f] * 20), "teacher": cloze([t, t, t, f] * 10)},
        "d": {"model": choice([t, f] * 10), "baseline": choice([t, f] * 10), "teacher": choice([t] * 15 + [f] * 5)},
    }
    likelihood.retention(suite)
    above, kept = lines(suite)["task.above"], lines(suite)["task.retention"]
    ours, base, theirs = (0.5 + 1 / 3) / 2, (0 + 1 / 3) / 2, (0.75 + 2 / 3) / 2
    assert [above.figures[who].value for who in above.figures] == pytest.approx([ours, base, theirs])
    assert kept.figures["model"].value == pytest.approx(ours / theirs)
    assert kept.figures["baseline"].value == pytest.approx(base / theirs)
    assert kept.figures["model"].low < ours / theirs < kept.figures["model"].high
    pair = kept.paired["model", "baseline"]
    assert pair.interval.value == pytest.approx((ours - base) / theirs) and pair.p_value < 0.001
    assert kept.shape == {"tasks": ["c", "d"], "items": 60}


def test_no_retention_of_a_teacher_that_guesses(make_suite):
    suite = make_suite(("model", "teacher"))
    suite.tasks = {"d": {"model": choice([True] * 10 + [False] * 10), "teacher": choice([True] * 6 + [False] * 14)}}
    likelihood.retention(suite)
    (line,) = suite.lines
    assert line.id == "task.above" and "not informative" in line.note
    alone = make_suite(("model",))
    likelihood.task(alone, Task("l", "cloze", (Item("The sky is", ("blue",), 0),)))
    likelihood.retention(alone)
    assert list(lines(alone)) == ["task.l.acc", "task.l.ppl"]


def found(suite, monkeypatch, hits):
    """Let each model find what is said, in order."""

    def evaluate(model, _, questions, *, by, **__):
        who = next(role for role, m in suite.models.items() if m.model is model)
        cells = ((q.length for q in questions), (q.depth for q in questions))
        return NeedleResult(by, *map(tuple, cells), torch.tensor(hits(who, questions)))

    monkeypatch.setattr(retrieval, "evaluate_needles", evaluate)


def test_needles_over_all_lengths_make_one_line(make_suite, monkeypatch):
    suite, grid = make_suite(), NeedleGrid((300, 420), (0.3, 0.7), samples=5, distractors=2, digits=4)
    wrong = {"model": 6, "baseline": 12, "teacher": 4}
    found(suite, monkeypatch, lambda who, asked: [i >= wrong[who] for i in range(len(asked))])
    retrieval.needles(suite, TEXT, grid)
    assert list(lines(suite)) == [f"needle.generation.{cell}" for cell in ("300", "420", "upto420")]
    line = lines(suite)["needle.generation.upto420"]
    assert {who: f.value for who, f in line.figures.items()} == {"model": 0.7, "baseline": 0.4, "teacher": 0.8}
    assert line.paired["model", "teacher"].interval.value == pytest.approx(14 / 16)
    beaten = line.paired["model", "baseline"]
    assert (beaten.how, beaten.interval.value) == ("difference", pytest.approx(0.3))
    assert beaten.p_value == mcnemar(torch.arange(20) >= 6, torch.arange(20) >= 12)
    assert line.shape == {"depths": 2, "samples": 5, "distractors": 2, "digits": 4, "questions": 20}


def test_a_teacher_that_finds_next_to_nothing_is_said_to(make_suite, monkeypatch):
    suite = make_suite()
    found(suite, monkeypatch, lambda who, asked: [who == "teacher" and i == 0 for i in range(len(asked))])
    retrieval.passkeys(suite, NeedleGrid((300,), (0.5,), samples=10, digits=4))
    (line,) = suite.lines
    assert line.id == "passkey.generation.300"
    assert line.note.startswith("the teacher scores 0.100 [") and line.note.endswith("not informative")
    assert set(line.paired) == {("model", "baseline")}


def test_calibrated_needles_say_what_was_chosen(make_suite, monkeypatch):
    suite = make_suite(("model", "teacher"))

    def hits(who, asked):
        assert all(len(q.tokens) == q.length for q in asked)
        hard = sum(" is " in part for part in suite.tokenizer.decode(asked[0].tokens).split("number for ")) > 4
        return [i % 4 > 0 or not hard for i in range(len(asked))]

    found(suite, monkeypatch, hits)
    retrieval.needles(suite, TEXT, NeedleGrid((900,), (0.3, 0.7), samples=4), calibrated=True)
    (line,) = suite.lines
    assert line.shape["calibrated"] == line.figures["teacher"].value == 0.75
    assert line.shape["distractors"] >= 3


def test_a_teacher_that_solves_nothing_is_said_to(make_suite):
    suite = make_suite(batch_tokens=200)
    items = tuple(Problem(f"What is {i}?", str(i)) for i in range(4))
    writing.problems(suite, Problems("sums", "answers", items), new_tokens=4)
    line = lines(suite)["task.sums.exact"]
    assert line.note.endswith("not informative") and set(line.paired) == {("model", "baseline")}
    assert line.shape == {"problems": 4, "shots": 0, "new_tokens": 4, "plain": False}
    (section,) = suite.sections
    assert [part.prompt for part in section.parts] == ["What is 0?", "What is 1?", "What is 2?"]
    assert list(section.parts[0].answers) == [f"{role}: wrong" for role in ("model", "baseline", "teacher")]


def test_answers_stand_beside_the_teachers_with_their_flaws(make_suite, monkeypatch):
    suite = make_suite()
    texts = {"teacher": ("It is blue.", "Because."), "model": ("It is red.", "Because."), "baseline": ("It", "a a a")}

    def said(model, *_, **__):
        who = next(role for role, m in suite.models.items() if m.model is model)
        loop_n = torch.tensor([-1, 4 if who == "baseline" else -1])
        return Answered(texts[who], torch.tensor([5, 9]), torch.tensor([False, who == "baseline"]), loop_n)

    monkeypatch.setattr(writing, "answer", said)
    writing.prompts(suite, [("The sky?", "Why?")], new_tokens=9)
    line = lines(suite)["answers.loops"]
    assert {who: f.value for who, f in line.figures.items()} == {"model": 0, "baseline": 0.5, "teacher": 0}
    assert line.shape == {"prompts": 1, "answers": 2, "new_tokens": 9, "tokens": dict.fromkeys(suite.labels, 7.0)}
    (dialogue,) = suite.sections[-1].parts
    (first, second) = dialogue.turns
    assert first[0] == "The sky?" and list(first[1]) == ["teacher", "model", "baseline"]
    assert [(s.text, s.remark, s.parts_at) for s in first[1].values()] == [
        ("It is blue.", "5 tokens", None),
        ("It is red.", "5 tokens", 6),
        ("It", "5 tokens", 2),
    ]
    assert [(s.remark, s.parts_at) for s in second[1].values()] == [
        ("9 tokens", None),
        ("9 tokens, the same", None),
        ("9 tokens, cut off, loops from token 4", 0),
    ]


def test_agreement_compares_two_students(make_suite, tokenizer):
    suite = make_suite()
    writing.agreement(suite, tokenize_text(tokenizer, TEXT), 3, prompt_tokens=8, new_tokens=4)
    line = lines(suite)["agreement.match"]
    assert list(line.figures) == ["model", "baseline"]
    apart = line.figures["model"].value - line.figures["baseline"].value
    assert line.paired["model", "baseline"].interval.value == pytest.approx(apart, abs=1e-12)


def test_figures_of_the_teacher_are_kept_and_equal(make_suite, tokenizer, tmp_path, monkeypatch):
    begun = []

    def begin(what, _):
        begun.append(what)
        return lambda done, total: None

    def measured():
        suite = make_suite(memo=Memo(tmp_path))
        suite.begin = begin
        likelihood.text(suite, "t", tokenize_text(tokenizer, TEXT), 32)
        likelihood.task(suite, Task("l", "cloze", (Item("The sky is", ("blue",), 0), Item("The", ("man",), 0))))
        retrieval.passkeys(suite, NeedleGrid((200,), (0.5,), samples=2, digits=4))
        writing.agreement(suite, tokenize_text(tokenizer, TEXT), 2, prompt_tokens=8, new_tokens=4)
        writing.prompts(suite, [("The sky?",)], new_tokens=3)
        return suite

    first = measured()
    assert len(begun) == 14 and len(list(tmp_path.iterdir())) == 9
    begun.clear()
    again = measured()
    assert begun == [f"{what}, model" for what in ("t", "l", "passkeys, 0 distractors", "agreement", "prompts")]
    assert again.lines == first.lines
    begun.clear()
    other = make_suite(memo=Memo(tmp_path))
    other.begin = begin
    likelihood.text(other, "t", tokenize_text(tokenizer, TEXT), 31)
    assert begun == ["t, model", "t, baseline", "t, teacher"]


def test_roles_and_tokenizers(make_suite, make_model, tokenizer):
    with pytest.raises(ConfigError, match="did you mean 'teacher'"):
        make_suite(("model", "techer"))
    with pytest.raises(ConfigError, match="expected the role model"):
        make_suite(("teacher",))
    model = LoadedModel(make_model(len(tokenizer), {}), tokenizer, "half", "half")
    with pytest.raises(ConfigError, match="another for teacher"):
        Suite({"model": model, "teacher": LoadedModel(model.model, None, "t", "t")}, silent)
    assert Suite({"model": model}, silent).labels == {"model": "half"}
    assert Suite({"model": model}, silent).uninformative(Interval(0.2, 0.1, 0.3), 0.04) == ""
