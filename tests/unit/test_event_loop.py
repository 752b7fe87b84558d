from __future__ import annotations

import asyncio
import threading
import time

import pytest
import structlog

from service.observability.event_loop import LoopWatch

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Late:
    """A timer that wakes as late as `lateness` says, and for ever after the last."""

    def __init__(self, clock: Clock, lateness: list[float]) -> None:
        self.clock = clock
        self.lateness = lateness
        self.done = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        if not self.lateness:
            self.done.set()
            await asyncio.Event().wait()
        self.clock.now += seconds + self.lateness.pop(0)


async def test_the_lateness_of_each_timer_is_observed() -> None:
    clock, seen = Clock(), list[float]()
    late = Late(clock, [0.0, 0.5, -1e-9, 0.02])
    async with LoopWatch(seen.append, interval=0.1, too_late=1e9, clock=clock, sleep=late.sleep).run():
        async with asyncio.timeout(10):
            await late.done.wait()
    assert seen == pytest.approx([0.0, 0.5, 0.0, 0.02])
    assert min(seen) >= 0


def test_each_standstill_is_told_once_and_only_when_it_is_long() -> None:
    clock = Clock()
    watch = LoopWatch(lambda _: None, too_late=0.25, clock=clock)
    with structlog.testing.capture_logs() as lines:
        watch.look()
        clock.now += 0.25
        watch.look()
        assert not lines
        for _ in range(3):
            clock.now += 0.1
            watch.look()
        assert [line["event"] for line in lines] == ["event_loop_lag"]
        watch._due = clock.now  # it moves again
        watch.look()
        clock.now += 1
        watch.look()
    assert [(line["event"], line["log_level"], line["late"]) for line in lines] == [
        ("event_loop_lag", "warning", 0.35),
        ("event_loop_lag", "warning", 1.0),
    ]
    assert lines[0]["stack"] == ""  # nobody runs it


async def test_the_log_says_what_the_loop_was_doing_while_it_stood_still() -> None:
    told = threading.Event()

    def note(_logger: object, _method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        lines.append(event)
        told.set()
        raise structlog.DropEvent

    def holds_everybody_up() -> None:
        assert told.wait(10)  # on the loop: until the watch has seen it

    lines: list[structlog.types.EventDict] = []
    others = set(threading.enumerate())
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[note])
    try:
        async with LoopWatch(lambda _: None, interval=0.005, too_late=0.01).run():
            holds_everybody_up()
    finally:
        structlog.configure(processors=before)
    assert lines[0]["event"] == "event_loop_lag"
    assert "holds_everybody_up" in lines[0]["stack"]
    assert not [t for t in threading.enumerate() if t.name == "event-loop-lag" and t not in others]


async def test_a_loop_that_stood_still_shows_it() -> None:
    seen: list[float] = []
    async with LoopWatch(seen.append, interval=0.01, too_late=1e9).run():
        await asyncio.sleep(0.02)
        time.sleep(0.1)  # noqa: ASYNC251 - what must not be done
        async with asyncio.timeout(10):
            while max(seen, default=0.0) < 0.05:
                await asyncio.sleep(0.005)
