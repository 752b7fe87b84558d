"""OpenAI's rate-limit headers.

`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`: whole numbers, never negative (openai/openai-dotnet #838),
and durations as in `12ms`, `1s`, `6m0s`. Rounded up, so that who waits for it does not come too early.
"""

from __future__ import annotations

import math

from service.limits.states import RateState, TokenState


def rate_limit_headers(requests: RateState | None, tokens: TokenState | None) -> list[tuple[str, str]]:
    """The headers for what is known, names in lower case."""
    found: list[tuple[str, str]] = []
    for name, state in (("requests", requests), ("tokens", tokens)):
        if state is not None:
            found.append((f"x-ratelimit-limit-{name}", str(state.limit)))
            found.append((f"x-ratelimit-remaining-{name}", str(max(0, state.remaining))))
            found.append((f"x-ratelimit-reset-{name}", duration(state.reset_after)))
    return found


def duration(seconds: float) -> str:
    """`12ms` below a second, then whole seconds as `1s`, `1m2s`, `6h0m0s`; `0s` for nothing and less."""
    millis = math.ceil(max(0.0, seconds) * 1000)
    if 0 < millis < 1000:  # noqa: PLR2004 - milliseconds of a second
        return f"{millis}ms"
    hours, rest = divmod(math.ceil(millis / 1000), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{left}s"
    return f"{minutes}m{left}s" if minutes else f"{left}s"
