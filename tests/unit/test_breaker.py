"""The breaker: open until a probe, closed until failures in a row."""

from __future__ import annotations

import pytest

from service.limits.breaker import FAILURES_TO_OPEN, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[bool]:
    return []


@pytest.fixture
def breaker(clock: Clock, told: list[bool]) -> Breaker:
    return Breaker(told.append, clock=clock)


def fail(breaker: Breaker, clock: Clock, times: int) -> None:
    for _ in range(times):
        began = breaker.begin()
        clock.now += 0.1
        breaker.failed(began, TimeoutError())


def test_it_is_open_until_it_is_closed_by_a_probe(breaker: Breaker, told: list[bool]) -> None:
    assert (breaker.closed, breaker.opened.is_set(), told) == (False, True, [False])
    breaker.close()
    assert (breaker.closed, breaker.opened.is_set(), told) == (True, False, [False, True])


def test_failures_in_a_row_open_it_once(breaker: Breaker, clock: Clock, told: list[bool]) -> None:
    breaker.close()
    fail(breaker, clock, FAILURES_TO_OPEN - 1)
    assert breaker.closed
    fail(breaker, clock, 5)
    assert (breaker.closed, breaker.opened.is_set(), told) == (False, True, [False, True, False])


def test_a_success_between_them_keeps_it_closed(breaker: Breaker, clock: Clock) -> None:
    breaker.close()
    for _ in range(10):
        fail(breaker, clock, FAILURES_TO_OPEN - 1)
        breaker.succeeded()
    assert breaker.closed


def test_what_fails_together_is_one_failure(breaker: Breaker, clock: Clock) -> None:
    breaker.close()
    for _ in range(FAILURES_TO_OPEN - 1):
        together = [breaker.begin() for _ in range(16)]
        clock.now += 0.1
        for began in together:
            breaker.failed(began, TimeoutError())
    assert breaker.closed
    fail(breaker, clock, 1)
    assert not breaker.closed


def test_a_probe_makes_old_failures_forgotten(breaker: Breaker, clock: Clock) -> None:
    breaker.close()
    fail(breaker, clock, FAILURES_TO_OPEN)
    breaker.close()
    fail(breaker, clock, FAILURES_TO_OPEN - 1)
    assert breaker.closed
