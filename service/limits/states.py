"""Where a principal stands with its limits. Values only; any thread."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import RateLimited


@dataclass(frozen=True, slots=True, kw_only=True)
class RateState:
    """After one request was counted, or refused. Times are seconds from now.

    `limit` and `remaining` are requests in a minute; `remaining` is 0 in a refusal. In `reset_after` all of `limit`
    is there again when nothing more comes; in `retry_after` (0 when allowed) one more request would be allowed.
    """

    allowed: bool
    limit: int
    remaining: int
    reset_after: float
    retry_after: float = 0.0

    def refusal(self) -> RateLimited | None:
        """The error that a refused request gets, or None."""
        if self.allowed:
            return None
        return RateLimited(
            f"Too many requests: your plan allows {self.limit} a minute, and not all of them at once.",
            retry_after=self.retry_after,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenState:
    """A token budget. `remaining` is never negative, not even in debt; `reset_after` seconds until all is there."""

    limit: int
    remaining: int
    reset_after: float
