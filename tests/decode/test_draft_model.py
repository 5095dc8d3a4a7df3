"""What is particular to a model as drafter: its state holds only what stood, and it is refused where it can't serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from subquad import cli
from subquad.core.errors import ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.decode.draft_model import DraftModel
from subquad.decode.spectr import SpecTr
from subquad.engine.draft import Draft, InTurn, parse_drafter
from subquad.engine.generate import Generation, Limits, generate
from subquad.engine.history import History
from subquad.engine.sampler import Sampler, SamplingConfig
from subquad.engine.trace import Look
from subquad.engine.translate import Foreign, Translation
from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack

from .conftest import V, foreign

Models = Callable[[str], Stack]


@pytest.mark.parametrize("mixer", ["attention", "mamba2", "windowed_linear", "parallel"])
def test_a_model_that_guesses_for_itself_is_always_right(mixer: str, models: Models, prompts: list[list[int]]) -> None:
    """Greedy, in float64: every guess stands, so its state must be the model's own after any round."""
    model, looks = models(mixer), list[Look]()
    limits = Limits(max_new_tokens=15, end_tokens=[])
    expected = generate(model, prompts, limits=limits)
    got = generate(model, prompts, limits=limits, drafter=DraftModel(model), draft_tokens=4, on_look=looks.append)
    assert got == expected
    assert sum(look.kept for look in looks) == sum(look.guessed for look in looks)
    assert sum(look.rounds for look in looks) == 3  # five tokens a round


def test_coupled_draws_are_those_of_plain_decoding(models: Models, prompts: list[list[int]]) -> None:
    """At any temperature, which the exchange of distributions does not give; and most guesses stand."""
    model, small, looks = models("gla"), models("mamba2"), list[Look]()
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, seed=5)
    limits = Limits(max_new_tokens=20, end_tokens=[4])
    expected = generate(model, prompts, limits=limits, sampling=sampling)

    def coupled(drafter: Stack) -> list[Generation]:
        looks.clear()
        return generate(
            model,
            prompts,
            limits=limits,
            sampling=sampling,
            drafter=DraftModel(drafter, coupled=True),
            draft_tokens=3,
            on_look=looks.append,
        )

    assert coupled(small) == expected
    assert coupled(model) == expected
    assert sum(look.kept for look in looks) >= 0.99 * sum(look.guessed for look in looks) - len(prompts)


def test_what_was_missed_is_read_before_the_next_guess(models: Models) -> None:
    model = models("gated_deltanet")
    text = torch.randint(23, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    drafts = []
    for told_at_once in (True, False):
        drafter = DraftModel(model)
        drafter.open(model, 1, 800)
        drafter.put([0], [text if told_at_once else text[:5]])
        if not told_at_once:
            for start in range(5, 700, 5):
                block = torch.tensor([text[start : start + 5]])
                drafter.observe(block, torch.tensor([5]), torch.zeros(1, 5, 32))
        drafter.prepare(1, 3)
        drafts.append(drafter.propose(1, 3, Sampler([SamplingConfig()]), History.start([[0]], 0)).tokens_bk.tolist())
    assert drafts[0] == drafts[1]


def test_a_model_of_another_vocabulary_is_refused(models: Models) -> None:
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    other = Stack(ModelConfig(vocab_size=24, d_model=16, d_mlp=32, layers=(layer,))).double()
    with pytest.raises(ConfigError, match="expected a vocabulary of 23 tokens, got 24; use a smaller"):
        generate(models("attention"), [[1]], drafter=DraftModel(other))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["draft_model"], "expected model=NAME"),
        (["draft_model,model=attention,coupled=maybe"], "coupled=true or false"),
        (["draft_model,model=attention", "copyspec"], "expected no drafter behind one that always guesses"),
    ],
)
def test_specs_that_mean_nothing(specs: list[str], message: str, models: Models) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_drafter(specs, models)


