"""The watchdog over a real engine, with clocks, timers and the end of the process injected.

What a process does when it is stuck is in tests/faults/test_watchdog.py.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

from service.engine.engine import Engine, EngineState
from service.engine.progress import Phase
from service.engine.telemetry import Telemetry
from service.engine.watchdog import NativeTimer, Watch, Watchdog
from service.errors import EngineFailed
from service.observability.metrics import Metrics
from service.settings import EngineSettings, WatchdogSettings
from tests.fakes import FakeBackend
from tests.unit.test_engine import FOREVER, Clock, drained, request

LIMITS = {"stall_timeout": 120.0, "start_timeout": 900.0, "loop_timeout": 60.0}


class Native(NativeTimer):
    """Notes what the timer in C would have been told."""

    def __init__(self) -> None:
        self.armed: list[float] = []
        self.disarmed = threading.Event()
        self.dumps = 0

    def enable(self) -> None:
        self.armed.clear()

    def arm(self, seconds: float) -> None:
        self.disarmed.clear()
        self.armed.append(seconds)

    def disarm(self) -> None:
        self.disarmed.set()

    def dump(self) -> None:
        self.dumps += 1


class Pooled(FakeBackend):
    """Counts how often its pool is given back, or fails at it."""

    released = 0
    stubborn = False

    def release_pool(self) -> None:
        if self.stubborn:
            raise RuntimeError("scripted")
        self.released += 1


class Watched:
    """An engine with one row whose step hangs for as long as the block lasts, and a watchdog that is looked through."""

    def __init__(self, **settings: float) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.native = Native()
        self.codes: list[int] = []
        self.ended = threading.Event()
        self.hang, self.hanging = threading.Event(), threading.Event()
        self.before_load: Callable[[], object] | None = None
        self.backend = Pooled(before_step=self.hang_here)
        self.settings = WatchdogSettings(**{**LIMITS, **settings})

    def hang_here(self, _step: int) -> None:
        self.hanging.set()
        assert self.hang.wait(30)

    def end(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()

    def count(self, watch: Watch) -> float | None:
        return self.metrics.registry.get_sample_value("mlxd_watchdog_trips_total", {"watch": watch.value})

    @asynccontextmanager
    async def running(self, *, by_hand: bool = True, **more: Any) -> AsyncIterator[tuple[Engine, Watchdog]]:
        """`by_hand`: the test looks, else the watchdog's own thread does."""
        telemetry = Telemetry(self.metrics)
        engine = Engine(self.backend, EngineSettings(), telemetry=telemetry, clock=self.clock)
        given = {"native": self.native, "end": self.end, "grace": 0.01, **more}
        watchdog = Watchdog(engine, self.backend, self.settings, telemetry=telemetry, **given)
        if by_hand:
            watchdog._exit.start()
        await engine.start()
        try:
            yield engine, watchdog
        finally:
            self.hang.set()
            if by_hand:
                watchdog._exit.dismiss()
            assert engine._thread is not None
            thread = engine._thread
            await engine.stop()
            # Where it was given up, as it should be, it may still be here: with a worker, or while loading without one.
            if engine._worker is not None:
                engine._worker.stop()
            await asyncio.to_thread(thread.join, 30)
            assert not thread.is_alive()


async def idle(engine: Engine) -> None:
    """Until the engine is ready and waits for work."""
    await engine.wait(EngineState.READY)
    async with asyncio.timeout(10):
        while engine.progress.phase is not Phase.IDLE:
            await asyncio.sleep(0.001)


