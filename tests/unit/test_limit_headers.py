"""OpenAI's rate-limit headers, and durations that clients can read back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from service.limits.headers import duration, rate_limit_headers
from service.limits.states import RateState, TokenState

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def seconds(text: str) -> float:
    """A client's reading of a duration."""
    assert re.fullmatch(r"(?:\d+h)?(?:\d+m)?(?:\d+s)?|\d+ms", text)
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|h|m|s)", text))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (0.0, "0s"),
        (-5.0, "0s"),
        (0.0001, "1ms"),
        (0.012, "12ms"),
        (0.999, "999ms"),
        (0.9991, "1s"),
        (1.0, "1s"),
        (1.001, "2s"),
        (59.0, "59s"),
        (59.5, "1m0s"),
        (60.0, "1m0s"),
        (62.0, "1m2s"),
        (360.0, "6m0s"),
        (3599.9, "1h0m0s"),
        (21600.0, "6h0m0s"),
        (90061.0, "25h1m1s"),
    ],
)
def test_durations_are_spelled_as_openai_spells_them(given: float, text: str) -> None:
    assert duration(given) == text


@given(st.floats(min_value=-1e6, max_value=1e6))
def test_a_duration_is_never_short_and_at_most_a_second_long(given: float) -> None:
    read = seconds(duration(given))
    wanted = max(0.0, given)
    assert wanted - 1e-9 <= read <= wanted + (0.001 if wanted <= 0.998 else 1.001)


def test_the_headers_of_both_limits() -> None:
    requests = RateState(allowed=True, limit=60, remaining=59, reset_after=60.0)
    tokens = TokenState(limit=150_000, remaining=149_984, reset_after=0.0064)
    assert rate_limit_headers(requests, tokens) == [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-reset-requests", "1m0s"),
        ("x-ratelimit-limit-tokens", "150000"),
        ("x-ratelimit-remaining-tokens", "149984"),
        ("x-ratelimit-reset-tokens", "7ms"),
    ]
    assert len(rate_limit_headers(requests, None)) == 3
    assert len(rate_limit_headers(None, tokens)) == 3
    assert rate_limit_headers(None, None) == []


@given(st.integers(-(10**9), 10**9), st.floats(-100, 1e5))
def test_nothing_negative_is_ever_sent(remaining: int, reset: float) -> None:
    sent = rate_limit_headers(
        RateState(allowed=False, limit=1, remaining=remaining, reset_after=reset),
        TokenState(limit=1, remaining=remaining, reset_after=reset),
    )
    assert not any("-" in value for _, value in sent)
    assert all(int(value) >= 0 for name, value in sent if "reset" not in name)
    assert all(seconds(value) >= 0 for name, value in sent if "reset" in name)
