"""Requests in a minute and in a second, by slowapi's limiter.

slowapi reads `RATELIMIT_*` from the environment and a `.env` file from the working directory by itself, and its
middlewares and decorators fail open in several ways (laurentS/slowapi #249, #260). So every option is given here,
nothing is read, and only the public `limiter` is used: the strategy over our storage.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from limits import RateLimitItem, parse
from limits.strategies import RateLimiter
from slowapi import Limiter

from service.limits.states import RateState
from service.limits.windows import MAX_KEYS, SCHEME, MonotonicWindows
from service.settings import PlanSettings

T = TypeVar("T")

NO_SETTINGS = "slowapi.env"
"""Beside this file, and empty. slowapi must be given one, or it reads `.env`; making one would need a disk that can be
written."""

KNOWN_LIMITS = 1024
"""Different pairs of limits whose parsed form is kept."""


def parse_limits(per_minute: int, burst: int) -> tuple[RateLimitItem, RateLimitItem]:
    """A plan's numbers in the library's form: for a minute, and for a second."""
    return parse(f"{per_minute} per 1 minute"), parse(f"{min(burst, per_minute)} per 1 second")


class _ClosedLimiter(Limiter):
    """slowapi's limiter as its arguments say, whatever stands in the environment."""

    def get_app_config(self, key: str, default_value: T = None) -> T:  # type: ignore[assignment]  # noqa: ARG002
        return default_value


def build_limiter(clock: Callable[[], float], max_keys: int) -> RateLimiter:
    """slowapi's strategy over windows of ours."""
    options = {"clock": clock, "max_keys": max_keys}
    return _ClosedLimiter(
        key_func=_never,
        default_limits=[],
        application_limits=[],
        headers_enabled=False,
        strategy="moving-window",
        storage_uri=f"{SCHEME}://",
        storage_options=options,  # type: ignore[arg-type]  # handed to our storage as it is
        auto_check=False,
        swallow_errors=False,
        in_memory_fallback=[],
        in_memory_fallback_enabled=False,
        retry_after="delta-seconds",
        key_prefix="mlxd",
        enabled=True,
        config_filename=str(Path(__file__).with_name(NO_SETTINGS)),
        key_style="endpoint",
    ).limiter


def _never() -> str:
    raise AssertionError("keys are given with each hit")


class RequestRate:
    """Counts requests of principals, exactly, on monotonic time. Any thread.

    A refused request is not counted. `clock` is in seconds and never goes back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_keys: int = MAX_KEYS) -> None:
        self._clock = clock
        self._limiter = build_limiter(clock, max_keys)
        assert isinstance(self._limiter.storage, MonotonicWindows)
        self._windows = self._limiter.storage
        self._limits = lru_cache(KNOWN_LIMITS)(parse_limits)

    def hit(self, principal_id: str, plan: PlanSettings) -> RateState:
        """Count one request, unless that is more than the plan allows. The id must not be empty."""
        if not principal_id:
            raise ValueError("a request without a principal")
        minute, second = self._limits(plan.requests_per_minute, plan.request_burst)
        if not self._limiter.hit(second, principal_id):
            return self._refused(principal_id, minute, second)
        if not self._limiter.hit(minute, principal_id):
            self._windows.take_back(second.key_for(principal_id))
            return self._refused(principal_id, minute, second)
        remaining = self._limiter.get_window_stats(minute, principal_id).remaining
        return RateState(
            allowed=True,
            limit=minute.amount,
            remaining=max(0, remaining),
            reset_after=float(minute.get_expiry()),  # this very request is the last to leave the window
        )

    def refusal(self, principal_id: str, plan: PlanSettings) -> RateState | None:
        """The refusal that a request would get now, or None; counts nothing. ValueError for an empty id."""
        if not principal_id:
            raise ValueError("a request without a principal")
        minute, second = self._limits(plan.requests_per_minute, plan.request_burst)
        if self._limiter.test(minute, principal_id) and self._limiter.test(second, principal_id):
            return None
        return self._refused(principal_id, minute, second)

    def _refused(self, principal_id: str, minute: RateLimitItem, second: RateLimitItem) -> RateState:
        """When the oldest request of each full window leaves it, and when the newest of the minute does."""
        now = self._clock()
        waits = [0.0]
        for limit in (minute, second):
            stats = self._limiter.get_window_stats(limit, principal_id)
            if stats.remaining <= 0:
                waits.append(stats.reset_time - now)
        newest = self._windows.newest(minute.key_for(principal_id))
        return RateState(
            allowed=False,
            limit=minute.amount,
            remaining=0,
            reset_after=0.0 if newest is None else max(0.0, newest + minute.get_expiry() - now),
            retry_after=max(waits),
        )