@pytest.fixture
def logged() -> Iterator[list[structlog.types.EventDict]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


async def test_a_stalled_engine_is_told_to_everybody_and_ends_the_process(
    logged: list[structlog.types.EventDict],
) -> None:
    watched = Watched()
    async with watched.running() as (engine, watchdog):
        await idle(engine)
        runs, waits = engine.submit([request(max_tokens=FOREVER), request()])
        assert await asyncio.to_thread(watched.hanging.wait, 10)
        watched.clock.now += 120
        assert not watchdog.look(), "the bound itself is allowed"
        watched.clock.now += 1
        await asyncio.sleep(0)  # the loop answers
        assert watchdog.look()
        for generation in (runs, waits):
            assert isinstance((await drained(generation)).error, EngineFailed)
        assert engine.state is EngineState.FAILED
        assert engine.status().detail == "no progress for 121.0 s while stepping"
        with pytest.raises(EngineFailed):
            engine.submit([request()])
        assert await asyncio.to_thread(watched.ended.wait, 10)
        async with asyncio.timeout(10):
            await engine.stop()  # does not wait for the thread
    assert watched.codes == [os.EX_SOFTWARE]
    assert (watched.count(Watch.ENGINE), watched.native.dumps, watched.backend.released) == (1, 1, 1)
    tripped, *stacks = (line for line in logged if line["event"] in ("watchdog_tripped", "thread_stack"))
    assert (tripped["watch"], tripped["age"], tripped["phase"]) == ("engine", 121.0, "stepping")
    # Other tests of this process may have left a thread of that name.
    assert any("hang_here" in line["stack"] for line in stacks if line["thread"] == "generation")


async def test_a_busy_engine_is_left_alone() -> None:
    watched = Watched()
    watched.hang.set()
    async with watched.running() as (engine, watchdog):
        await idle(engine)
        for _ in range(5):
            watched.clock.now += 100
            (generation,) = engine.submit([request()])
            await drained(generation)
            assert not watchdog.look()
            await asyncio.sleep(0)
    assert watched.codes == []


async def test_a_loop_that_does_not_answer_ends_the_process_at_once(logged: list[structlog.types.EventDict]) -> None:
    watched = Watched()
    async with watched.running(grace=1) as (engine, watchdog):
        await idle(engine)
        assert not watchdog.look()
        watched.clock.now += 30
        await asyncio.sleep(0)
        assert not watchdog.look(), "it has answered"
        watched.clock.now += 61  # no await: the loop cannot answer
        assert watchdog.look()
        assert watched.codes == [os.EX_SOFTWARE]
        assert watchdog.loop_age == 61
    assert watched.count(Watch.EVENT_LOOP) == 1
    assert [line["watch"] for line in logged if line["event"] == "watchdog_tripped"] == ["event_loop"]


async def test_loading_has_a_bound_of_its_own_between_two_reports() -> None:
    watched = Watched()
    loading, go = threading.Event(), threading.Event()

    def hold() -> None:
        loading.set()
        go.wait(30)

    watched.backend.before_load = hold
    async with watched.running() as (engine, watchdog):
        assert await asyncio.to_thread(loading.wait, 10)
        watched.clock.now += 899
        assert not watchdog.look()
        engine.progress.reported()
        watched.clock.now += 899
        await asyncio.sleep(0)
        assert not watchdog.look()
        watched.clock.now += 2
        await asyncio.sleep(0)
        assert watchdog.look()
        go.set()
        assert await asyncio.to_thread(watched.ended.wait, 10)
    assert watched.count(Watch.START) == 1


@pytest.mark.parametrize("name", LIMITS)
async def test_each_watch_can_be_switched_off(name: str) -> None:
    watched = Watched(**{name: 0.0})
    go = threading.Event()
    watched.backend.before_load = lambda: go.wait(30)
    async with watched.running() as (engine, watchdog):
        if name != "start_timeout":
            go.set()
            await idle(engine)
        if name == "stall_timeout":
            engine.submit([request()])
            assert await asyncio.to_thread(watched.hanging.wait, 10)
        assert not watchdog.look()
        if name != "loop_timeout":
            await asyncio.sleep(0)  # the loop answers
        watched.clock.now += 1e6
        assert not watchdog.look()
        go.set()
    assert watched.codes == []
    assert bool(watched.native.armed) == (name != "loop_timeout")


async def test_a_thread_that_dies_and_is_depended_on_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda found: heard.append(found.thread.name))
    watched = Watched(stall_timeout=0.1)

    def die() -> None:
        raise RuntimeError("scripted")

    async with watched.running(by_hand=False) as (engine, watchdog):
        await idle(engine)
        with watchdog.run():
            for name in ("asyncio_7", "storage-writer"):
                thread = threading.Thread(target=die, name=name)
                thread.start()
                thread.join()
            await engine.wait(EngineState.FAILED)
            assert await asyncio.to_thread(watched.ended.wait, 10)
        assert engine.status().detail == "the thread storage-writer has died"
    assert heard == ["asyncio_7", "storage-writer"]
    assert watched.count(Watch.THREAD) == 1


