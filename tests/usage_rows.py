"""Rows of usage for tests."""

from typing import Any

from service.storage.usage import UsageRow

NOON = 1_800_014_400.0
"""2027-01-15 12:00 UTC."""


def row(number: int = 0, **fields: Any) -> UsageRow:
    """One of 10 prompt tokens (4 of them cached) and 5 of output, unless `fields` say otherwise."""
    values: dict[str, Any] = {
        "id": f"id{number:08}",
        "at": NOON,
        "request_id": f"request-{number}",
        "principal": "key:k1",
        "tenant": "acme",
        "key_id": "k1",
        "model": "org/model",
        "endpoint": "/v1/chat/completions",
        "stream": True,
        "rows": 1,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "queue_seconds": 0.25,
        "time_to_first_token": 0.5,
        "duration_seconds": 1.5,
        "finish_reason": "stop",
    }
    return UsageRow(**{**values, **fields})
