"""The shapes that the engine's benches decode, and the baseline that copies states."""

from __future__ import annotations

import torch

from subquad.bench import shapes
from subquad.bench.decoding import DRAFTED
from subquad.bench.engine.verify import RIGHT, SHARE, Script, with_copies
from subquad.bench.generating import filled
from subquad.bench.harness import Bench
from subquad.engine.request import Limits, Request
from subquad.engine.rounds import Rounds
from subquad.engine.sampler import SamplingConfig
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack


def test_a_quarter_of_the_layers_is_attention() -> None:
    layers = shapes.hybrid_layers(shapes.ATTENTION, shapes.LINEAR, count=32, every=4)
    assert [i for i, layer in enumerate(layers) if layer["mixer"] == "attention"] == list(range(3, 32, 4))
    assert all(
        layer is shapes.LINEAR for layer in shapes.hybrid_layers(shapes.ATTENTION, shapes.LINEAR, count=3, every=0)
    )


def test_the_large_shape_has_the_parameters_of_its_name() -> None:
    with torch.device("meta"):
        layers = (shapes.ATTENTION,) * shapes.LAYERS
        model = Stack(ModelConfig(shapes.VOCAB_SIZE, shapes.D_MODEL, shapes.D_MLP, layers))
    assert sum(x.numel() for x in model.parameters()) == 8_030_261_248
    a_token = model.init_state(1, 1025, device="meta").nbytes - model.init_state(1, 1024, device="meta").nbytes
    assert a_token == 2 * 32 * 8 * 128 * 4


def test_weights_are_finite_and_the_same_each_time() -> None:
    bench = Bench("engine.some", smoke=True)
    first, second = (dict(shapes.shape_8b(bench, 2).named_parameters()) for _ in range(2))
    assert all(torch.equal(x, second[name]) and x.isfinite().all() for name, x in first.items())


def started(model: Stack, rows: int, drafter: Script) -> Rounds:
    rounds = Rounds(model, rows, 64, 1 + DRAFTED, 64, drafter, compile=False)
    sampling = SamplingConfig(logit_bias={RIGHT: 1e4})
    requests = [Request([i + 1], Limits(max_new_tokens=60, end_tokens=[]), sampling) for i in range(rows)]
    rounds.admit(range(rows), requests, [0] * rows)
    rounds.start(range(rows), [request.prompt for request in requests])
    return rounds


def test_copies_of_states_give_what_a_replay_gives() -> None:
    model = shapes.shape_8b(Bench("engine.some", smoke=True), 0)
    other = with_copies(model)
    assert [x.data_ptr() for x in model.parameters()] == [x.data_ptr() for x in other.parameters()]
    with torch.no_grad():
        both = [started(one, 3, Script(3)) for one in (model, other)]
        for _ in range(5):
            for rounds in both:
                rounds.run(3, DRAFTED)
            given = [rounds.take(3) for rounds in both]
            assert given[0] == given[1]
            states = [dict(rounds.pool.settled().tensors()) for rounds in both]
            for name, x in states[0].items():
                # Blocks of tokens here, one by one there: float32 sums of up to 64 numbers in another order, through
                # four layers, 4 * 64 * 2^-24 = 1.5e-5, which each layer's norms may enlarge by a few.
                torch.testing.assert_close(x, states[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_script_says_which_guesses_stand() -> None:
    model = shapes.shape_8b(Bench("engine.some", smoke=True), 0)
    script = Script(40)
    with torch.no_grad():
        rounds = started(model, 40, script)
        rounds.run(40, DRAFTED)
    right_bk = script._script_nbk[0] == RIGHT
    assert abs(float(right_bk.float().mean()) - SHARE) < 0.1
    want = right_bk.to(torch.int64).cumprod(1).sum(1).tolist()
    given = rounds.take(40)
    assert [one.kept for one in given] == want
    assert all(set(one.tokens) == {RIGHT} and len(one.tokens) == 1 + n for one, n in zip(given, want, strict=True))


def test_rows_that_share_a_prompt_go_on_as_one_that_has_read_it() -> None:
    model = shapes.shape_8b(Bench("engine.some", smoke=True), 2)
    with torch.no_grad():
        rounds = filled(model, 3, 40, 8, 8)
        for _ in range(4):
            rounds.run(3, 0)
        answers = [one.tokens for one in rounds.take(3)]
        tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        for _ in range(4):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert answers == [tokens[40:]] * 3
