"""A request in the words of OpenTelemetry's GenAI conventions: the attributes that spans and metrics share.

The names are written out: the package that has them as constants marks each one as moved elsewhere.
"""

from __future__ import annotations

from types import MappingProxyType

from service.observability.record import RequestRecord

Attributes = dict[str, str | int | bool | tuple[str, ...]]

PROVIDER = "mlxd"

_OPERATIONS = MappingProxyType({"/v1/chat/completions": "chat"})
_NORMAL_ENDS = frozenset({"stop", "length"})


def operation(endpoint: str) -> str:
    """`gen_ai.operation.name` of a route."""
    return _OPERATIONS.get(endpoint, "text_completion")


def error_type(record: RequestRecord) -> str | None:
    """`error.type`: `cancelled` or an error's code; None of a request that ended normally."""
    reason = record.finish_reason
    return None if reason in _NORMAL_ENDS else reason


def bounded(record: RequestRecord) -> Attributes:
    """What few values are possible of, so that it may tell metrics apart."""
    found: Attributes = {
        "gen_ai.operation.name": operation(record.endpoint),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.response.model": record.model,
    }
    if record.asked_model is not None:
        found["gen_ai.request.model"] = record.asked_model
    return found


def details(record: RequestRecord) -> Attributes:
    """What else is known of one request."""
    return {
        "gen_ai.request.choice.count": len(record.rows),
        "gen_ai.request.max_tokens": record.rows[0].max_tokens,
        "gen_ai.request.stream": record.stream,
        "gen_ai.response.finish_reasons": tuple(row.finish_reason for row in record.rows),
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
    }
