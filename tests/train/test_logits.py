"""The teacher's top k on disk: what is read is what was said, of the stream that it was said about and no other."""

import json
import math

import pytest
import torch

from subquad.core.errors import CheckpointError, ConfigError, DataError
from subquad.core.layout import Layout
from subquad.data import Source, TokenStream
from subquad.models.config import ModelConfig
from subquad.models.stack import Stack
from subquad.train import logits, losses
from subquad.train.logits import LogitCache, LogitWriter, Origin, fill, top_k
from subquad.train.stages import Machine, Work, make_stage

FULL = {"mixer": "attention", "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "rotary": {"theta": 1e4, "dim": 8}}
TIME, BATCH, K = 12, 2, 5


class Bytes:
    eos_token_id = 0
    chat_template = None

    def __init__(self, last=61):
        self.last = last

    def __call__(self, text, *, add_special_tokens, verbose):
        return {"input_ids": [[c % self.last + 1 for c in t.encode()] for t in text]}

    def get_vocab(self):
        return {chr(i): i for i in range(64)}


def stream(batch=BATCH, time=TIME, seed=0, name="m", last=61, fraction=0.05):
    texts = [f"document {i} says " + " ".join(str(i * j % 97) for j in range(30)) for i in range(60)]
    source = Source(name, lambda: iter(texts))
    return TokenStream([source], Bytes(last), batch=batch, time=time, seed=seed, fraction=fraction)


def make_teacher():
    torch.manual_seed(0)
    model = Stack(ModelConfig(vocab_size=64, d_model=16, d_mlp=32, layers=(FULL, FULL)))
    torch.nn.init.normal_(model.lm_head.weight)
    return model


@pytest.fixture
def teacher():
    return make_teacher()


def origin(source, k=K, teacher=None):
    return Origin.of("a teacher", teacher or make_teacher(), k, source)


def log_p(teacher, tokens_bt):
    with torch.no_grad():
        return teacher(tokens_bt).double().log_softmax(-1)


@pytest.mark.parametrize("at_once", [1, 64 * 7, 10**6])
def test_top_k(at_once, monkeypatch):
    monkeypatch.setattr(logits, "LOGITS_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*s, dtype=torch.float64, generator=rng) for s in ((2, 5, 6), (64, 6)))
    p = (h @ w.T).softmax(-1)
    top = top_k(h, w, 7)
    want, ids = p.sort(-1, descending=True)
    assert torch.equal(top.ids_btk, ids[..., :7])
    torch.testing.assert_close(top.log_p_btk.exp(), want[..., :7], rtol=1e-12, atol=0)
    torch.testing.assert_close(top.log_tail_bt.exp(), want[..., 7:].sum(-1), rtol=1e-12, atol=0)
    assert (top_k(h, w, 64).log_tail_bt == -torch.inf).all()
    for k in (0, 65):
        with pytest.raises(ConfigError, match=f"k={k}: expected 1 to the vocabulary's 64"):
            top_k(h, w, k)


def test_what_is_read_is_what_was_said(teacher, tmp_path):
    source = stream()
    cache = fill(tmp_path, teacher, source, origin(source), 10 * BATCH * TIME, shard_tokens=3 * BATCH * TIME)
    assert cache.tokens == 10 * BATCH * TIME
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    cache.verify()
    again = stream(batch=5)
    for _ in range(4):
        tokens = next(again).tokens_bt
        top, p = cache.of(tokens), log_p(teacher, tokens)
        want, ids = p.topk(K)
        assert torch.equal(top.ids_btk.long(), ids)
        # Half of float16's spacing, and float32's own error in what was rounded.
        assert ((top.log_p_btk.double() - want).abs() <= 2**-11 * want.abs() + 1e-6).all()
        tail = p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        assert ((top.log_tail_bt.double() - tail).abs() <= 2**-11 * tail.abs() + 1e-6).all()
    with pytest.raises(DataError, match=r"with seed 0, the first 240 tokens of it, got another"):
        cache.of(next(again).tokens_bt)


def test_storage_changes_the_teacher_by_no_more_than_derived(teacher, tmp_path):
    source = stream()
    cache = fill(tmp_path, teacher, source, origin(source), 20 * BATCH * TIME)
    tokens = torch.cat([next(again).tokens_bt for again in [stream()] for _ in range(20)])
    top, p = cache.of(tokens), log_p(teacher, tokens)
    ids = top.ids_btk.long()
    exact = torch.cat((p.gather(-1, ids), p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)), -1)
    stored = torch.cat((top.log_p_btk, top.log_tail_bt[..., None]), -1).double().log_softmax(-1)
    away = (exact.exp() * (exact - stored)).sum(-1)
    bound = 0.5 * 2**-22 * (exact.exp() * exact.square()).sum(-1)
    # Third order and float32's error in the logits, both far below.
    assert (away <= 1.01 * bound + 1e-12).all()
    assert away.max() > 1e-9


@pytest.mark.parametrize("ends", [3, 5])
def test_a_killed_writer_goes_on_from_its_last_shard(ends, teacher, tmp_path):
    class KilledError(Exception):
        pass

    def kill(tokens):
        if tokens == ends * BATCH * TIME:
            raise KilledError

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    sizes = {"tokens": 7 * BATCH * TIME, "shard_tokens": 2 * BATCH * TIME}
    for folder in (whole, broken):
        source = stream()
        try:
            fill(folder, teacher, source, origin(source), display=kill if folder == broken else None, **sizes)
        except KilledError:
            assert len(list(broken.glob("*.safetensors"))) == ends // 2
            source = stream()
            fill(broken, teacher, source, origin(source), **sizes)
    a, b = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (whole, broken))
    assert a == b


