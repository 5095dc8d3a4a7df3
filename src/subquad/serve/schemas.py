"""What clients may send, as OpenAI defines it: what is not known is ignored, what is wrong is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_CHOICES = 128
MOST_INPUTS = 2048
MOST_BIASES = 1024
# Lists fail fast, at their first wrong item: a body may hold millions.
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class Body(BaseModel):
    """Of any request: types are not guessed, and numbers are finite."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def biases(asked: dict[str, Any]) -> dict[str, Any]:
    """Refuse biases at the first that is wrong, however many there are."""
    if len(asked) > MOST_BIASES:
        raise ValueError(f"expected at most {MOST_BIASES} tokens, got {len(asked)}")
    for token, bias in asked.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ValueError(f"expected token ids, got {token[:40]!r}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"expected numbers from -100 to 100, got another for token {token}")
    return asked


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = False


class Generate(Body):
    """What every continuation may be asked for."""

    model: Annotated[str, Field(max_length=512)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Any], AfterValidator(biases)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A function that was called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A tool that was called."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    """A function that may be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A function's name."""

    name: str


class ToolChoice(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: Named


class JsonSchema(Body):
    """A schema of what is wanted."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, populate_by_name=True)

    name: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Body):
    """The form of what is written."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Generate):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None


class CompletionBody(Generate):
    """Of ``/v1/completions``."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_CHOICES, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None


class EmbeddingBody(Body):
    """Of ``/v1/embeddings``."""

    model: Annotated[str, Field(max_length=512)]
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_INPUTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