def permuted(model: Stack, order: list[int]) -> Stack:
    """The same model with its token i under the id ``order[i]``."""
    other = Stack(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in (other.embed.weight, other.lm_head.weight):
            weight[torch.tensor(order)] = weight.clone()
    return other


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
def test_a_foreign_model_of_the_same_mind_is_always_right(
    mixer: str, coupled: bool, models: Models, prompts: list[list[int]]
) -> None:
    """All of its ids are others: greedy and sampled, what it reads and what it is taken to guess must be the same."""
    model, order = models(mixer), torch.randperm(V).tolist()
    other = Foreign(permuted(model, order), Translation([[i] for i in order], frozenset(range(V))))
    limits = Limits(max_new_tokens=15, end_tokens=[])
    for temperature in (0.0, 1.0):
        looks = list[Look]()
        options: dict[str, Any] = {"limits": limits, "sampling": SamplingConfig(temperature=temperature, seed=2)}
        drafter = DraftModel(other, coupled=coupled)
        got = generate(model, prompts, drafter=drafter, draft_tokens=4, on_look=looks.append, **options)
        assert sum(look.kept for look in looks) == sum(look.guessed for look in looks)
        assert sum(look.rounds for look in looks) == 3  # five tokens a round
        if coupled or not temperature:
            assert got == generate(model, prompts, **options)


def told(drafter: DraftModel, target: Stack, parts: list[list[list[int]]], k: int, sampling: SamplingConfig) -> Draft:
    """Guesses behind texts that came in parts, the first as prompts; each row's parts may be of unlike lengths."""
    rows = len(parts)
    drafter.open(target, rows + 1, 60)
    drafter.put(range(rows), [row[0] for row in parts])
    for later in list(zip(*parts, strict=True))[1:]:
        width = max(map(len, later))
        tokens_bt = torch.tensor([[*part, *[0] * (width - len(part))] for part in later])
        drafter.observe(tokens_bt, torch.tensor([len(part) for part in later]), torch.zeros(rows, width, 0))
    drafter.prepare(rows, k)
    sampler = Sampler([dataclasses.replace(sampling, seed=i) for i in range(rows)])
    return drafter.propose(rows, k, sampler, History.start([[0]] * rows, 0))


@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
def test_a_foreign_model_reads_its_own_tokens_and_guesses_what_both_have(mixer: str, models: Models) -> None:
    """Against plain reads of the translated text: q is the softmax over the intersection, a greedy guess its best."""
    drafter, target = foreign(mixer), models("gla")
    pieces, common = drafter.translation.pieces, sorted(drafter.translation.common)
    texts = [[3, 17, 16, 18, 0, 22, 19, 1], [16, 16, 20, 5], [2, 15, 19, 19, 21, 12, 18, 7, 6, 13, 14]]
    # Row 0 is told in one part; 16 and 20 are read as nothing.
    parts = [[texts[0], [], []], [texts[1][:1], [16, 20], [5]], [texts[2][:2], texts[2][2:9], texts[2][9:]]]
    greedy = told(DraftModel(drafter), target, parts, 3, SamplingConfig())
    drawn = told(DraftModel(drafter), target, parts, 3, SamplingConfig(temperature=0.9))
    assert greedy.q_bkv is None and drawn.q_bkv is not None
    assert greedy.length_b.tolist() == drawn.length_b.tolist() == [3, 3, 3]
    for row, text in enumerate(texts):
        for draft, temperature in ((greedy, 1.0), (drawn, 0.9)):
            own = [4, *(piece for token in text for piece in pieces[token])]
            for i, guess in enumerate(draft.tokens_bk[row].tolist()):
                logits_v = Stack.forward(drafter, torch.tensor([own]))[0, -1]
                q_v = torch.zeros(V)
                q_v[common] = (logits_v[[pieces[i][0] for i in common]] / temperature).softmax(-1).float()
                assert guess in common
                if draft.q_bkv is None:
                    assert guess == int(q_v.argmax())
                else:
                    torch.testing.assert_close(draft.q_bkv[row, i].float(), q_v, rtol=1e-5, atol=1e-7)
                own += pieces[guess]


def test_a_foreign_model_says_nothing_before_it_has_read_all(models: Models) -> None:
    """Tokens of several pieces each, which another drafter may have guessed, are more than a round reads."""
    model, drafter = models("gla"), DraftModel(foreign("gated_deltanet"))
    text, sampler = [19] * 5, Sampler([SamplingConfig()])
    drafter.open(model, 1, 40)
    drafter.put([0], [[3]])
    drafter.prepare(1, 2)
    for tokens in ([1], text):
        drafter.observe(torch.tensor([tokens]), torch.tensor([len(tokens)]), torch.zeros(1, len(tokens), 0))
    history, drafts = History.start([[0]], 0), list[Draft]()
    for _ in range(5):
        drafts.append(drafter.propose(1, 2, sampler, history))
    assert [int(draft.length_b) for draft in drafts] == [0, 0, 0, 2, 0]  # 18 pieces, 5 a round
    expected = told(DraftModel(drafter.model), model, [[[3, 1, *text]]], 2, SamplingConfig())
    assert drafts[3].tokens_bk.tolist() == expected.tokens_bk.tolist()


def test_a_foreign_model_in_company(models: Models, prompts: list[list[int]]) -> None:
    """Behind copies, as a tree, coupled, and held to some tokens: greedy tokens are those of plain decoding."""
    model, limits = models("gla"), Limits(max_new_tokens=20, end_tokens=[])
    several = [*prompts, [19, 18, 3, 19, 18, 3], [14] * 5]
    expected = generate(model, several, limits=limits)
    small = foreign("mamba2")
    for drafter in (
        InTurn([CopySpec((2,)), DraftModel(small)]),
        SpecTr(small, (3, 2)),
        DraftModel(small, vocab=[1, 2, 3, 20]),
    ):
        assert generate(model, several, limits=limits, drafter=drafter, draft_tokens=3) == expected
    sampling = SamplingConfig(temperature=1.0, top_p=0.95, seed=5)
    expected = generate(model, several, limits=limits, sampling=sampling)
    for drafter in (DraftModel(small, coupled=True), SpecTr(small, (3, 2), coupled=True)):
        options: dict[str, Any] = {"limits": limits, "sampling": sampling, "draft_tokens": 3}
        assert generate(model, several, drafter=drafter, **options) == expected


def test_a_foreign_model_is_one_graph_without_a_break(models: Models) -> None:
    """What it is told and what it guesses, with two kinds of rows: nothing of it asks the device."""
    torch.compiler.reset()
    model, sampler = models("gla"), Sampler([SamplingConfig(), SamplingConfig(temperature=1.0, seed=4)])
    tokens_bt, n_b, history = torch.tensor([[19, 3], [2, 15]]), torch.tensor([2, 1]), History.start([[0]] * 2, 0)
    drafts: list[Draft] = []
    for fuse in (lambda fn: fn, lambda fn: torch.compile(fn, fullgraph=True, backend="eager")):
        drafter = DraftModel(foreign("attention"))
        drafter.open(model, 2, 20)
        drafter.put([0, 1], [[1, 2], [7, 22]])
        drafter.prepare(2, 2)

        def step(drafter: DraftModel) -> Draft:
            drafter.observe(tokens_bt, n_b, torch.zeros(2, 2, 0))
            return drafter.propose(2, 2, sampler, history)

        drafts += [fuse(step)(drafter)]
    assert drafts[0].q_bkv is not None and drafts[1].q_bkv is not None
    assert torch.equal(drafts[0].tokens_bk, drafts[1].tokens_bk)
    torch.testing.assert_close(drafts[1].q_bkv, drafts[0].q_bkv, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("vocab", "size", "message"),
    [
        ([19, 22], V, "draft vocabulary: expected ids from 0 to 22"),
        (None, V + 1, "expected a vocabulary of 23 tokens, got 24; .* or translate its tokens"),
    ],
)
def test_a_foreign_model_that_can_not_guess_is_refused(
    vocab: list[int] | None, size: int, message: str, models: Models
) -> None:
    small = foreign("attention")
    small.translation = dataclasses.replace(small.translation, pieces=[*small.translation.pieces, []][:size])
    with pytest.raises(ConfigError, match=message):
        generate(models("attention"), [[1]], drafter=DraftModel(small, vocab=vocab))


def test_the_command_line_translates(
    byte_model: Callable[[Stack], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target of bytes, a drafter of SentencePiece: the texts of plain decoding, greedy and coupled."""
    layer = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    target = byte_model(Stack(ModelConfig(vocab_size=258, d_model=16, d_mlp=32, layers=(layer,))))
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "th", *"abcdefgh"]
    core = Tokenizer(
        tokenizer_models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(words[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    small = Stack(ModelConfig(vocab_size=len(words), d_model=16, d_mlp=32, layers=(layer,)))
    save_pretrained(small, tmp_path / "small", tokenizer)
    plain = ["generate", target, "ab ab", "--max-new-tokens", "12", "--device", "cpu"]
    for options, more in (([], ""), (["--temperature", "1"], ",coupled=true")):
        texts: list[str] = []
        for draft in ([], ["--draft", f"draft_model,model={tmp_path / 'small'}{more}", "--draft-tokens", "2"]):
            assert cli.main([*plain, *options, *draft]) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1]
