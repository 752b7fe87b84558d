"""OpenAI's wire: what requests may say, and the exact form of what is answered.

Strict where a slip would be silent (a boolean is not a number, "3" is not 3), lenient where clients differ:
any optional field may be null, an integer will do for a float, unknown fields are ignored. What is known but
not supported is a field here so that `unsupported.py` can refuse it by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.functional_validators import AfterValidator
from typing_extensions import TypedDict

from service.engine.generation import SamplingParams

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_STOPS = 4
MAX_BIASES = 300
MAX_ID_DIGITS = 9
MAX_TOP_K = 2**20
"""Above every vocabulary; a larger value would mean the same."""

StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)]


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_ID_DIGITS):
            raise ValueError("The keys must be token ids.")
    return bias


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASES),
    AfterValidator(_token_ids),
]


class SamplingFields(BaseModel):
    """How to draw tokens and when to stop: the same words on every route. The default temperature is 1."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    def sampling(self) -> SamplingParams:
        """The engine's parameters; what is absent or null keeps its default."""
        named = {name: value for name in SAMPLING_NAMES if (value := getattr(self, name)) is not None}
        bias = tuple(sorted((int(key), float(value)) for key, value in (self.logit_bias or {}).items()))
        return SamplingParams(**named, logit_bias=bias)

    def stops(self) -> tuple[str, ...]:
        match self.stop:
            case None:
                return ()
            case str(one):
                return (one,)
            case several:
                return tuple(several)


SAMPLING_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class OpenAIRequest(SamplingFields):
    """What the two OpenAI routes share."""

    model: Annotated[str, StringConstraints(max_length=512)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


class ContentPart(BaseModel):
    """A part of a message. Only text is understood; the other fields are here to be refused."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Annotated[str, StringConstraints(max_length=64)]
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    url: Any = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=128, fail_fast=True)]
)


class CompletionRequest(OpenAIRequest):
    prompt: Prompt
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class WireUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChatMessage(TypedDict):
    role: str
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: str | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: WireUsage


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: None
    finish_reason: str | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: WireUsage


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    error: ErrorDetail
