import pytest
import torch

from subquad.core.errors import ConfigError, DataError
from subquad.evals.needle import Question
from subquad.evals.perplexity import perplexity
from subquad.evals.scoring import score_continuations
from subquad.evals.stats import Interval
from subquad.evals.text import TextTokens
from subquad.inspect.window_cut import LayerScore, Measured, Ranking, WindowCut
from subquad.mixers.attention import Attention
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 10000.0, "dim": 8}}
N_LAYERS, CONTEXT, CUT = 5, 40, {"window": 6, "sinks": 2}


class Letters:
    """Encodes a digit as a token of its own."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 16 for c in text]


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = (*[LAYER] * N_LAYERS, LAYER | {"window": 4})
    stack = Stack(ModelConfig(vocab_size=60, d_model=32, d_mlp=48, layers=layers, tied=True)).double().eval()
    with torch.no_grad():
        stack.embed.weight.mul_(30)
    return stack


@pytest.fixture
def text():
    ids = torch.randint(60, (CONTEXT * 5 + 7,), generator=torch.Generator().manual_seed(1))
    return TextTokens(ids, torch.ones_like(ids))


@pytest.fixture
def questions():
    tokens = torch.randint(60, (3, 33), generator=torch.Generator().manual_seed(2)).tolist()
    return [Question(33, 0.5, tuple(row), str(1000 + i)) for i, row in enumerate(tokens)]


@pytest.fixture
def cut(model, text, questions):
    return WindowCut(model, text, questions, tokenizer=Letters(), context=CONTEXT, batch_tokens=100, **CUT)


def by_hand(model, layers, text, questions):
    """The model rebuilt with `layers` cut, measured by the plain evaluations."""
    student = Stack(
        ModelConfig(
            **{f: getattr(model.config, f) for f in ("vocab_size", "d_model", "d_mlp", "tied")},
            layers=tuple(layer | CUT if i in layers else layer for i, layer in enumerate(model.config.layers)),
        )
    )
    student = student.double().eval()
    student.load_state_dict(model.state_dict())
    answers = score_continuations(student, [(q.tokens, Letters().encode(f" {q.value}")) for q in questions])
    loss_w = perplexity(student, text, CONTEXT).nll_wt.mean(1)
    return Measured(loss_w, -torch.stack([a.logprob_n.sum() for a in answers]))


def assert_equal(got, want):
    torch.testing.assert_close(got.loss_w, want.loss_w, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.answer_q, want.answer_q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", [(), (1, 3)])
def test_every_toggle_equals_the_rebuilt_model(model, cut, text, questions, base):
    measured = cut.toggle(base, list(range(N_LAYERS)))
    assert_equal(measured[None], by_hand(model, base, text, questions))
    for layer in range(N_LAYERS):
        assert_equal(measured[layer], by_hand(model, set(base) ^ {layer}, text, questions))
    assert float((measured[0].loss_w - measured[None].loss_w).abs().max()) > 1e-3


def test_ranking_is_the_paired_increase(model, cut, text, questions):
    ranking = cut.rank()
    # The sixth layer's own window is smaller already.
    assert list(ranking.scores) == list(range(N_LAYERS))
    base = by_hand(model, (), text, questions)
    for layer, score in ranking.scores.items():
        one = by_hand(model, {layer}, text, questions)
        assert score.loss.value == pytest.approx(float((one.loss_w - base.loss_w).mean()), rel=1e-9)
        assert score.retrieval.value == pytest.approx(float((one.answer_q - base.answer_q).mean()), rel=1e-9)
        assert score.loss.low < score.loss.value < score.loss.high
    joint = cut.joint(ranking, {0, 2})
    both = by_hand(model, {0, 2}, text, questions)
    assert joint.loss.value == pytest.approx(float((both.loss_w - base.loss_w).mean()), rel=1e-9)


def test_cost_counts_each_criterion_in_shares_of_its_sum():
    def score(loss, retrieval):
        return LayerScore(Interval(loss), Interval(retrieval))

    base = Measured(torch.zeros(1), torch.zeros(1))
    ranking = Ranking(base, {0: score(0.3, 0.0), 1: score(0.1, 8.0), 2: score(-0.1, 1.0), 3: score(0.1, 1.0)})
    assert ranking.cost(score(0.3, 0.0)) == pytest.approx(0.5)
    assert ranking.cost(score(0.1, 8.0)) == pytest.approx(1 / 6 + 0.8)
    assert ranking.cheapest(2) == [2, 3]
    with pytest.raises(ConfigError, match="1 to 4,"):
        ranking.cheapest(5)
    alone = Ranking(base, {0: LayerScore(Interval(0.3), None), 1: LayerScore(Interval(0.1), None)})
    assert alone.cost(alone.scores[0]) == pytest.approx(0.75)


def test_refinement_finds_the_best_swap_and_stops(cut):
    ranking = cut.rank()

    def cost(layers):
        return ranking.cost(cut.joint(ranking, layers))

    # Start from the worst pair there is.
    pairs = {(a, b): cost((a, b)) for a in range(N_LAYERS) for b in range(a)}
    start = max(pairs, key=pairs.get)
    lines = []
    end = cut.refine(ranking, start, rounds=10, report=lines.append)
    assert lines
    assert len(end) == 2
    assert pairs[tuple(sorted(end, reverse=True))] < pairs[start]
    assert cut.refine(ranking, end, rounds=3) == end
    once = set(cut.refine(ranking, start, rounds=1))
    (restored,) = set(start) - once
    assert cost(set(start) - {restored}) == min(cost(set(start) - {i}) for i in start)
    assert cost(once) == min(cost((set(start) - {restored}) | {i}) for i in range(N_LAYERS) if i not in start)


def test_without_needles_only_the_loss_counts(model, text):
    ranking = WindowCut(model, text, context=CONTEXT, **CUT).rank()
    assert all(score.retrieval is None for score in ranking.scores.values())
    cheapest = min(ranking.scores, key=lambda i: ranking.scores[i].loss.value)
    assert ranking.cheapest(1) == [cheapest]


def test_the_model_is_left_alone_and_progress_ends(model, cut):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    cut.toggle((), [0, 4], lambda *args: seen.append(args))
    assert seen[-1][0] == seen[-1][1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(isinstance(b.mixer, Attention) and b.mixer.config.sinks == 0 for b in model.blocks)


def test_nothing_to_cut(model, text):
    with pytest.raises(ConfigError, match="smaller window"):
        WindowCut(model, text, window=64, sinks=4, context=CONTEXT)
    with pytest.raises(DataError, match="more text"):
        WindowCut(model, text.first(20), context=CONTEXT, **CUT)