async def test_a_log_that_blocks_for_ever_does_not_save_the_process() -> None:
    watched = Watched()
    blocked = threading.Event()
    before = structlog.get_config()["processors"]

    def block(*_: Any) -> Any:
        assert blocked.wait(30)
        raise structlog.DropEvent

    async with watched.running() as (engine, watchdog):
        await idle(engine)
        (generation,) = engine.submit([request()])
        assert await asyncio.to_thread(watched.hanging.wait, 10)
        watched.clock.now += 121
        structlog.configure(processors=[block])
        looking = threading.Thread(target=watchdog.look)
        looking.start()
        try:
            assert await asyncio.to_thread(watched.ended.wait, 10)
            assert isinstance((await drained(generation)).error, EngineFailed)
            assert looking.is_alive()
        finally:
            blocked.set()
            structlog.configure(processors=before)
            looking.join()
    assert watched.codes == [os.EX_SOFTWARE]


async def test_what_fails_in_the_dump_is_counted_and_changes_nothing(logged: list[structlog.types.EventDict]) -> None:
    watched = Watched()
    watched.backend.stubborn = True
    async with watched.running() as (engine, watchdog):
        await idle(engine)
        engine.submit([request()])
        assert await asyncio.to_thread(watched.hanging.wait, 10)
        watched.clock.now += 121
        assert watchdog.look()
        assert await asyncio.to_thread(watched.ended.wait, 10)
    assert watched.metrics.registry.get_sample_value("mlxd_internal_errors_total", {"where": "watchdog"}) == 1
    assert "watchdog_dump_failed" in [line["event"] for line in logged]


async def test_the_timer_in_c_is_armed_anew_by_every_look_and_ends_with_the_block() -> None:
    watched = Watched(loop_timeout=0.1)
    async with watched.running(by_hand=False) as (engine, watchdog):
        await idle(engine)
        with watchdog.run():
            async with asyncio.timeout(10):
                while len(watched.native.armed) < 5:
                    await asyncio.sleep(0.005)
            assert {round(seconds, 3) for seconds in watched.native.armed} == {0.11}
        assert await asyncio.to_thread(watched.native.disarmed.wait, 10)
    assert watched.codes == []


async def test_its_own_thread_finds_what_is_stuck() -> None:
    watched = Watched(stall_timeout=0.05)
    async with watched.running(by_hand=False) as (engine, watchdog):
        await idle(engine)
        (generation,) = engine.submit([request()])
        assert await asyncio.to_thread(watched.hanging.wait, 10)
        with watchdog.run():
            watched.clock.now += 1
            assert isinstance((await drained(generation)).error, EngineFailed)
            assert await asyncio.to_thread(watched.ended.wait, 10)
    assert watched.codes == [os.EX_SOFTWARE]
    assert not watched.native.disarmed.is_set(), "it is the last resort until the process is gone"


async def test_nobody_is_asked_where_no_loop_runs() -> None:
    watched = Watched()
    telemetry = Telemetry(watched.metrics)
    engine = Engine(watched.backend, EngineSettings(), telemetry=telemetry, clock=watched.clock)
    watchdog = Watchdog(engine, watched.backend, watched.settings, telemetry=telemetry, native=watched.native)
    for _ in range(2):
        assert not watchdog.look()
        watched.clock.now += 1000
