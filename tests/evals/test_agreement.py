import pytest
import torch

from subquad.core.errors import ConfigError
from subquad.evals.agreement import evaluate_agreement, evaluate_divergence, prompts_from_text
from subquad.evals.text import TextTokens

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [3], [40, 41], [60, 61, 62]]


def greedy(model, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_model_agrees_with_itself(model):
    result = evaluate_agreement(model, model, PROMPTS, new_tokens=6)
    assert result.tokens_n.tolist() == [6] * 5
    assert result.match.value == 1.0
    assert result.identical.value == 1.0
    assert abs(result.kl.value) < 1e-12
    assert result.same.value == 6


@pytest.mark.parametrize(("batch", "batch_tokens"), [(2, 10_000), (8, 20)])
def test_equals_the_plain_loop(model, other, batch, batch_tokens):
    result = evaluate_agreement(other, model, PROMPTS, new_tokens=6, batch=batch, batch_tokens=batch_tokens)
    for i, prompt in enumerate(PROMPTS):
        theirs, mine = greedy(model, prompt, 6), greedy(other, prompt, 6)
        tokens = torch.tensor([prompt + theirs])
        log_p, log_q = (m(tokens)[0, len(prompt) - 1 : -1].log_softmax(-1).detach() for m in (model, other))
        assert int(result.match_n[i]) == int((log_q.argmax(-1) == torch.tensor(theirs)).sum())
        kl = (log_p.exp() * (log_p - log_q)).sum()
        assert float(result.kl_n[i]) == pytest.approx(float(kl), rel=1e-9)
        same = next((j for j, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b), 6)
        assert int(result.same_n[i]) == same
    assert result.kl.low < result.kl.value < result.kl.high


def test_an_end_token_ends_the_answer(tokenizer, model, make_model):
    answer = greedy(model, PROMPTS[0], 6)
    ended = make_model(len(tokenizer), {}, {"window": 8, "sinks": 1}, max_positions=256, eos_tokens=(answer[2],))
    result = evaluate_agreement(model, ended, PROMPTS[:1], new_tokens=6)
    assert int(result.tokens_n[0]) == answer.index(answer[2]) + 1
    assert result.identical.value == 1.0


def test_prompts_are_spread_over_the_text():
    text = TextTokens(torch.arange(100), torch.ones(100, dtype=torch.int64))
    assert prompts_from_text(text, 3, 10) == [[*range(10)], [*range(45, 55)], [*range(90, 100)]]
    with pytest.raises(ConfigError, match="give more text"):
        prompts_from_text(text, 20, 10)


def test_vocabularies_must_agree(model, make_model):
    with pytest.raises(ConfigError, match="share a tokenizer"):
        evaluate_agreement(make_model(50, {}), model, PROMPTS)


def test_the_divergence_of_a_text_is_the_plain_one_of_each_window(model, other):
    text = TextTokens(torch.arange(70) % 60, torch.ones(70, dtype=torch.int64))
    seen = []
    result = evaluate_divergence(other, model, text, 20, batch=2, progress=lambda done, of: seen.append((done, of)))
    windows = (torch.arange(60) % 60).view(3, 20)
    log_p, log_q = (m(windows)[:, :-1].log_softmax(-1).detach() for m in (model, other))
    want = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    torch.testing.assert_close(result.kl_w, want.double(), rtol=1e-9, atol=1e-12)
    assert result.kl.value == pytest.approx(float(want.mean()), rel=1e-9)
    assert seen == [(40, 60), (60, 60)]
