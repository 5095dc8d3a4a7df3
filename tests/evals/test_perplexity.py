import math

import pytest
import torch
import torch.nn.functional as F

from subquad.core.errors import ConfigError, DataError
from subquad.evals import scoring
from subquad.evals.perplexity import compare_perplexity, perplexity, perplexity_ratio, spread_windows
from subquad.evals.text import TextTokens, load_text, read_text, tokenize_text

TEXT = "The sky is blue — and 4821 is a number. 水 flowed 🙂 from the spout.\n" * 4


def test_bytes_of_tokens_add_up_to_the_text(tokenizer):
    text = tokenize_text(tokenizer, TEXT)
    assert int(text.bytes_n.sum()) == len(TEXT.encode())
    assert tokenizer.decode(text.ids_n) == TEXT
    first = tokenize_text(tokenizer, TEXT, limit=7)
    assert first.ids_n.tolist() == text.ids_n[:7].tolist()
    assert first.bytes_n.tolist() == text.bytes_n[:7].tolist()


def test_text_files_join_as_they_were(tmp_path, tokenizer):
    body = "".join(f"Line {i} of the text.\n\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(body)
    assert read_text(str(tmp_path / "a.txt"), tokenizer) == body
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(str(tmp_path / "a.jsonl"), tokenizer) == "one\n\ntwo\n\n"
    assert len(load_text(str(tmp_path / "a.txt"), tokenizer, 50).ids_n) == 50


@pytest.mark.parametrize("at_once", [2**25, 1000])
def test_equals_cross_entropy_of_each_window(model, tokenizer, monkeypatch, at_once):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    text = tokenize_text(tokenizer, TEXT)
    context = 20
    result = perplexity(model, text, context, batch=3)
    rows = text.ids_n[: len(text.ids_n) // context * context].view(-1, context)
    want = torch.stack([F.cross_entropy(model(row[None])[0, :-1], row[1:], reduction="none") for row in rows]).detach()
    torch.testing.assert_close(result.nll_wt, want, rtol=1e-12, atol=1e-12)
    assert result.windows == len(rows)
    assert result.tokens == len(rows) * (context - 1)
    assert result.perplexity.value == pytest.approx(math.exp(want.mean()), rel=1e-12)
    scored_bytes = int(text.bytes_n[: rows.numel()].view(-1, context)[:, 1:].sum())
    assert result.bits_per_byte.value == pytest.approx(float(want.sum()) / math.log(2) / scored_bytes, rel=1e-12)


def test_buckets_cover_every_position_once(model, tokenizer):
    result = perplexity(model, tokenize_text(tokenizer, TEXT), 20)
    buckets = result.by_position()
    assert [(b.start, b.stop) for b in buckets] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 20)]
    total = sum(b.nll * (b.stop - b.start) for b in buckets) * result.windows
    assert total == pytest.approx(result.nll_total, rel=1e-12)
    assert [float(result.nll_w(b.start, b.stop).mean()) for b in buckets] == [b.nll for b in buckets]
    torch.testing.assert_close(result.nll_w(5, 20), result.nll_wt[:, 4:].mean(1), rtol=0, atol=0)
    for start, stop in ((0, 4), (4, 4), (4, 21)):
        with pytest.raises(ConfigError, match="1 <= start < stop <= 20"):
            result.nll_w(start, stop)
    assert buckets[0].nll == pytest.approx(float(result.nll_wt[:, 0].mean()), rel=1e-12)


def test_ratio_is_paired_over_windows(model, other, tokenizer):
    text = tokenize_text(tokenizer, TEXT * 3)
    teacher, student = perplexity(model, text, 16), perplexity(other, text, 16)
    ratio = perplexity_ratio(student, teacher)
    assert ratio.value == pytest.approx(student.perplexity.value / teacher.perplexity.value, rel=1e-12)
    assert ratio.low < ratio.value < ratio.high
    assert perplexity_ratio(teacher, teacher).high == 1.0
    assert compare_perplexity(teacher, teacher).p_value == 1.0
    assert compare_perplexity(student, teacher).interval == ratio
    with pytest.raises(ConfigError, match="same windows"):
        perplexity_ratio(student, perplexity(model, text, 18))


def test_windows_are_spread_over_the_text():
    text = TextTokens(torch.arange(103), torch.arange(103) * 2)
    few = spread_windows(text, 10, 3)
    assert few.ids_n.view(3, 10)[:, 0].tolist() == [0, 30, 60]
    assert few.bytes_n.tolist() == [2 * i for i in few.ids_n.tolist()]
    assert spread_windows(text, 10, 99).ids_n.tolist() == [*range(100)]
    with pytest.raises(ConfigError, match="at least 1"):
        spread_windows(text, 10, 0)


def test_bad_contexts(model, tokenizer):
    text = tokenize_text(tokenizer, TEXT)
    with pytest.raises(ConfigError, match="at least 2"):
        perplexity(model, text, 1)
    with pytest.raises(DataError, match="more text"):
        perplexity(model, text, 10_000)
    long = TextTokens(text.ids_n.repeat(4), text.bytes_n.repeat(4))
    with pytest.warns(UserWarning, match="beyond the 256 positions"):
        perplexity(model, long, 300)


def test_progress_ends_at_the_total(model, tokenizer):
    seen = []
    perplexity(
        model, tokenize_text(tokenizer, TEXT), 20, batch=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1][0] == seen[-1][1] == len(tokenize_text(tokenizer, TEXT).ids_n) // 20 * 20
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
