import json
from types import SimpleNamespace

import pytest
import torch

from subquad.evals.tasks import evaluate_task, load_task
from subquad.models.checkpoint import save_pretrained

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")


@pytest.fixture(scope="module")
def lm(tmp_path_factory, make_model, tokenizer):
    from subquad.evals.lm_eval import SubquadLM

    folder = tmp_path_factory.mktemp("lm") / "model"
    save_pretrained(make_model(len(tokenizer), {}, {"window": 8}, max_positions=64), folder, tokenizer)
    return SubquadLM(str(folder), batch_size="auto", max_batch_size=None)


def asked(*args):
    return SimpleNamespace(args=args)


def logprobs(lm, tokens):
    return lm.model(torch.tensor([tokens]))[0].log_softmax(-1).detach()


def test_loglikelihood_of_continuations(lm):
    pairs = [("The sky is", " blue"), ("", "green grass"), ("The grass is green. " * 30, "The")]
    for (context, continuation), (total, greedy) in zip(
        pairs, lm.loglikelihood([asked(*p) for p in pairs]), strict=True
    ):
        whole = lm.tokenizer.encode(context + continuation, add_special_tokens=False)
        n = len(lm.tokenizer.encode(continuation, add_special_tokens=False))
        tokens = (whole if context else [lm.tokenizer.bos_token_id, *whole])[-65:]
        log_p = logprobs(lm, tokens[:-1])[-n:]
        assert total == pytest.approx(float(log_p.gather(1, torch.tensor(tokens[-n:])[:, None]).sum()), rel=1e-6)
        assert greedy == (log_p.argmax(-1).tolist() == tokens[-n:])


def test_rolling_scores_every_token_once(lm):
    text = "The man turned on the faucet, therefore water flowed. " * 12
    tokens = lm.tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > 2 * 64
    total = 0.0
    for start in range(0, len(tokens), 64):
        window = tokens[start : start + 64]
        # The first window follows the prefix token; a later one has at least the token before it, or more to fill.
        before = [lm.tokenizer.eos_token_id] if start == 0 else tokens[start - 1 + len(window) - 64 : start]
        log_p = logprobs(lm, [*before, *window[:-1]])[-len(window) :]
        total += float(log_p.gather(1, torch.tensor(window)[:, None]).sum())
    assert lm.loglikelihood_rolling([asked(text)])[0] == pytest.approx(total, rel=1e-6)


def test_generation_stops_where_it_should(lm):
    long, short = {"max_gen_toks": 12, "until": []}, {"max_gen_toks": 3, "until": []}
    full, cut = lm.generate_until([asked("The sky is", long), asked("The sky is", short)])
    assert full.startswith(cut) and len(cut) < len(full)
    stop = full[len(full) // 2]
    (stopped,) = lm.generate_until([asked("The sky is", {"max_gen_toks": 12, "until": [stop]})])
    assert stopped == full[: full.index(stop)]


def test_the_harness_counts_as_our_own_tasks_do(lm, tmp_path):
    from lm_eval import simple_evaluate

    words = ("blue", "green, therefore water", "4821", "a", "the man turned")
    items = [
        {"query": query, "choices": [words[(i + j) % 5] for j in range(3)], "gold": i % 3}
        for i, query in enumerate(("The sky is", "The grass", "What is the", "water flowed from", "0 1 2") * 4)
    ]
    (tmp_path / "sky.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {
        "task": "sky",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sky.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    theirs = simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]["sky"]
    ours = evaluate_task(lm.model, lm.tokenizer, load_task(tmp_path / "sky.jsonl"))
    assert ours.accuracy.value == pytest.approx(theirs["acc,none"])
    assert ours.accuracy_normalised.value == pytest.approx(theirs["acc_norm,none"])
    assert 0 < ours.accuracy.value < 1
