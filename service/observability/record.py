"""What one inference request was: the value that its log line, metrics, spans and row of usage are made from.

Built once, by `inference`, when the request is over, however it ended. Holds no text and no credential.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

CANCELLED = "cancelled"
"""How a row ended whose reader left first."""

_RANK = MappingProxyType({CANCELLED: 1, "length": 2, "stop": 3})
"""Errors come before these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRecord:
    """One of the request's generations. Times as in `RequestRecord`; tokens as in the engine's `Meter`.

    `finish_reason` is `stop`, `length`, `cancelled`, or an error's code.
    """

    prefill_at: float | None
    first_token_at: float | None
    ended_at: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    max_tokens: int
    finish_reason: str

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the end; None where there was none."""
        return None if self.first_token_at is None else self.ended_at - self.first_token_at

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between two tokens, after the first; None of a row that has less than two."""
        seconds = self.decode_seconds
        return seconds / (self.completion_tokens - 1) if seconds is not None and self.completion_tokens > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request that reached the engine's queue. Times are seconds of the engine's monotonic clock, None for what
    has not happened.

    `began_at`: the route handed it over; `encoded_at`: its prompts were tokens; `submitted_at`: it was queued.
    There is at least one row. `model` is the served model's own name, `asked_model` the one of its names that was asked
    for, if any.
    """

    request_id: str
    principal: str
    tenant: str
    key_id: str | None
    model: str
    endpoint: str
    stream: bool
    began_at: float
    encoded_at: float
    submitted_at: float
    ended_at: float
    rows: tuple[RowRecord, ...]
    asked_model: str | None = None

    @property
    def finish_reason(self) -> str:
        """How the request ended: as the worst of its rows did."""
        return min((row.finish_reason for row in self.rows), key=lambda reason: _RANK.get(reason, 0))

    @property
    def prompt_tokens(self) -> int:
        return sum(row.prompt_tokens for row in self.rows)

    @property
    def cached_tokens(self) -> int:
        return sum(row.cached_tokens for row in self.rows)

    @property
    def completion_tokens(self) -> int:
        return sum(row.completion_tokens for row in self.rows)

    @property
    def prefill_at(self) -> float | None:
        """When the first row's prefill began."""
        return min((row.prefill_at for row in self.rows if row.prefill_at is not None), default=None)

    @property
    def first_token_at(self) -> float | None:
        """When the first token of any row was there."""
        return min((row.first_token_at for row in self.rows if row.first_token_at is not None), default=None)

    @property
    def queue_seconds(self) -> float | None:
        return None if self.prefill_at is None else self.prefill_at - self.submitted_at

    @property
    def prefill_seconds(self) -> float | None:
        """From the beginning of the first prefill to the first token."""
        if self.prefill_at is None or self.first_token_at is None:
            return None
        return self.first_token_at - self.prefill_at

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between two tokens of a row, after its first; None where no row has two."""
        spans = [
            (row.decode_seconds, row.completion_tokens - 1)
            for row in self.rows
            if row.decode_seconds is not None and row.completion_tokens > 1
        ]
        return sum(seconds for seconds, _ in spans) / sum(count for _, count in spans) if spans else None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the queue to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.submitted_at