def test_a_cache_serves_only_its_origin(teacher, tmp_path):
    source = stream()
    first = origin(source)
    fill(tmp_path, teacher, source, first, BATCH * TIME)
    LogitCache(tmp_path).origin.check(Origin(**(vars(first) | {"teacher": "another name"})), tmp_path)
    other = make_teacher()
    with torch.no_grad():
        other.blocks[1].mixer.qkv.k_proj.weight[3, 2] += 1e-3
    for another, message in (
        (origin(stream(seed=3)), "expected seed 0 as cached, got 3"),
        (origin(stream(time=10)), "expected time 12 as cached, got 10"),
        (origin(stream(name="n")), r"expected sources \('m',\) as cached, got \('n',\)"),
        (origin(source, k=6), "expected k 5 as cached, got 6"),
        (origin(stream(fraction=0.1)), "expected held_out 0.05 as cached, got 0.1"),
        # The same vocabulary, cut otherwise.
        (origin(stream(last=60)), "expected tokenizer [0-9a-f]+ as cached, got [0-9a-f]+"),
        (origin(stream(), teacher=other), r"expected teacher a teacher \([0-9a-f]{12}\) as cached, got a teacher \("),
    ):
        with pytest.raises(DataError, match=message):
            LogitWriter(tmp_path, another)
        with pytest.raises(DataError, match=message):
            LogitCache(tmp_path).origin.check(another, tmp_path)
    for wrong in (next(stream(seed=3)), next(stream(time=10))):
        with pytest.raises(DataError, match="give the same data, seed and sequence length"):
            LogitCache(tmp_path).of(wrong.tokens_bt)


def test_damage_is_seen(teacher, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a cache of logits, got no manifest.json"):
        LogitCache(tmp_path)
    source = stream()
    fill(tmp_path, teacher, source, origin(source), BATCH * TIME)
    shard, manifest = tmp_path / "000000.safetensors", tmp_path / "manifest.json"
    content, text = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(CheckpointError, match="expected checksum"):
        LogitCache(tmp_path).verify()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"expected {len(content)} bytes, got {len(content) - 1}"):
        LogitCache(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"expected {len(content)} bytes, got 0"):
        LogitCache(tmp_path)
    manifest.write_text(json.dumps(json.loads(text) | {"schema": 9}))
    with pytest.raises(CheckpointError, match="expected schema 2, got 9"):
        LogitCache(tmp_path)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        LogitCache(tmp_path)


def test_bytes_a_token_and_large_vocabularies(teacher, tmp_path):
    rows, time = 40, 100
    tokens = torch.randint(64, (rows, time), generator=torch.Generator().manual_seed(0))
    top = top_k(torch.randn(rows, time, 6), torch.randn(70_000, 6), K)
    for vocabulary, each in ((2**16, 2), (70_000, 4)):
        folder = tmp_path / str(vocabulary)
        writer = LogitWriter(folder, Origin("t", "w", "h", vocabulary, K, ("m",), 0, time, 0.05))
        ids = top.ids_btk.clamp(max=vocabulary - 1)
        writer.add(tokens, logits.TopK(ids, top.log_p_btk, top.log_tail_bt), {})
        writer.flush()
        cache = LogitCache(folder)
        assert torch.equal(cache.of(tokens).ids_btk.long(), ids)
        size = (folder / "000000.safetensors").stat().st_size
        # A key a sequence and the header beside k ids, k log-probabilities and the tail.
        assert math.isclose(size, rows * time * ((each + 2) * K + 2) + rows * 8, abs_tol=512)


