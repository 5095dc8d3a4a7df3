"""The published stages: falling rate in the first, flat ones after, the last on long sequences."""

from subquad.convert.radlads import RECIPE


def test_stages_and_tokens_are_the_published_ones():
    assert [(phase.name, phase.stage) for phase in RECIPE.phases] == [
        ("align", "align"),
        ("distill", "distill"),
        ("long", "supervise"),
    ]
    budgets = RECIPE.budgets(700_000_000)
    assert [budgets[phase.name].tokens for phase in RECIPE.phases] == [100_000_000, 500_000_000, 100_000_000]
    assert (RECIPE.batch, RECIPE.seq, RECIPE.keep) == (32, 512, 0.0)


def test_rates_are_the_published_ones():
    align, distill, long = (phase.rate for phase in RECIPE.phases)
    assert align.lr == 1e-3 and abs(align.lr * align.factor(1.0) - 1e-5) < 1e-12
    for rate in (distill, long):
        # Everything trains at the one flat rate.
        assert rate.old == 1.0
        assert {rate.lr * rate.factor(at) for at in (0.02, 0.5, 1.0)} == {1e-5}


def test_the_last_phase_reads_long_sequences_in_batches_of_as_many_tokens():
    assert RECIPE.phases[-1].seq == RECIPE.batch * RECIPE.seq // 2 == 8192
