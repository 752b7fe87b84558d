"""Request rates: exact under races, deaf to the environment, and untouched by the wall clock."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import slowapi.extension
from hypothesis import given, strategies as st
from limits import parse
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from service.errors import RateLimited
from service.limits.request_rate import RequestRate, _never, build_limiter
from service.limits.shared import RequestLimits
from service.limits.windows import FORGOTTEN_PER_HIT, MonotonicWindows
from service.settings import PlanSettings


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def plan(per_minute: int, burst: int | None = None) -> PlanSettings:
    return PlanSettings(requests_per_minute=per_minute, request_burst=burst or per_minute)


TEN = plan(10)


def storage_of(rate: RequestRate) -> MonotonicWindows:
    storage = rate._limiter.storage
    assert isinstance(storage, MonotonicWindows)
    return storage


def test_a_minute_gives_so_many_and_says_what_is_left() -> None:
    clock = Clock()
    rate = RequestRate(clock=clock)
    states = [rate.hit("p", TEN) for _ in range(12)]
    assert [state.allowed for state in states] == [True] * 10 + [False] * 2
    assert [state.remaining for state in states] == [*range(9, -1, -1), 0, 0]
    assert {state.limit for state in states} == {10}
    assert rate.hit("q", TEN).remaining == 9


def test_the_window_moves_and_what_was_refused_does_not_count() -> None:
    clock = Clock(0.0)
    rate = RequestRate(clock=clock)
    for second in range(10):
        clock.now = float(second)
        assert rate.hit("p", TEN).allowed
    assert not any(rate.hit("p", TEN).allowed for _ in range(100))
    state = rate.hit("p", TEN)
    assert (state.allowed, state.retry_after, state.reset_after) == (False, 51.0, 60.0)
    clock.now += state.retry_after - 0.001
    assert not rate.hit("p", TEN).allowed
    clock.now += 0.001
    assert rate.hit("p", TEN).allowed
    assert rate.hit("p", TEN).retry_after == pytest.approx(1.0)


def test_a_second_gives_no_more_than_the_burst() -> None:
    clock = Clock(0.0)
    rate = RequestRate(clock=clock)
    some = plan(10, 3)
    assert [rate.hit("p", some).allowed for _ in range(4)] == [True] * 3 + [False]
    refused = rate.hit("p", some)
    assert (refused.remaining, refused.retry_after, refused.reset_after) == (0, 1.0, 60.0)
    clock.now = 1.0
    assert rate.hit("p", some).remaining == 6
    clock.now = 100.0
    assert rate.hit("p", some).remaining == 9


def test_a_burst_above_the_minute_is_the_minute() -> None:
    rate = RequestRate(clock=Clock())
    assert [rate.hit("p", plan(2, 100)).allowed for _ in range(3)] == [True, True, False]


def test_who_has_used_up_the_minute_does_not_use_up_the_second() -> None:
    clock = Clock(0.0)
    rate = RequestRate(clock=clock)
    few = plan(2, 1)
    assert rate.hit("p", few).allowed
    clock.now = 30.0
    assert rate.hit("p", few).allowed
    clock.now = 59.5
    assert not rate.hit("p", few).allowed
    clock.now = 60.0
    assert rate.hit("p", few).allowed


def test_a_refusal_becomes_an_error_that_says_when_to_come_back() -> None:
    rate = RequestRate(clock=Clock())
    allowed = rate.hit("p", plan(1))
    assert allowed.refusal() is None
    error = rate.hit("p", plan(1)).refusal()
    assert isinstance(error, RateLimited)
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_requests", 60.0)
    assert "1 a minute" in error.message


def test_a_request_without_a_principal_is_a_bug() -> None:
    with pytest.raises(ValueError, match="principal"):
        RequestRate().hit("", TEN)
    with pytest.raises(AssertionError):
        _never()


async def test_of_100_tasks_that_race_for_10_exactly_10_win() -> None:
    rate = RequestLimits(RequestRate())
    states = await asyncio.gather(*(rate.hit("p", TEN) for _ in range(100)))
    assert sum(state.allowed for state in states) == 10


def test_of_100_threads_that_race_for_10_exactly_10_win() -> None:
    rate = RequestRate(clock=Clock())
    start = threading.Barrier(100)
    allowed: list[bool] = []

    def race() -> None:
        start.wait()
        allowed.append(rate.hit("p", TEN).allowed)

    threads = [threading.Thread(target=race) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(allowed), sum(allowed)) == (100, 10)


def test_who_looked_before_and_was_overtaken_is_refused() -> None:
    rate = RequestRate(clock=Clock())
    assert rate.refusal("p", TEN) is None
    states = [rate.hit("p", TEN) for _ in range(11)]
    assert [state.allowed for state in states] == [True] * 10 + [False]
    assert states[-1].retry_after == 60.0


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 7.0, 31.0, 60.0]), max_size=60),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_no_second_and_no_minute_ever_holds_more_than_allowed_and_retry_after_is_exact(
    gaps: list[float], per_minute: int, burst: int
) -> None:
    clock = Clock(0.0)
    rate = RequestRate(clock=clock)
    given = plan(per_minute, burst)
    served: list[float] = []
    for gap in gaps:
        clock.now += gap
        state = rate.hit("p", given)
        if state.allowed:
            served.append(clock.now)
        else:
            assert 0 < state.retry_after <= 60 + 1e-9
            early = clock.now
            clock.now = early + state.retry_after + 1e-9
            assert rate.hit("p", given).allowed
            served.append(clock.now)
        assert 0 <= state.remaining < per_minute
        assert 0 <= state.reset_after <= 60 + 1e-9
    for at in served:
        assert sum(at - 60 + 1e-6 < other <= at for other in served) <= per_minute
        assert sum(at - 1 + 1e-6 < other <= at for other in served) <= min(burst, per_minute)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_no_jump_of_the_wall_clock_blocks_or_feeds_anybody(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real, wall = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + wall[0])
    clock = Clock()
    rate = RequestRate(clock=clock)
    for _ in range(10):
        assert rate.hit("p", TEN).allowed
    wall[0] = jump
    state = rate.hit("p", TEN)
    assert (state.allowed, state.retry_after, state.reset_after) == (False, 60.0, 60.0)
    wall[0] = 0.0
    assert not rate.hit("p", TEN).allowed
    clock.now += 60
    wall[0] = jump
    assert rate.hit("p", TEN).remaining == 9


def hostile_environment() -> dict[str, str]:
    """Every variable that slowapi knows, with what would open it or break it."""
    names = [value for name, value in vars(slowapi.extension.C).items() if name.isupper()]
    assert len(names) >= 16
    values = {"RATELIMIT_ENABLED": "false", "RATELIMIT_STRATEGY": "fixed-window", "RATELIMIT_DEFAULT": "1/minute"}
    return {name: values.get(name, "nonsense://") for name in names}


@pytest.mark.parametrize("place", ["environment", "file", "unreadable file"])
def test_nothing_in_the_environment_or_a_dot_env_file_changes_anything(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = hostile_environment()
    monkeypatch.chdir(tmp_path)
    if place == "environment":
        # Starlette's view of the environment refuses changes to what it has read; the variables come from outside.
        for name, value in hostile.items():
            monkeypatch.setitem(os.environ, name, value)
    elif place == "file":
        (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in hostile.items()))
    else:
        (tmp_path / ".env").write_bytes(b"\xff\xfe=\xff\n")
    rate = RequestRate(clock=Clock())
    assert type(rate._limiter) is MovingWindowRateLimiter
    storage_of(rate)
    assert [rate.hit("p", TEN).allowed for _ in range(11)] == [True] * 10 + [False]


def test_the_variables_of_that_test_would_break_a_limiter_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hostile_environment().items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(ValueError, match=r"."):
        slowapi.extension.Limiter(key_func=_never)


def test_windows_that_are_over_are_forgotten_and_their_number_is_bounded() -> None:
    clock = Clock()
    rate = RequestRate(clock=clock, max_keys=50)
    for number in range(1000):
        assert rate.hit(f"p{number}", TEN).remaining == 9
    assert len(storage_of(rate)) <= 50 + FORGOTTEN_PER_HIT
    clock.now += 60
    for _ in range(10):
        rate.hit("p", TEN)
    assert len(storage_of(rate)) == 2  # this one's minute and second


def test_a_thousand_principals_cost_each_hit_the_same() -> None:
    def per_hit(principals: int) -> float:
        rate = RequestRate()
        names = [f"key:{number}" for number in range(principals)]
        best = float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            for name in names:
                rate.hit(name, plan(1000))
            best = min(best, (time.perf_counter() - begin) / principals)
        return best

    few, many = per_hit(100), per_hit(5000)
    print(f"\none hit among 100 principals {few * 1e6:.1f} us, among 5000 {many * 1e6:.1f} us")
    assert many < 5 * few + 20e-6


def test_the_storage_keeps_the_contract_of_the_library() -> None:
    clock = Clock(5.0)
    limiter = build_limiter(clock, 10)
    storage, item = limiter.storage, parse("3 per 1 minute")
    assert isinstance(storage, MonotonicWindows)
    assert limiter.get_window_stats(item, "p") == (65.0, 3)
    assert not limiter.test(item, "p", cost=4)
    assert not limiter.hit(item, "p", cost=4)
    assert limiter.hit(item, "p", cost=2)
    clock.now = 6.0
    assert limiter.get_window_stats(item, "p") == (65.0, 1)
    assert (storage.newest(item.key_for("p")), storage.newest("none"), storage.check()) == (5.0, None, True)
    limiter.clear(item, "p")
    assert limiter.hit(item, "p", cost=3)
    assert (storage.reset(), len(storage), storage.base_exceptions) == (1, 0, ValueError)
    limiter.hit(item, "p")
    clock.now = 66.0
    assert limiter.get_window_stats(item, "p").remaining == 3
    assert storage.newest(item.key_for("p")) is None
    assert limiter.hit(item, "q")  # and the emptied window in front is dropped
    assert len(storage) == 1
    assert limiter.hit(item, "q", cost=2)
    storage.take_back(item.key_for("q"))
    assert limiter.get_window_stats(item, "q").remaining == 1
    storage.take_back("none")
    assert len(storage) == 1


@pytest.mark.parametrize("call", [lambda s: s.incr("k", 1), lambda s: s.get("k"), lambda s: s.get_expiry("k")])
def test_the_storage_refuses_what_another_strategy_would_need(call: Callable[[Any], object]) -> None:
    with pytest.raises(NotImplementedError):
        call(MonotonicWindows())
    with pytest.raises(NotImplementedError):
        FixedWindowRateLimiter(MonotonicWindows()).hit(parse("1/second"), "p")
