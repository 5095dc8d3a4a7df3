"""What drafters are measured on, and what counts as a loop or as the same answer."""

from __future__ import annotations

import ast
import importlib
import json
import lzma
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from subquad import cli
from subquad.bench import drafting, prompts, rooms
from subquad.bench.drafting import ALONE, HOW, NEW_TOKENS, PASSES, loops, run_drafter, same
from subquad.bench.harness import Bench, GateError
from subquad.bench.prompts import KINDS, prompt_file, prompt_texts, prompt_tokens, spread
from subquad.core.errors import CheckpointError, ConfigError
from subquad.decode.copyspec import CopySpec
from subquad.decode.draft_head import DraftHead
from subquad.decode.self_draft import SelfDraft
from subquad.engine.draft import Draft, Drafter
from subquad.engine.model_draft import ModelDrafter
from subquad.engine.relax import Relaxed
from subquad.models.checkpoint import save_pretrained
from subquad.models.config import ModelConfig
from subquad.models.draft_head import Head, save_head, untrained
from subquad.models.head_config import HeadConfig
from subquad.models.stack import Stack

HERE = Path(prompts.__file__).parent


def test_there_are_enough_prompts_of_every_kind_and_none_twice() -> None:
    texts = {kind: prompt_texts(kind) for kind in KINDS}
    assert {kind: len(some) for kind, some in texts.items()} == {"chat": 32, "code": 32, "copies": 16}
    assert len({text for some in texts.values() for text in some}) == 80
    categories = Counter(json.loads(line)["category"] for line in (HERE / "chat.jsonl").read_text().splitlines())
    assert len(categories) == 8 and set(categories.values()) == {4}


def test_heads_of_functions_are_heads_of_functions() -> None:
    for text in prompt_texts("code"):
        (function,) = ast.parse(text).body
        assert isinstance(function, ast.FunctionDef) and ">>> " in (ast.get_docstring(function) or "")


def test_published_sets_take_the_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats/mt_bench.jsonl").write_text('{"turns": ["first", "second"]}\n')
    with lzma.open(tmp_path / "human_eval.jsonl.xz", "wt") as file:
        file.write('{"prompt": "def f():\\n", "test": "", "entry_point": "f"}\n')
    assert prompt_texts("chat", tmp_path) == ["first"]
    assert prompt_texts("code", tmp_path) == ["def f():\n"]
    assert prompt_texts("copies", tmp_path) == prompt_texts("copies")
    (tmp_path / "mt_bench.jsonl.gz").touch()
    with pytest.raises(ConfigError, match=r"expected one file mt_bench\.jsonl.*got 2"):
        prompt_file("chat", tmp_path)


def test_without_a_template_a_prompt_is_its_text() -> None:
    words = SimpleNamespace(chat_template=None, bos_token_id=None, encode=lambda text, **_: list(text.encode()))
    assert bytes(prompt_tokens("chat", words)[0]).decode() == prompt_texts("chat")[0]
    assert bytes(prompt_tokens("code", words)[0]).decode() == prompt_texts("code")[0].rstrip()


def test_few_prompts_are_spread_over_all() -> None:
    assert spread([[i] for i in range(32)], 4) == [[0], [8], [16], [24]]
    assert spread([[1], [2]], 5) == [[1], [2]]


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([9, *[1, 2, 3] * 11], True),
        ([*range(16)] * 2, True),
        ([*range(17)] * 2, False),
        ([1] * 31, False),
        ([*[1] * 40, 2], False),
    ],
)
def test_a_loop_is_a_short_piece_that_fills_the_last_tokens(tokens: list[int], loop: bool) -> None:
    assert loops(tokens) is loop


