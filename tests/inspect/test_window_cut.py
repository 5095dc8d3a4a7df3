from itertools import pairwise

import pytest
import torch

from subquad.convert.transplant import transplant
from subquad.convert.transplant.placement import place_heads
from subquad.core.errors import ConfigError, DataError
from subquad.evals.needle import Question
from subquad.evals.perplexity import perplexity
from subquad.evals.scoring import score_continuations
from subquad.evals.text import TextTokens
from subquad.inspect.window_cut import Measured, Unit, WindowCut, Yardstick, choose, grow, joint, refine, spreads
from subquad.inspect.window_cut.search import uniform, uniform_layers
from subquad.mixers.attention import Attention
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

LAYER = {"mixer": "attention", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary": {"theta": 10000.0, "dim": 8}}
LAYER |= {"qkv_bias": True, "o_bias": True, "qk_norm": True}
N_LAYERS, CONTEXT, CUT = 5, 40, {"window": 6, "sinks": 2}


class Letters:
    """Encodes a digit as a token of its own."""

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 16 for c in text]


def build(layers):
    torch.manual_seed(0)
    stack = Stack(ModelConfig(vocab_size=60, d_model=32, d_mlp=48, layers=layers, tied=True)).double().eval()
    with torch.no_grad():
        stack.embed.weight.mul_(30)
    return stack.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build((*[LAYER] * (N_LAYERS - 1), LAYER | {"window": 12}, LAYER | {"window": 4}))


@pytest.fixture(scope="module")
def text():
    ids = torch.randint(60, (CONTEXT * 5 + 7,), generator=torch.Generator().manual_seed(1))
    return TextTokens(ids, torch.ones_like(ids))