def test_the_whole_vocabulary_is_the_kl_and_less_of_it_is_less(teacher):
    tokens = next(stream()).tokens_bt
    layout, wanted = Layout.dense(BATCH, TIME), torch.rand(BATCH, TIME) < 0.8
    with torch.no_grad():
        target = teacher.double().hidden(tokens)
    rng = torch.Generator().manual_seed(1)
    head = torch.randn(64, 16, dtype=torch.float64, generator=rng).requires_grad_()
    hidden = torch.randn(BATCH, TIME, 16, dtype=torch.float64, generator=rng).requires_grad_()
    teacher_head = teacher.lm_head.weight.detach()
    want = losses.token_kl(hidden, head, target, teacher_head, layout, wanted)
    found = {}
    for k in (1, 8, 32, 64):
        found[k] = losses.token_kl_top(hidden, head, top_k(target, teacher_head, k), layout, wanted)
    torch.testing.assert_close(found[64], want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(found[64], (hidden, head)), torch.autograd.grad(want, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert 0 < found[1] < found[8] < found[32] < found[64]


CUT = FULL | {"window": 3}


def cached_work(teacher, source, **machine):
    student = Stack(ModelConfig(vocab_size=64, d_model=16, d_mlp=32, layers=(CUT, FULL)))
    student.load_state_dict(teacher.state_dict())
    return Work(teacher, teacher, student, (0,), source, machine=Machine(**machine))


def trained(stage, steps):
    """Figures of a few steps of plain descent, and the weights behind them."""
    figures = []
    for _ in range(steps):
        figures.append({name: float(x) for name, x in stage.step().items()})
        with torch.no_grad():
            for p in (*stage.new, *stage.old):
                p -= 0.1 * p.grad
                p.grad = None
    return figures, {name: x.clone() for name, x in stage.weights().items()}


@pytest.mark.parametrize("rows", [None, 1])
def test_the_stage_with_the_whole_vocabulary_is_distill(rows, teacher, tmp_path):
    source = stream()
    fill(tmp_path, teacher, source, origin(source, 64), 4 * BATCH * TIME)
    live = make_stage("distill", cached_work(teacher, stream()), {"labels": 0.5})
    options = {"cache": str(tmp_path), "labels": 0.5}
    cached = make_stage("distill_cached", cached_work(teacher, stream(), rows=rows), options)
    (want, theirs), (got, ours) = trained(live, 4), trained(cached, 4)
    for a, b in zip(got, want, strict=True):
        assert a["kl"] > 1e-3
        # Storage moves log p by 2^-11 of itself, here up to 10, and the KL by that times the spread of log p - log q.
        assert a == {name: pytest.approx(x, rel=5e-3) for name, x in b.items()}
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-3, atol=1e-3)
    with pytest.raises(DataError, match="the first 96 tokens of it"):
        cached.step()


def test_the_stage_goes_on_where_it_stood(teacher, tmp_path):
    source = stream()
    fill(tmp_path, teacher, source, origin(source), 4 * BATCH * TIME)
    stages = [make_stage("distill_cached", cached_work(teacher, stream()), {"cache": str(tmp_path)}) for _ in range(2)]
    trained(stages[0], 2)
    weights = {name: x.clone() for name, x in stages[0].weights().items()}
    state = stages[0].state_dict()
    want = trained(stages[0], 2)
    stages[1].load_weights(weights)
    stages[1].load_state_dict(state)
    got = trained(stages[1], 2)
    assert got[0] == want[0]
    assert all(torch.equal(got[1][name], x) for name, x in want[1].items())


def test_the_stage_refuses_what_it_was_not_cached_for(teacher, tmp_path):
    with pytest.raises(ConfigError, match="expected a cache and labels >= 0"):
        make_stage("distill_cached", cached_work(teacher, stream()), {})
    source = stream()
    fill(tmp_path, teacher, source, origin(source), BATCH * TIME)
    with pytest.raises(DataError, match="expected seed 0 as cached, got 1"):
        make_stage("distill_cached", cached_work(teacher, stream(seed=1)), {"cache": str(tmp_path)})
    with pytest.raises(DataError, match="expected tokenizer"):
        make_stage("distill_cached", cached_work(teacher, stream(last=60)), {"cache": str(tmp_path)})
    other = make_teacher()
    torch.nn.init.normal_(other.lm_head.weight)
    with pytest.raises(DataError, match=r"expected teacher a teacher \(.*\) as cached, got the teacher \("):
        make_stage("distill_cached", cached_work(other, stream()), {"cache": str(tmp_path)})
    wide = tmp_path / "wide"
    fill(wide, teacher, stream(), Origin(**(vars(origin(source)) | {"vocabulary": 99})), BATCH * TIME)
    with pytest.raises(DataError, match="expected a vocabulary of at most 64, got 99"):
        make_stage("distill_cached", cached_work(teacher, stream()), {"cache": str(wide)})