def test_answers_are_the_same_up_to_what_the_model_rounds() -> None:
    layer = {"mixer": "attention", "n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    model = Stack(ModelConfig(vocab_size=5, d_model=8, d_mlp=8, layers=(layer,))).requires_grad_(False)
    model.lm_head.weight[3] = model.lm_head.weight[1]
    assert same(model, [1, 2], [4, 0], [4, 0])
    assert same(model, [1, 2], [4, 1, 0], [4, 3, 2])
    assert not same(model, [1, 2], [4, 1], [4, 2])
    assert not same(model, [1, 2], [4, 1], [4])


class Meddler(CopySpec):
    """Turns the model's head upside down while a round reads."""

    def propose(self, *args: Any) -> Draft:
        """Guesses as they are, and other logits from now on."""
        self.head.neg_()
        return super().propose(*args)

    def observe(self, *args: Any) -> None:
        """The head as it was."""
        super().observe(*args)
        self.head.neg_()

    @torch.no_grad()
    def open(self, target: Stack, rows: int, capacity: int) -> None:
        """Remember the head."""
        super().open(target, rows, capacity)
        self.head = target.lm_head.weight


def test_a_drafter_that_changes_answers_has_no_speed() -> None:
    bench = Bench("decode.meddler", smoke=True)
    torch.manual_seed(0)
    with pytest.raises(GateError, match="differ without a near-tie"):
        run_drafter(bench, lambda _: Meddler())
    assert bench.rows == []


def test_every_way_has_a_figure_beside_plain_decoding() -> None:
    bench = Bench("decode.copyspec", smoke=True)
    run_drafter(bench, lambda _: CopySpec(), relaxed=Relaxed(beta=9, tau=9.0))
    rows = {row.id: row for row in bench.rows}
    for model in ("attention", "hybrid"):
        for b in (1, 2):
            changed = rows[f"spec.copyspec.{model}.relaxed.b{b}.loose"]
            assert changed.shape["beta"] == 9 and changed.shape["tokens"] == 2 * b * 4 and changed.value <= 1
            assert 0 <= rows[f"spec.copyspec.{model}.relaxed.b{b}.other"].value <= 1
        for how in ("greedy", "t1", "relaxed"):
            for b in (1, 2):
                row = rows[f"spec.copyspec.{model}.{how}.b{b}"]
                assert row.baseline == "plain" and row.unit == "tokens/s" and row.ratio and row.reps
                # Two kinds that are asked: one prompt of each alone, or one batch of two.
                assert row.shape == {"prompts": 2 * b, "rows": b} and len(row.reps) == 2
                assert {f"{row.id}.{kind}" for kind in KINDS} <= rows.keys()


@pytest.mark.parametrize(("model", "step", "limit"), [("attention", 0.002, 60), ("hybrid", 0.006, 90)])
def test_a_room_takes_little_time_on_a_gpu(model: str, step: float, limit: float) -> None:
    """With guesses a round costs more and gives more; here it is taken for as dear as without."""
    there = {kind: len(prompt_texts(kind)) for kind in KINDS}
    answers = sum(ALONE[model].values())
    for rows, passes in PASSES[model].items():
        if rows > 1:  # once more, not timed, to capture
            answers += (1 + passes) * sum(n >= rows for n in there.values())
    assert answers * NEW_TOKENS * 2 * len(HOW) * step <= limit


@pytest.mark.parametrize(("most", "rows"), [(0, {1, 8, 32}), (8, {1, 8}), (1, {1})])
def test_the_hybrid_can_do_with_fewer_rows(most: int, rows: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    some: dict[str, list[list[int]]] = {kind: [[1, 2]] * 32 for kind in KINDS}
    model = tiny()
    monkeypatch.setattr(drafting, "_targets", lambda bench: ((name, model, some) for name in ("attention", "hybrid")))
    monkeypatch.setattr(drafting, "_race", lambda ours, plain, chosen, *_: chosen)
    monkeypatch.setattr(drafting, "_prove", lambda *_: None)
    measured: list[tuple[str, int]] = []
    monkeypatch.setattr(drafting, "_record", lambda bench, id, pairs: measured.append((id, len(pairs))))
    run_drafter(Bench("decode.copyspec", hybrid="some", hybrid_rows=most), lambda _: CopySpec())
    counts = {1: (32, 16), 8: (3, 3), 32: (3, 3)}
    expected = {(f"attention.{how}.b{b}", counts[b][0]) for how in HOW for b in (1, 8, 32)}
    expected |= {(f"hybrid.{how}.b{b}", counts[b][1]) for how in HOW for b in rows}
    assert set(measured) == expected and len(measured) == len(expected)


def tiny(d_model: int = 8) -> Stack:
    layer = {"mixer": "attention", "n_heads": 1, "n_kv_heads": 1, "head_dim": 8}
    return Stack(ModelConfig(16, d_model, 8, (layer,) * 3)).requires_grad_(False)


def made(room: str, bench: Bench, model: Stack, monkeypatch: pytest.MonkeyPatch) -> Drafter:
    """The drafter that a room would measure on `model`."""
    module = importlib.import_module(f"subquad.bench.decode.{room}")
    drafters: list[Drafter] = []
    monkeypatch.setattr(module, "run_drafter", lambda _, drafter: drafters.append(drafter(model)))
    module.run(bench)
    return drafters[0]


def test_a_trained_head_takes_the_place_of_an_untrained_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    head = untrained(HeadConfig.like(model.config, 4, kept=2), [3, 5], seed=9)
    save_head(head, tmp_path / "head")
    drafter = made("draft_head", Bench("decode.draft_head", drafter=tmp_path / "head"), model, monkeypatch)
    assert isinstance(drafter, DraftHead) and isinstance(drafter.head, Head)
    assert drafter.head.config == head.config and torch.equal(drafter.head.join.weight, head.join.weight)
    # In little, and without one, as ever.
    for bench in (Bench("decode.draft_head", drafter=tmp_path / "head", smoke=True), Bench("decode.draft_head")):
        drafter = made("draft_head", bench, model, monkeypatch)
        assert isinstance(drafter, DraftHead) and drafter.head == 256
    with pytest.raises(CheckpointError, match=r"config\.json"):
        made("draft_head", Bench("decode.draft_head", drafter=tmp_path), model, monkeypatch)


@pytest.mark.parametrize("room", ["draft_model", "self_draft", "spectr"])
@pytest.mark.parametrize("vocab", [None, [1, 2, 3, 5]])
def test_a_trained_model_guesses_with_its_vocabulary(
    room: str, vocab: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, small = tiny(), tiny(16)
    words = Tokenizer(WordLevel({str(i): i for i in range(16)}, unk_token="0"))
    save_pretrained(small, tmp_path / "small", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    if vocab:
        (tmp_path / "small/vocab.json").write_text(json.dumps(vocab))
    drafter = made(room, Bench(f"decode.{room}", drafter=tmp_path / "small"), model, monkeypatch)
    assert isinstance(drafter, ModelDrafter) and drafter.vocab == vocab
    torch.testing.assert_close(drafter.model.state_dict(), small.state_dict(), rtol=0, atol=0)
    drafter.open(model, 2, 8)
    untold = made(room, Bench(f"decode.{room}"), model, monkeypatch)
    assert isinstance(untold, ModelDrafter) and untold.vocab is None
    assert untold.layers == 1 if isinstance(untold, SelfDraft) else untold.model is model


def test_what_is_no_model_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    save_head(untrained(HeadConfig.like(model.config, 4)), tmp_path / "head")
    for folder, got in ((tmp_path / "head", "got a draft head"), (tmp_path / "nothing", "got none")):
        with pytest.raises(ConfigError, match=f"expected the folder of a model, {got}"):
            made("draft_model", Bench("decode.draft_model", drafter=folder), model, monkeypatch)


def test_the_command_tells_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def run_room(room: str, **settings: Any) -> None:
        told.update(settings)
        raise ConfigError("enough")

    monkeypatch.setattr(rooms, "run_room", run_room)
    options = ["--drafter", str(tmp_path / "head"), "--hybrid", "h", "--hybrid-rows", "8"]
    assert cli.main(["bench", "decode/draft_head", "--device", "cpu", *options]) == 2
    assert (told["drafter"], told["hybrid"], told["hybrid_rows"]) == (tmp_path / "head", "h", 8)