@pytest.fixture(scope="module")
def questions():
    rows = [torch.randint(60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (33, 25, 33, 25)]
    # The last answer is longer than the others: its row is not as long as its neighbour's.
    return [Question(len(row), 0.5, tuple(row), str(10 ** (3 + i // 3) + i)) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def make(model, text, questions):
    def make(units, **options):
        settings = {"tokenizer": Letters(), "context": CONTEXT, "batch_tokens": 100} | CUT | options
        return WindowCut(model, text, questions, units=units, **settings)

    return make


@pytest.fixture(scope="module")
def layers(make):
    return make("layers")


@pytest.fixture(scope="module")
def heads(make):
    return make("heads")


def by_hand(cut, gone, text):
    """The model rebuilt by conversion, with a window in place of `gone`, measured by the plain evaluations."""
    kept = cut.kept_heads([unit for unit in cut.units if unit not in set(gone)])
    student = cut.model if not gone else transplant(cut.model, place_heads([2] * 6, kept, "attention", CUT))
    asked = [(q.tokens, Letters().encode(f" {q.value}")) for q in cut.questions]
    answers = score_continuations(student, asked)
    loss_w = perplexity(student, text, CONTEXT).nll_wt.mean(1)
    return Measured(loss_w, -torch.stack([a.logprob_n.sum() for a in answers]))


def assert_equal(got, want):
    torch.testing.assert_close(got.loss_w, want.loss_w, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.answer_q, want.answer_q, rtol=1e-9, atol=1e-12)


def test_units_are_what_sees_beyond_the_window(layers, heads):
    # The sixth layer's own window is smaller already: no unit, and it stays.
    assert layers.units == tuple(Unit(i, (0, 1)) for i in range(N_LAYERS))
    assert heads.units == tuple(Unit(i, (h,)) for i in range(N_LAYERS) for h in range(2))
    assert layers.kept_heads([Unit(2, (0, 1))]) == {2: [0, 1], 5: [0, 1]}
    assert heads.kept_heads([Unit(3, (1,)), Unit(0, (0,)), Unit(3, (0,))]) == {0: [0], 3: [0, 1], 5: [0, 1]}


@pytest.mark.parametrize("units", ["layers", "heads"])
@pytest.mark.parametrize("base", [(), (1, 3, 4)])
def test_every_toggle_equals_the_rebuilt_model(make, text, units, base):
    cut = make(units)
    gone = {cut.units[i] for i in base}
    measured = cut.toggle(gone, cut.units)
    assert_equal(measured[None], by_hand(cut, gone, text))
    for unit in cut.units:
        assert_equal(measured[unit], by_hand(cut, gone ^ {unit}, text))
    assert float((measured[cut.units[0]].loss_w - measured[None].loss_w).abs().max()) > 1e-3


def test_batches_and_repetitions_change_nothing(make, heads):
    gone = heads.units[::3]
    first, again = (heads.toggle(gone, heads.units) for _ in range(2))
    other = make("heads", batch_tokens=10000).toggle(gone, heads.units)
    for key, measured in first.items():
        assert torch.equal(measured.loss_w, again[key].loss_w)
        assert torch.equal(measured.answer_q, again[key].answer_q)
        assert_equal(measured, other[key])


def test_cost_counts_each_criterion_in_shares_of_all_cuts():
    def measured(loss, answer):
        return Measured(torch.tensor(loss), torch.tensor(answer))

    yard = Yardstick(measured([1.0, 3.0], [5.0]), measured([2.0, 4.0], [15.0]))
    assert yard.cost(yard.base) == 0
    assert yard.cost(yard.everything) == pytest.approx(2)
    assert yard.cost(measured([1.5, 3.2], [6.0])) == pytest.approx(0.35 + 0.1)
    weighted = Yardstick(yard.base, yard.everything, needles=3)
    assert weighted.cost(measured([1.5, 3.2], [6.0])) == pytest.approx(0.35 + 0.3)
    score = yard.score(measured([1.5, 3.2], [6.0]))
    assert score.loss.value == pytest.approx(0.35)
    assert score.retrieval is not None
    assert score.retrieval.value == pytest.approx(1)
    stirred = Yardstick(measured([1.0, 3.0], [5.0]), measured([3.0, 1.0], [15.0]))
    assert stirred.cost(stirred.everything) == pytest.approx(1)
    assert stirred.cost(measured([2.0, 3.0], [5.0])) == pytest.approx(0.25)
    alone = Yardstick(measured([1.0], []), measured([3.0], []))
    assert alone.cost(measured([2.0], [])) == pytest.approx(0.5)
    assert alone.score(alone.everything).retrieval is None


def plain_cost(cut, yard, kept):
    return yard.cost(cut.toggle(set(cut.units) - set(kept), ())[None])


def test_rank_keeps_what_costs_most_alone(heads):
    yard = heads.yardstick()
    alone = {u: plain_cost(heads, yard, set(heads.units) - {u}) for u in heads.units}
    found, rounds = choose(heads, yard, [0.3, 0.5], search="rank")
    assert rounds == []
    for keep, n in ((0.3, 3), (0.5, 5)):
        assert set(found[keep].kept) == set(sorted(alone, key=alone.get)[-n:])
        assert found[keep].cost == pytest.approx(plain_cost(heads, yard, found[keep].kept))


def test_greedy_keeps_the_best_unit_of_each_round_and_its_choices_are_nested(heads):
    yard = heads.yardstick()
    found, rounds = choose(heads, yard, [0.5, 0.2, 0.0])
    assert [len(r.kept) for r in rounds] == [0, 1, 2, 3, 4, 5]
    for before, after in pairwise(rounds):
        (added,) = set(after.kept) - set(before.kept)
        costs = {u: plain_cost(heads, yard, {*before.kept, u}) for u in heads.units if u not in before.kept}
        assert added == min(costs, key=costs.get)
        assert after.cost == pytest.approx(costs[added])
    assert set(found[0.0].kept) < set(found[0.2].kept) < set(found[0.5].kept)
    assert found[0.0].cost == pytest.approx(yard.cost(yard.everything))
    # Several picks a round still pass through every size that was asked for.
    _, fast = choose(heads, yard, [0.5, 0.2], picks=4)
    assert [len(r.kept) for r in fast] == [0, 2, 5]
    assert fast[1].kept != () and set(fast[1].kept) < set(fast[2].kept)


def test_backward_cuts_what_is_missed_least(layers):
    yard = layers.yardstick()
    rounds = grow(layers, yard, [2], backward=True)
    assert [len(r.kept) for r in rounds] == [5, 4, 3, 2]
    for before, after in pairwise(rounds):
        costs = {u: plain_cost(layers, yard, set(before.kept) - {u}) for u in before.kept}
        assert set(before.kept) - set(after.kept) == {min(costs, key=costs.get)}


def test_a_wide_beam_finds_the_best_pair(layers):
    yard = layers.yardstick()
    pairs = {(a, b): plain_cost(layers, yard, (a, b)) for a in layers.units for b in layers.units if a < b}
    found, _ = choose(layers, yard, [0.4], search="beam", width=5)
    assert found[0.4].kept == min(pairs, key=pairs.get)
    narrow, _ = choose(layers, yard, [0.4], search="greedy")
    assert found[0.4].cost <= narrow[0.4].cost


def test_refinement_finds_the_best_swap_and_stops(layers):
    yard = layers.yardstick()
    pairs = {(a, b): plain_cost(layers, yard, (a, b)) for a in layers.units for b in layers.units if a < b}
    start = joint(layers, yard, max(pairs, key=pairs.get))
    lines = []
    end = refine(layers, yard, start, swaps=10, report=lines.append)
    assert lines
    assert len(end.kept) == 2
    assert pairs[end.kept] < start.cost
    assert end.cost == pytest.approx(pairs[end.kept])
    assert refine(layers, yard, end, swaps=3) == end
    once = set(refine(layers, yard, start, swaps=1).kept)
    (restored,) = once - set(start.kept)
    gone = set(layers.units) - set(start.kept)
    costs = {u: plain_cost(layers, yard, {*start.kept, u}) for u in gone}
    assert restored == min(costs, key=costs.get)
    assert plain_cost(layers, yard, once) == pytest.approx(
        min(plain_cost(layers, yard, {restored, u}) for u in start.kept)
    )


def test_the_uniform_baseline_is_evenly_spread():
    units = [Unit(i, (h,)) for i in range(6) for h in range(2)]
    assert [units.index(u) for u in uniform(units, 4)] == [1, 4, 7, 10]
    assert uniform_layers(units, 5) == tuple(u for u in units if u.layer in (1, 4))
    assert uniform(units, 0) == uniform_layers(units, 0) == ()


def test_baselines_are_of_the_same_size(layers, heads):
    for cut, names in ((layers, ["evenly spread"]), (heads, ["evenly spread", "evenly spread layers"])):
        yard = cut.yardstick()
        found = spreads(cut, yard, 4)
        assert list(found) == names
        for choice in found.values():
            assert len(choice.kept) == 4
            assert choice.cost == pytest.approx(plain_cost(cut, yard, choice.kept))


def test_without_needles_only_the_loss_counts(model, text):
    cut = WindowCut(model, text, context=CONTEXT, **CUT)
    yard = cut.yardstick()
    assert yard.score(yard.everything).retrieval is None
    loss = {u: float(m.loss_w.mean()) for u, m in cut.toggle((), cut.units).items() if u is not None}
    found, _ = choose(cut, yard, [0.2], search="rank")
    assert found[0.2].kept == (max(loss, key=loss.get),)


def test_the_model_is_left_alone_and_progress_ends(model, heads):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    heads.toggle((), heads.units[1:6:2], lambda *args: seen.append(args))
    assert seen[-1][0] == seen[-1][1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(isinstance(b.mixer, Attention) for b in model.blocks)


def test_layers_that_are_no_attention_are_run_as_they_are(text):
    other = {"mixer": "gla", "n_heads": 2, "key_dim": 8, "value_dim": 8}
    hybrid = build((LAYER, other, LAYER))
    cut = WindowCut(hybrid, text, context=CONTEXT, units="heads", **CUT)
    assert {unit.layer for unit in cut.units} == {0, 2}
    whole = perplexity(hybrid, text, CONTEXT).nll_wt.mean(1)
    torch.testing.assert_close(cut.toggle((), cut.units)[None].loss_w, whole, rtol=1e-9, atol=1e-12)


def test_bad_input_is_refused(model, text, layers):
    with pytest.raises(ConfigError, match="smaller window"):
        WindowCut(model, text, window=64, sinks=4, context=CONTEXT)
    with pytest.raises(DataError, match="more text"):
        WindowCut(model, text.first(20), context=CONTEXT, **CUT)
    with pytest.raises(ConfigError, match="layers or heads"):
        WindowCut(model, text, units="neurons", context=CONTEXT, **CUT)
    for keep in (-0.1, 0.95, 1.0):
        with pytest.raises(ConfigError, match=f"keep={keep}"):
            layers.count(keep)
    yard = Yardstick(*[Measured(torch.zeros(1), torch.zeros(0))] * 2)
    with pytest.raises(ConfigError, match="greedy"):
        choose(layers, yard, [0.5], search="gredy")
    with pytest.raises(ConfigError, match="picks"):
        choose(layers, yard, [0.5], picks=0)
