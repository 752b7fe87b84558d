"""What is asked for but cannot be done: a 400 that names the parameter. Nothing is silently ignored."""

from __future__ import annotations

from collections.abc import Iterable

from service.api.openai.schemas import ChatRequest, CompletionRequest, OpenAIRequest
from service.errors import InvalidRequest
from service.settings import EngineSettings


def unsupported(param: str, message: str | None = None) -> InvalidRequest:
    """The error for a parameter that is understood but cannot be honoured."""
    return InvalidRequest(
        message or f"This service does not support {param} (yet).", param=param, code="unsupported_parameter"
    )


def check_chat(body: ChatRequest, limits: EngineSettings) -> None:
    """Raise InvalidRequest for the first parameter of a chat request that cannot be honoured."""
    _refuse_first(
        (
            ("tools", bool(body.tools)),
            ("tool_choice", body.tool_choice not in (None, "none", "auto")),
            ("functions", bool(body.functions)),
            ("function_call", body.function_call not in (None, "none", "auto")),
            ("response_format", body.response_format is not None and body.response_format.get("type") != "text"),
            ("logprobs", bool(body.logprobs)),
            ("top_logprobs", bool(body.top_logprobs)),
            ("modalities", any(kind != "text" for kind in body.modalities or ())),
            ("audio", body.audio is not None),
            ("web_search_options", body.web_search_options is not None),
        )
    )
    _check_amounts(body, limits)
    check_max_tokens(body.max_completion_tokens, limits, param="max_completion_tokens")


def check_completion(body: CompletionRequest, limits: EngineSettings) -> None:
    """Raise InvalidRequest for the first parameter of a completion request that cannot be honoured."""
    _refuse_first(
        (
            ("echo", bool(body.echo)),
            ("suffix", bool(body.suffix)),
            ("best_of", body.best_of not in (None, 1)),
            ("logprobs", body.logprobs is not None and body.logprobs is not False),
        )
    )
    _check_amounts(body, limits)


def check_max_tokens(value: int | None, limits: EngineSettings, *, param: str = "max_tokens") -> None:
    """Raise InvalidRequest for more output than this service is configured to give."""
    if value is not None and value > limits.max_output_tokens:
        raise InvalidRequest(
            f"{param} may be at most {limits.max_output_tokens} here.", param=param, code="invalid_value"
        )


def _check_amounts(body: OpenAIRequest, limits: EngineSettings) -> None:
    if body.n is not None and body.n > limits.max_choices:
        raise unsupported("n", f"n may be at most {limits.max_choices} here.")
    check_max_tokens(body.max_tokens, limits)


def _refuse_first(found: Iterable[tuple[str, bool]]) -> None:
    for param, asked in found:
        if asked:
            raise unsupported(param)
